"""Settings of a pruning step, with all checks that need no network."""

from __future__ import annotations

__all__ = [
    "PruningConfig",
    "Scope",
    "SelectionConfig",
    "StepConfig",
    "check_sparsity",
    "choose_update",
    "require_target_fits",
]

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    require_choice,
    require_count,
    require_flag,
    require_integer,
    require_number,
    require_patterns,
)
from lightning_woodfisher.base.keywords import explain_keywords
from lightning_woodfisher.criteria import CRITERIA
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.layerwise.config import LayerwiseConfig
from lightning_woodfisher.pruning.stages import Spacing
from lightning_woodfisher.weights.patterns import parse_pattern

Scope = Literal["global", "layer"]

# Tolerance for sparsities that users compute, such as 1 - 1/3.
_SAME = 1e-9


@explain_keywords("selection")
@dataclass(frozen=True)
class SelectionConfig:
    """Settings of the selection: which weights may be pruned, and which compete.

    Args:
        scope: ``"global"``: one threshold over all layers (the paper's joint
            sparsification); ``"layer"``: every layer reaches the sparsity by itself.
        include: patterns of what to prune in addition to the default, which is the
            weights of linear, convolution, attention and recurrent layers
            (:func:`~.layers.prunable_parameters`).
        exclude: patterns of what to leave dense.
        only: patterns of what to prune in place of the default.
        pattern: weights that are pruned together: ``"unstructured"`` single weights;
            N:M such as ``"2:4"``, of which N of M consecutive inputs are kept; blocks such
            as ``"block4"`` of consecutive inputs; ``"rows"``, all weights of an output.
        layer_targets: sparsity by regular expression on the parameter name, for layers
            that do not compete with the others; the others share the rest of the target.
        max_layer_sparsity: largest sparsity of a single layer; the others compensate.
        flops_power: saliencies are divided by the FLOPs per weight of their layer to this
            power, so that expensive weights are pruned first; 0 ignores FLOPs.

    Raises:
        ConfigurationError: for a value that cannot work.
    """

    scope: Scope = "global"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    pattern: str = "unstructured"
    layer_targets: dict[str, float] = field(default_factory=dict)
    max_layer_sparsity: float | None = None
    flops_power: float = 0.0

    def __post_init__(self) -> None:
        require_choice("selection.scope", self.scope, get_args(Scope))
        for name in ("include", "exclude", "only"):
            require_patterns(f"selection.{name}", getattr(self, name))
        if self.only and self.include:
            raise ConfigurationError(
                f"selection.only={self.only} replaces the default selection and "
                f"selection.include={self.include} adds to it; put all patterns into one "
                "of them."
            )
        self._check_layer_targets()
        if self.max_layer_sparsity is not None:
            require_number(
                "selection.max_layer_sparsity", self.max_layer_sparsity, "(0, 1]"
            )
        require_number("selection.flops_power", self.flops_power, "[0, inf)")
        if self.flops_power and self.scope == "layer":
            raise ConfigurationError(
                f"selection.flops_power={self.flops_power} has no effect with "
                "scope='layer', where layers do not compete; use scope='global'."
            )

    def _check_layer_targets(self) -> None:
        if not isinstance(self.layer_targets, Mapping):
            raise ConfigurationError(
                f"selection.layer_targets={self.layer_targets!r} is not a mapping from "
                "patterns to sparsities."
            )
        for pattern, target in self.layer_targets.items():
            require_number(f"selection.layer_targets[{pattern!r}]", target, "[0, 1)")
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigurationError(
                    f"The pattern {pattern!r} of selection.layer_targets is not a regular "
                    f"expression: {error}."
                ) from error
        if parse_pattern(self.pattern).sparsity is not None and self.layer_targets:
            raise ConfigurationError(
                "selection.layer_targets cannot be combined with "
                f"pattern={self.pattern!r}, which gives every layer the same sparsity; leave "
                "one of them out."
            )


