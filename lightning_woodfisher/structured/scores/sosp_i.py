"""SOSP-I: the cost of removing two structures together, from per-sample derivatives.

For the output a of a layer, bias included, Σ a·∂ℓ/∂a over the positions of channel c is the
inner product of filter and bias of c with ∂ℓ/∂θ, because a is linear in them. So one
backward pass of a whole batch gives θ_s·∂ℓ_n/∂θ for every sample n and structure s, without
any gradient of a weight. The same holds for weight and bias of a norm.

With these rows u, ``Q = UᵀU / N'``, and removing a set π of structures costs ``πᵀAπ`` with
``A_ss' = ½|Q_ss'| + δ_ss'|θ_s·g|`` (SOSP; Nonnenmacher et al. 2022). A is never formed: a
row of it takes one product with U.
Shapes: n samples of a batch, S structures, C channels of a layer, D classes, M rows of U.
"""

from __future__ import annotations

__all__ = ["PairScores", "score_pairs"]

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.data.losses import differentiate
from lightning_woodfisher.structured.scores.evaluation import Evaluation
from lightning_woodfisher.structured.scores.vectors import ParameterSlices

_CHANNELS_SECOND = (_ConvNd, _NormBase, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
_ROWS_PER_PRODUCT = 256


class PairScores:
    """The matrix A of all pairs of structures.

    Args:
        rows: U, float64 ``[M, S]``.
        samples: N', the divisor of UᵀU; M with one row for each sample.
        first_order: θ_s·g, float64 ``[S]``; the sign is ignored.

    Attributes:
        rows: as given.
        samples: as given.
        first_order: ``|θ_s·g|``, float64 ``[S]``.
        size: S.
    """

    def __init__(self, rows: Tensor, samples: int, first_order: Tensor) -> None:
        self.rows = rows.double()
        self.samples = samples
        self.first_order = first_order.double().abs()
        self.size = rows.shape[1]

    def curvature(self, structures: Sequence[int] | Tensor) -> Tensor:
        """Compute rows of Q, with signs.

        Args:
            structures: k indices of structures.

        Returns:
            float64 ``[k, S]``.
        """
        chosen = torch.as_tensor(structures, dtype=torch.int64)
        return self.rows[:, chosen].T @ self.rows / self.samples

    def row(self, structure: int) -> Tensor:
        """Compute a row of A.

        Args:
            structure: index of the structure.

        Returns:
            float64 ``[S]``.
        """
        row = 0.5 * self.curvature([structure])[0].abs()
        row[structure] += self.first_order[structure]
        return row

    def diagonal(self) -> Tensor:
        """Compute the cost of removing each structure alone.

        Returns:
            A_ss, float64 ``[S]``.
        """
        return 0.5 * self.rows.square().sum(dim=0) / self.samples + self.first_order

    def row_sums(self) -> Tensor:
        """Sum the rows of A: the cost of each structure together with all others.

        Returns:
            float64 ``[S]``.
        """
        sums = [
            0.5 * self.curvature(indices).abs().sum(dim=1)
            for indices in torch.split(torch.arange(self.size), _ROWS_PER_PRODUCT)
        ]
        return torch.cat(sums) + self.first_order

    def greedy(
        self, sizes: Sequence[int], most: Sequence[int], count: int | None = None
    ) -> Tensor:
        """Remove structures one by one, each time the one that adds the least cost.

        What a structure adds only grows as others are removed. So the added costs never
        decrease, and the K smallest belong to the first K structures removed.

        Args:
            sizes: number of structures of each group, S in total.
            most: largest number that each group may lose.
            count: number of removals; None for all that are allowed.

        Returns:
            float64 ``[S]``: the cost that each structure added when it was removed;
            infinite for structures that stay.
        """
        left = list(most)
        group_of = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(sizes)
        )
        added = torch.full((self.size,), math.inf, dtype=torch.float64)
        marginal = self.diagonal()
        removable = torch.tensor(left)[group_of] > 0
        for _ in range(min(sum(left), self.size if count is None else count)):
            structure = int(torch.where(removable, marginal, math.inf).argmin())
            added[structure] = marginal[structure]
            marginal += 2 * self.row(structure)
            group = int(group_of[structure])
            left[group] -= 1
            removable[structure] = False
            if not left[group]:
                removable &= group_of != group
        return added


def score_pairs(evaluation: Evaluation) -> PairScores:
    """Compute the rows U for SOSP-I.

    Args:
        evaluation: with its session entered.

    Returns:
        The scores of all pairs of structures.
    """
    size, labels = evaluation.vectors.size, evaluation.config.labels
    outputs = _LayerOutputs(evaluation)

    def differentiate_loss(loss: Callable[[], Tensor], scale: float) -> Tensor:
        value = loss() * scale
        taken, _ = outputs.take()
        # The loss is a mean, and a row belongs to one sample.
        return outputs.derivatives(taken, value * len(taken[0][1]))

    def differentiate_logits(loss: Callable[[], Tensor], scale: float) -> Tensor:
        loss()
        taken, logits = outputs.take()
        shapes = [tuple(one.shape) for one in logits]
        if len(shapes) != 1 or len(shapes[0]) != 2:
            raise PruningError(
                "labels='logits' needs a loss that calls the model once and gets logits "
                f"[n, D], but the outputs had the shapes {shapes}; use labels='sampled'"
            )
        share = logits[0].detach().double().softmax(dim=1)
        classes = share.shape[1]
        rows = []
        for label in range(classes):
            # A column of a root of diag(p) - ppᵀ, the Hessian of the softmax cross-entropy.
            root = -share
            root[:, label] += 1
            root *= share[:, label : label + 1].sqrt() * scale
            more = label < classes - 1
            rows.append(outputs.derivatives(taken, logits[0], root.to(logits[0]), more))
        return torch.cat(rows)

    with outputs.recording():
        rows = first_order = evaluation.compute_rows(differentiate_loss, size)
        if labels == "logits":
            rows = evaluation.compute_rows(differentiate_logits, size)
        elif labels == "sampled":
            rows = evaluation.compute_rows(differentiate_loss, size, sample_labels=True)
    return PairScores(rows, len(first_order), first_order.mean(dim=0))


