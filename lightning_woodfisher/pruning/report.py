"""Reports of pruning steps: numbers, tables, and the names under which they are logged."""

from __future__ import annotations

__all__ = [
    "SALIENCY_SHARES",
    "LayerReport",
    "LocalModelPoint",
    "PruningReport",
    "Reconstruction",
    "format_steps",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_woodfisher.base.plain_data import PlainData
from lightning_woodfisher.base.text_table import format_number, format_table

# Quantiles of the saliencies in the report of a layer.
SALIENCY_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Reconstruction:
    """How well a layer keeps its outputs, with ``criterion="layerwise"``.

    Errors are mean squares on the samples of the last stage, as shares of the variance of
    the targets (of their mean square if nothing absorbs a mean).

    Attributes:
        error_masked: error if the other weights did not change.
        error: error of the new weights and bias.
        iterations: iterations of the search for the mask.
        damping: λ.
        target: ``"residual sum"`` if the skip of a residual sum is part of the targets,
            ``"outputs"`` if these are the outputs of the dense layer alone.
    """

    error_masked: float
    error: float
    iterations: int
    damping: float
    target: str


@dataclass(frozen=True)
class LayerReport:
    """Result of a pruning step for one parameter.

    Attributes:
        name: parameter name.
        shape: shape of the parameter.
        weights: number of weights.
        zeros_before: number of pruned weights before the step.
        zeros_after: number of pruned weights after the step.
        threshold: largest saliency that was removed; None if no weight was removed.
        predicted_increase: rise of the loss that the quadratic model predicts for this
            layer's share of the update; None for a criterion without a model of the loss.
        saliency_quantiles: quantiles of the saliencies in the last stage, before weights
            were removed, at ``SALIENCY_SHARES``; with a pattern, of groups per weight.
            Empty if no weight could be removed, and in reports of older versions.
        reconstruction: reconstruction of the outputs; None for other criteria.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros_before: int
    zeros_after: int
    threshold: float | None
    predicted_increase: float | None
    saliency_quantiles: tuple[float, ...] = ()
    reconstruction: Reconstruction | None = None

    @property
    def sparsity(self) -> float:
        """Share of pruned weights after the step."""
        return self.zeros_after / max(1, self.weights)


@dataclass(frozen=True)
class LocalModelPoint:
    """Rise of the mean loss at a fraction of a stage's update, predicted and measured.

    Attributes:
        fraction: t in [0, 1]; the weights are w + t·δ.
        predicted: t²·½δᵀFδ of the quadratic model; None for a criterion without one.
        measured: rise on the samples of the stage's gradients.
    """

    fraction: float
    predicted: float | None
    measured: float


@dataclass(frozen=True)
class PruningReport(PlainData):
    """Result of one pruning step.

    Attributes:
        criterion: name of the criterion.
        layers: one report for each selected parameter.
        target_sparsity: requested sparsity.
        threshold: largest saliency removed in the last stage.
        damping: λ as configured; None for a criterion without damping.
        raised_damping: λ of the blocks where it had to be raised, by name of the block:
            ``"<layer> from weight <first active weight>"``.
        predicted_increase: rise of the mean loss that the quadratic model predicts, summed
            over stages; None without a model.
        measured_increase: rise of the mean loss on the samples of the gradients, summed
            over stages like ``predicted_increase``; None when not measured.
        loss_before: mean loss before the first stage, on the samples of its gradients.
        loss_after: mean loss after the last stage, on the samples of its gradients, with
            the old statistics of BatchNorm.
        loss_recalibrated: the same with the new statistics of BatchNorm; None if they have
            not changed or the loss is not measured.
        stages: number of stages: ``recompute_steps``, or more after halving.
        num_gradients: number of gradients of each stage.
        seconds: wall-clock seconds by phase.
        bytes_exchanged: number of bytes that all ranks together have sent.
        fisher_bytes: bytes of Fisher state on each rank, in the largest stage.
        world_size: number of ranks.
        arithmetics: share of the active weights by the arithmetic of their inverse Fisher
            in the last stage (``fisher.precision``): ``"float32"``, ``"split"`` or
            ``"float64"``; empty without an inverse.
        epoch: epoch at whose start the step happened; None outside a Trainer.
        step: number of optimizer steps before it; None outside a Trainer.
        collection: how gradients were computed: ``"per-sample"``, many in one pass, or
            ``"loop: <reason>"``, one by one; ``"factors of layers"`` for K-FAC; None without
            gradients.
        flops_dense: FLOPs of one forward pass of a mini-batch without masks; None if they
            were not counted.
        flops_before: FLOPs with the masks before the step.
        flops_after: FLOPs with the masks after the step.
        update_scales: applied share of the compensation in each stage; empty without one.
        first_order_scales: applied share of the first-order direction in each stage; empty
            without one.
        updates: update of the kept weights in each stage: ``"joint"``, ``"independent"``,
            or ``"none"`` if they did not change. The line search may replace the
            configured one.
        local_model: loss along the update of each stage (``local_model_points``).
        stage_halvings: how often the stages became half as long, because the loss had risen
            by more than ``trust_ratio`` times the prediction.
        batchnorm_layers: number of layers whose running statistics were re-estimated.
        nonfinite_gradients: number of gradients that were NaN or infinite and left out.
        left_dense: why nothing was removed from a tensor in this step, by its name.
        model_parameters: number of parameters of the whole model, biases, norms and frozen
            ones included; None in reports of older versions.
        model_zeros: number of them that are exactly zero after the step.
        logged_before: latest values that the LightningModule had logged before the step, by
            name, on rank 0.
        logged_after: latest values that it had logged before the next step, or the end of
            training.
    """

    criterion: str
    layers: tuple[LayerReport, ...]
    target_sparsity: float
    threshold: float | None
    damping: float | None
    raised_damping: Mapping[str, float]
    predicted_increase: float | None
    measured_increase: float | None
    loss_before: float | None
    loss_after: float | None
    stages: int
    num_gradients: int
    seconds: Mapping[str, float]
    bytes_exchanged: int
    fisher_bytes: tuple[int, ...]
    world_size: int
    epoch: int | None = None
    step: int | None = None
    collection: str | None = None
    flops_dense: int | None = None
    flops_before: float | None = None
    flops_after: float | None = None
    update_scales: tuple[float, ...] = ()
    first_order_scales: tuple[float, ...] = ()
    updates: tuple[str, ...] = ()
    local_model: tuple[tuple[LocalModelPoint, ...], ...] = ()
    stage_halvings: int = 0
    batchnorm_layers: int = 0
    nonfinite_gradients: int = 0
    model_parameters: int | None = None
    model_zeros: int | None = None
    left_dense: Mapping[str, str] = field(default_factory=dict)
    loss_recalibrated: float | None = None
    arithmetics: Mapping[str, float] = field(default_factory=dict)
    logged_before: Mapping[str, float] = field(default_factory=dict)
    logged_after: Mapping[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of selected weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Number of pruned weights after the step."""
        return sum(layer.zeros_after for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of the selected weights that is pruned after the step."""
        return self.zeros / max(1, self.weights)

    @property
    def missing(self) -> int:
        """Number of weights that are missing from the target, at least 0."""
        return max(0, round(self.target_sparsity * self.weights) - self.zeros)

    @property
    def empty_layers(self) -> list[str]:
        """Names of the layers without any weight left."""
        return [layer.name for layer in self.layers if layer.sparsity == 1.0]

    @property
    def model_sparsity(self) -> float | None:
        """Share of all parameters of the model that is zero after the step."""
        if self.model_parameters is None or self.model_zeros is None:
            return None
        return self.model_zeros / max(1, self.model_parameters)

    @property
    def flops_share(self) -> float | None:
        """Share of the dense FLOPs that is left after the step; None if not counted."""
        if self.flops_dense is None or self.flops_after is None:
            return None
        return self.flops_after / max(1, self.flops_dense)

    def damping_of(self, layer: LayerReport) -> float | None:
        """Return the largest λ among the blocks of a layer.

        Args:
            layer: one of ``layers``.

        Returns:
            λ as configured, or the raised value; None without damping.
        """
        if layer.reconstruction is not None:
            return layer.reconstruction.damping
        prefix = f"{layer.name} from weight "
        raised = [
            damping
            for block, damping in self.raised_damping.items()
            if block.startswith(prefix)
        ]
        return max(raised) if raised else self.damping

    def metrics(self) -> dict[str, float]:
        """Return the scalars for a logger.

        Returns:
            Numbers by name; every name starts with ``pruning/``.
        """
        values: dict[str, float | None] = {
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "target_sparsity": self.target_sparsity,
            "threshold": self.threshold,
            "damping": self.damping,
            "blocks_with_raised_damping": float(len(self.raised_damping)),
            "nonfinite_gradients": float(self.nonfinite_gradients),
            "float64_share": self.arithmetics.get("float64", 0.0)
            if self.arithmetics
            else None,
            "predicted_loss_increase": self.predicted_increase,
            "measured_loss_increase": self.measured_increase,
            "loss_recalibrated": self.loss_recalibrated,
            "bytes_exchanged": float(self.bytes_exchanged),
            "flops_share": self.flops_share,
            "update_scale": next(reversed(self.update_scales), None),
            "first_order_scale": next(reversed(self.first_order_scales), None),
        }
        values |= {f"seconds/{phase}": time for phase, time in self.seconds.items()}
        values |= {f"sparsity/{layer.name}": layer.sparsity for layer in self.layers}
        for layer in self.layers:
            if layer.reconstruction is not None:
                for kind in ("error_masked", "error", "iterations", "damping"):
                    value = getattr(layer.reconstruction, kind)
                    values[f"reconstruction/{kind}/{layer.name}"] = float(value)
        for number, points in enumerate(self.local_model):
            for point in points:
                where = f"stage_{number}/at_{point.fraction:.3g}"
                values[f"local_model/predicted/{where}"] = point.predicted
                values[f"local_model/measured/{where}"] = point.measured
        return {f"pruning/{k}": float(v) for k, v in values.items() if v is not None}

    def describe_loss(self) -> str:
        """Format the measured losses as one line; empty if they were not measured."""
        if self.loss_before is None or self.loss_after is None:
            return ""
        text = f"loss {self.loss_before:.3g} before, {self.loss_after:.3g} after"
        if self.loss_recalibrated is not None:
            text += (
                " with old BatchNorm statistics, "
                f"{self.loss_recalibrated:.3g} after with new ones"
            )
        if self.update_scales and not any(self.update_scales):
            text += "; every update of the kept weights raised it, so they stayed"
        return text

    def to_table(self) -> str:
        """Format the layers as a text table.

        Returns:
            Lines of equal width, with the selected weights and the whole model in the last
            two, and a line with the measured losses.
        """
        head = ["layer", "shape", "weights", "zeros", "sparsity"]
        more: list[tuple[str, ...]]
        last: tuple[str, ...]
        if any(layer.reconstruction is not None for layer in self.layers):
            head += ["error, masked", "error", "target"]
            more = [
                _reconstruction_cells(layer.reconstruction) for layer in self.layers
            ]
            last = ("", "", "")
        else:
            head += ["predicted rise"]
            more = [(format_number(layer.predicted_increase),) for layer in self.layers]
            last = (format_number(self.predicted_increase),)
        rows = [
            (
                layer.name,
                "×".join(map(str, layer.shape)),
                f"{layer.weights:,}",
                f"{layer.zeros_after:,}",
                f"{layer.sparsity:.2%}",
                *cells,
            )
            for layer, cells in zip(self.layers, more, strict=True)
        ]
        counts = f"{self.weights:,}", f"{self.zeros:,}", f"{self.sparsity:.2%}"
        totals = [("selected", "", *counts, *last)]
        if self.model_sparsity is not None:
            whole = (
                f"{self.model_parameters:,}",
                f"{self.model_zeros:,}",
                f"{self.model_sparsity:.2%}",
            )
            totals.append(("whole model", "", *whole, *("" for _ in last)))
        table = format_table(head, rows, *totals)
        loss = self.describe_loss()
        return f"{table}\n{loss}" if loss else table


def _reconstruction_cells(found: Reconstruction | None) -> tuple[str, str, str]:
    if found is None:
        return format_number(None), format_number(None), "–"
    return format_number(found.error_masked), format_number(found.error), found.target


def format_steps(reports: Sequence[PruningReport]) -> str:
    """Format the pruning steps of a run as a text table.

    Args:
        reports: reports of the steps, in order.

    Returns:
        Lines of equal width, one for each step below the head.
    """
    recalibrated = any(report.loss_recalibrated is not None for report in reports)
    head = ["", "epoch", "step", "target", "sparsity", "predicted rise"]
    head += ["measured rise", "loss before", "after"]
    head += ["with new BN statistics"] * recalibrated
    rows = [
        (
            f"{number}",
            format_number(report.epoch, ""),
            format_number(report.step, ","),
            f"{report.target_sparsity:.2%}",
            f"{report.sparsity:.2%}",
            format_number(report.predicted_increase),
            format_number(report.measured_increase),
            format_number(report.loss_before),
            format_number(report.loss_after),
            *(format_number(report.loss_recalibrated),) * recalibrated,
            f"{sum(report.seconds.values()):.1f}",
        )
        for number, report in enumerate(reports, start=1)
    ]
    return format_table([*head, "seconds"], rows)