@explain_keywords("step")
@dataclass(frozen=True)
class StepConfig:
    """Settings of one pruning step: weight update, stages and measurements.

    Args:
        update: how the kept weights compensate for the removed ones: ``"joint"`` minimizes
            the quadratic model, ``"independent"`` sums the single-weight updates as
            published, ``"none"`` leaves the kept weights unchanged. None chooses
            ``"independent"`` in the callback, where training repairs the rest, and
            ``"joint"`` in ``prune()``; in both ``"joint"`` for a criterion that needs it.
        update_scale: share of the update that is applied, in [0, 1]; with ``line_search``
            the largest share. 0 is Optimal Brain Damage, like ``update="none"``.
        line_search: choose the share of each update by the loss measured on the samples,
            where 0 is a choice; also replace the joint update by the independent one where
            that gives a smaller loss. None searches, except in the callback for
            the independent update that it has chosen.
        search_samples: number of samples on which the line search measures losses, and
            those before and after the step: the first of the gradients' samples, in whole
            mini-batches and at least one. The first 256 of them decide which two trials of
            the search are measured on all.
        recompute_steps: number of stages that a step is divided into. Each stage has fresh
            gradients and a fresh inverse.
        recompute_spacing: how sparsity grows over the stages: ``"geometric"`` in the kept
            share, ``"linear"`` or ``"polynomial"``.
        reuse_gradients: all stages use the gradients of the first one, with a new inverse
            for the weights that are left.
        trust_ratio: when the loss of a stage rises by more than this multiple of the
            prediction, the following stages are half as long, down to an eighth. None
            never shortens them.
        measure_loss: measure the loss before and after each stage, to compare its rise with
            the prediction.
        local_model_points: number of points between the weights before and after each
            stage at which predicted and measured loss are compared; 0 for none, 5 is a
            good number. Each point but the two ends costs one pass over the samples.
        batchnorm_recalibration_batches: number of batches (of 64 samples or
            ``gradient_batch_size``, whichever is larger) from which the running statistics
            of BatchNorm layers are re-estimated after the step; 0 keeps the statistics.
            Batches of an iterable are those of the gradients. Layers in evaluation mode
            inside a model in training mode are frozen and keep their statistics.
            ``criterion="layerwise"`` fits the means itself and re-estimates nothing.
        seed: seed of the choice of samples and of random operations in the module.

    Raises:
        ConfigurationError: for a value that cannot work.
    """

    update: Update | None = None
    update_scale: float = 1.0
    line_search: bool | None = None
    search_samples: int = 1024
    recompute_steps: int = 1
    recompute_spacing: Spacing = "geometric"
    reuse_gradients: bool = False
    trust_ratio: float | None = None
    measure_loss: bool = True
    local_model_points: int = 0
    batchnorm_recalibration_batches: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.update is not None:
            require_choice("step.update", self.update, get_args(Update))
        if self.line_search is not None:
            require_flag("step.line_search", self.line_search)
        require_choice(
            "step.recompute_spacing", self.recompute_spacing, get_args(Spacing)
        )
        for name in ("reuse_gradients", "measure_loss"):
            require_flag(f"step.{name}", getattr(self, name))
        require_number(
            "step.update_scale", self.update_scale, "[0, 1]", "1 is the whole update"
        )
        for name, least in {
            "search_samples": 1,
            "recompute_steps": 1,
            "local_model_points": 0,
            "batchnorm_recalibration_batches": 0,
        }.items():
            require_count(f"step.{name}", getattr(self, name), least)
        require_integer("step.seed", self.seed, -(2**63), 2**63 - 1)
        if self.local_model_points == 1:
            raise ConfigurationError(
                "step.local_model_points=1 must be 0 (off), or at least 2: the weights "
                "before and after the stage are two of them."
            )
        if self.local_model_points and not self.measure_loss:
            raise ConfigurationError(
                f"step.local_model_points={self.local_model_points} needs measured losses; "
                "set step.measure_loss=True."
            )
        if self.trust_ratio is not None:
            require_number("step.trust_ratio", self.trust_ratio, "(0, inf)")
            if self.recompute_steps == 1:
                raise ConfigurationError(
                    f"step.trust_ratio={self.trust_ratio} shortens the stages that follow, "
                    "but step.recompute_steps=1 has none; set recompute_steps to 2 or more."
                )