class _LayerOutputs:
    """Outputs of the layers with structures, and the derivatives along every θ_s.

    Args:
        evaluation: with the model and its structures.

    Raises:
        ConfigurationError: for a layer whose output is not known to be linear in its
            weights, channel by channel.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._model = evaluation.source.model
        self._predictor = evaluation.source.predictor
        self._size = evaluation.vectors.size
        self._slices: dict[str, list[ParameterSlices]] = defaultdict(list)
        for one in evaluation.vectors.slices:
            self._slices[one.module].append(one)
        for name, slices in self._slices.items():
            _require_linear(name, self._model.get_submodule(name), slices)
        self._outputs: list[tuple[str, Tensor]] = []
        self._logits: list[Tensor] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the outputs of the layers and the logits with forward hooks."""

        def record_output(name: str) -> Callable[..., Tensor | None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
                # Outputs have no graph while labels are drawn.
                if not output.requires_grad:
                    return None
                self._outputs.append((name, output))
                # The next operation may work in place.
                return output.clone()

            return hook

        def record_logits(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                self._logits.append(output)

        with contextlib.ExitStack() as hooks:
            for name in self._slices:
                layer = self._model.get_submodule(name)
                hooks.enter_context(layer.register_forward_hook(record_output(name)))
            hooks.enter_context(self._predictor.register_forward_hook(record_logits))
            yield

    def take(self) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
        """Return what was recorded since the last call: layer outputs and logits."""
        outputs, self._outputs = self._outputs, []
        logits, self._logits = self._logits, []
        return outputs, logits

    def derivatives(
        self,
        outputs: Sequence[tuple[str, Tensor]],
        value: Tensor,
        direction: Tensor | None = None,
        retain_graph: bool = False,
    ) -> Tensor:
        """Compute θ_s·∂v_n/∂θ for all samples n and structures s in one backward pass.

        Args:
            outputs: names of layers with their outputs, from :meth:`take`.
            value: v: a sum over the samples, or ``[n, D]``.
            direction: ``[n, D]``, the factors by which the values of a sample are summed.
            retain_graph: whether another backward pass follows.

        Returns:
            float64 ``[n, S]``, on the device of the outputs.

        Raises:
            PruningError: if the outputs do not belong to the same n samples.
        """
        lengths = {len(output) for _, output in outputs}
        if len(lengths) != 1:
            raise PruningError(
                "SOSP-I needs layers whose outputs have the samples on the first axis, "
                f"but found the lengths {sorted(lengths)}; use method='sosp_h'"
            )
        gradients = differentiate(
            value,
            [output for _, output in outputs],
            direction,
            retain_graph=retain_graph,
        )
        shape, device = (lengths.pop(), self._size), outputs[0][1].device
        result = torch.zeros(shape, dtype=torch.float64, device=device)
        for (name, output), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                self._add(result, name, output.detach(), gradient)
        return result

    def _add(self, result: Tensor, name: str, output: Tensor, gradient: Tensor) -> None:
        module = self._model.get_submodule(name)
        dtype = torch.promote_types(output.dtype, torch.float32)
        output, gradient = output.to(dtype), gradient.to(dtype)
        channel = output.dim() - 1 if isinstance(module, _CHANNELS_LAST) else 1
        rest = [dim for dim in range(1, output.dim()) if dim != channel]
        of_output, of_bias = output * gradient, gradient
        if rest:
            of_output = of_output.sum(rest, dtype=torch.float64)
            of_bias = of_bias.sum(rest, dtype=torch.float64)
        bias = getattr(module, "bias", None)
        of_output, of_bias = of_output.double(), of_bias.double()
        by_bias = of_bias * (0.0 if bias is None else bias.detach().double())
        by_weight = of_output - by_bias
        for one in self._slices[name]:
            values = by_bias if one.tensor == "bias" else by_weight
            result.index_add_(1, one.owners, values[:, one.where])


def _require_linear(
    name: str, module: nn.Module, slices: Sequence[ParameterSlices]
) -> None:
    unknown = [s.tensor for s in slices if s.tensor not in {"weight", "bias"}]
    channels = getattr(module, "out_channels", None)
    wrong = any(channels not in {None, len(s.structure_of)} for s in slices)
    wrong |= isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1
    wrong |= not isinstance(module, (*_CHANNELS_SECOND, *_CHANNELS_LAST))
    if unknown or wrong:
        raise ConfigurationError(
            f"method='sosp_i' does not support {name!r} ({type(module).__name__}"
            f"{', ' + unknown[0] if unknown else ''}), only Conv, Linear and norm layers "
            "whose structures are output channels; use method='sosp_h', or exclude the "
            "layer."
        )