def choose_update(step: StepConfig, criterion: str, trains_on: bool) -> StepConfig:
    """Choose the update and the line search where the settings leave them open.

    A long step that nothing repairs is best with the joint update, at a length that is
    searched. Where training goes on, masks matter more than the update, and the smaller
    change of the independent one is at least as good and costs no search.

    Args:
        step: the settings.
        criterion: name of the saliency.
        trains_on: whether the network is trained after the step.

    Returns:
        The settings without None in the two fields.
    """
    update, search = step.update, step.line_search
    kind = CRITERIA.get(criterion)
    # WoodTaylor diverges without the search; layer-wise updates are always joint.
    plain = kind is not None and kind.needs != "layer inputs" and not kind.first_order
    if update is None:
        independent = trains_on and plain and search is not True
        update = "independent" if independent else "joint"
        search = not independent if search is None else search
    return replace(step, update=update, line_search=search is not False)


@dataclass(frozen=True)
class PruningConfig:
    """All settings of a pruning step, shared by the callback, ``prune()`` and sweeps.

    Args:
        criterion: name of the saliency: a key of :data:`~.criteria.CRITERIA`.
        fisher: how the Fisher is estimated.
        selection: which weights may be pruned, and which of them compete.
        step: how a step reaches its sparsity.
        flops_target: share of the dense network's FLOPs that is left at the end; None
            when a sparsity decides.
        layerwise: settings of ``criterion="layerwise"``.

    Raises:
        ConfigurationError: for settings that contradict one another.
    """

    criterion: str = "woodfisher"
    fisher: FisherConfig = field(default_factory=FisherConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    step: StepConfig = field(default_factory=StepConfig)
    flops_target: float | None = None
    layerwise: LayerwiseConfig = field(default_factory=LayerwiseConfig)

    @property
    def by_layer(self) -> bool:
        """Whether layers are pruned one after another, without gradient rows."""
        return CRITERIA[self.criterion].needs == "layer inputs"

    @property
    def recalibration_batches(self) -> int:
        """Number of batches from which BatchNorm statistics are re-estimated."""
        return 0 if self.by_layer else self.step.batchnorm_recalibration_batches

    @property
    def counts_flops(self) -> bool:
        """Whether a step counts FLOPs."""
        return self.flops_target is not None or self.selection.flops_power > 0

    @property
    def update(self) -> Update:
        """How the kept weights compensate."""
        return self.step.update or "joint"

    @property
    def searches(self) -> bool:
        """Whether a line search chooses the scale of an update."""
        updates = self.update != "none" and CRITERIA[self.criterion].compensates
        return self.step.line_search is not False and updates and not self.by_layer

    @property
    def reads_data(self) -> bool:
        """Whether a step reads any sample."""
        return (
            self.step.measure_loss
            or self.counts_flops
            or self.recalibration_batches > 0
            or self.searches
            or CRITERIA[self.criterion].needs != "nothing"
        )

    def __post_init__(self) -> None:
        for name, kind in (
            ("fisher", FisherConfig),
            ("selection", SelectionConfig),
            ("step", StepConfig),
            ("layerwise", LayerwiseConfig),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} is not a {kind.__name__}; give "
                    f"{kind.__name__}(...)."
                )
        require_choice("criterion", self.criterion, CRITERIA)
        step = choose_update(self.step, self.criterion, trains_on=False)
        object.__setattr__(self, "step", step)
        if self.flops_target is not None:
            self._check_flops_target(self.flops_target)
        self._check_reuse()
        self._check_trust_ratio()
        self._check_nonfinite()
        self._check_layerwise()

    def _check_flops_target(self, flops_target: float) -> None:
        require_number(
            "flops_target",
            flops_target,
            "(0, 1)",
            "it is the share of the dense network's FLOPs that is left",
        )
        selection = self.selection
        conflicts = {
            "scope='layer'": selection.scope == "layer",
            f"pattern={selection.pattern!r}": (
                parse_pattern(selection.pattern).sparsity is not None
            ),
            "layer_targets": bool(selection.layer_targets),
        }
        for setting, is_set in conflicts.items():
            if is_set:
                raise ConfigurationError(
                    f"flops_target cannot be combined with selection.{setting}, which already "
                    "decides how many weights of a layer are pruned; leave one of them out."
                )

    def _check_reuse(self) -> None:
        if not self.step.reuse_gradients:
            return
        if not CRITERIA[self.criterion].can_restrict:
            able = [name for name, other in CRITERIA.items() if other.can_restrict]
            raise ConfigurationError(
                "step.reuse_gradients cannot be combined with "
                f"criterion={self.criterion!r}; use {' or '.join(able)}, or set it to False."
            )
        if self.selection.pattern != "unstructured":
            raise ConfigurationError(
                "step.reuse_gradients cannot be combined with selection.pattern="
                f"{self.selection.pattern!r}; set it to False."
            )

    def _check_trust_ratio(self) -> None:
        ratio, measured = self.step.trust_ratio, self.step.measure_loss
        predicts = CRITERIA[self.criterion].needs != "nothing"
        if ratio is not None and not (measured and predicts):
            raise ConfigurationError(
                f"step.trust_ratio={ratio} compares the measured with the predicted rise of "
                "the loss; it needs step.measure_loss=True and a criterion that predicts one."
            )

    def _check_nonfinite(self) -> None:
        most = self.fisher.max_nonfinite
        if most and CRITERIA[self.criterion].needs in {"factors", "layer inputs"}:
            raise ConfigurationError(
                f"fisher.max_nonfinite={most} cannot be combined with criterion="
                f"{self.criterion!r}, which has no gradients of single mini-batches; "
                "set it to 0."
            )
        if most and most >= self.fisher.num_gradients:
            raise ConfigurationError(
                f"fisher.max_nonfinite={most} would let all of "
                f"num_gradients={self.fisher.num_gradients} be left out; lower it."
            )

    def _check_layerwise(self) -> None:
        if not self.by_layer:
            return
        step = self.step
        # Settings without a meaning, and the values that have no effect.
        refused = {
            f"fisher.model_mode={self.fisher.model_mode!r}": (
                self.fisher.model_mode == "train"
            ),
            f"step.update={step.update!r}": step.update == "independent",
            f"step.update_scale={step.update_scale}": step.update_scale != 1.0,
            f"step.trust_ratio={step.trust_ratio}": step.trust_ratio is not None,
            f"step.local_model_points={step.local_model_points}": (
                step.local_model_points > 0
            ),
            f"flops_target={self.flops_target}": self.flops_target is not None,
            f"selection.flops_power={self.selection.flops_power}": (
                self.selection.flops_power > 0
            ),
        }
        for setting, is_set in refused.items():
            if is_set:
                raise ConfigurationError(
                    f"{setting} cannot be combined with criterion={self.criterion!r}, which "
                    "reconstructs the outputs of layers in evaluation mode and predicts no "
                    "loss; leave it at its default (update may also be 'none')."
                )


def check_sparsity(target_sparsity: float) -> None:
    """Check a target sparsity.

    Args:
        target_sparsity: share of zeros.
    """
    require_number(
        "target_sparsity",
        target_sparsity,
        "[0, 1)",
        "it is the share of zeros, so 90 % is 0.9",
    )


def require_target_fits(
    selection: SelectionConfig, target_sparsity: float, is_final: bool = True
) -> None:
    """Check that the pattern and the limits of a selection allow a sparsity.

    Args:
        selection: which weights may be pruned.
        target_sparsity: sparsity of a network, or at the end of a schedule.
        is_final: False for a step before the last.

    Raises:
        ConfigurationError: with the sparsity to ask for.
    """
    pattern = parse_pattern(selection.pattern)
    if pattern.sparsity is not None:
        above = target_sparsity > pattern.sparsity + _SAME
        if above or (is_final and target_sparsity < pattern.sparsity - _SAME):
            raise ConfigurationError(
                f"selection.pattern={selection.pattern!r} has sparsity "
                f"{pattern.sparsity:g} exactly, not {target_sparsity:g}; set "
                f"target_sparsity={pattern.sparsity:g}, or choose another pattern."
            )
    most = selection.max_layer_sparsity
    if most is not None and is_final and target_sparsity > most:
        raise ConfigurationError(
            f"target_sparsity={target_sparsity:g} is out of reach when no layer may have "
            f"more than selection.max_layer_sparsity={most:g}; raise the limit."
        )
