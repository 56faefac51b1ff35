"""Compute the gradients of micro-batches, in one pass if that gives the same numbers.

The host starts a micro-batch and checks it later, when the next one has been started, so that
a GPU does not wait for the host. All that is checked of a micro-batch is copied to the host
at once.
"""

from __future__ import annotations

__all__ = ["Derivative", "RowComputer", "micro_batch_size"]

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.base.host_copy import HostCopy
from lightning_woodfisher.data.batches import Batches, leaves_of
from lightning_woodfisher.data.isolation import (
    RandomStates,
    derive_seed,
    preserve_random_states,
    reseed,
)
from lightning_woodfisher.data.losses import differentiate, loss_with_graph
from lightning_woodfisher.fisher.config import Collection
from lightning_woodfisher.gradients.lockstep import Lockstep, SharedPass
from lightning_woodfisher.gradients.nonfinite import NonFiniteError, SkippedGradients
from lightning_woodfisher.gradients.per_sample import fill_rows, find_obstacle
from lightning_woodfisher.gradients.task import GradientTask

# Limits of a micro-batch: gradients, samples, and bytes of rows.
_MAX_GRADIENTS = 32
_MAX_SAMPLES = 128
_MAX_BYTES = 2**28
# Fewer micro-batches would be shared unevenly by the ranks, but tiny ones are no faster than
# a loop.
_MICRO_BATCHES_WANTED = 8
_FEWEST_GRADIENTS = 8
# One gradient in this number is also computed alone and compared with the one from the
# micro-batch. They must be equal except for rounding.
_GRADIENTS_PER_CHECK = 128
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 1e-1
# Measured on a CPU for dense and depthwise convolutions and for transformers, with 4 to 32
# samples in a mini-batch: if the layers have fewer outputs than this for one gradient, on
# average, a loop is slower, because its calls take longer than their work. Otherwise it is up
# to twice as fast, because no row needs operations of its own.
_OUTPUTS_FOR_LOOP = 2**16
# The rounding error of a batch does not shrink with the gradient of a well-fitted sample.
_SHARE_OF_LARGEST = 1e-2

# Maps a scalar loss and its number to one tensor (or None for zeros) for each parameter.
Derivative = Callable[[Tensor, int], Sequence[Tensor | None]]


@dataclass(frozen=True)
class _Single:
    """A gradient of the loop that has been started."""

    index: int
    row: Tensor
    batch: Any
    loss: Tensor


class RowComputer:
    """Computes the gradients of micro-batches, in one pass if possible.

    Args:
        task: the gradients.
        batches: the mini-batches.
        derivative: computes Hessian products, one row at a time, in place of gradients.
        skipped: records the gradients that are left out.

    Attributes:
        reason: why all gradients are computed one by one; ``""`` if they are not.
        losses: losses of the gradients computed here, by number.
        failure: the first error; nothing is computed afterwards.
    """

    def __init__(
        self,
        task: GradientTask,
        batches: Batches,
        derivative: Derivative | None,
        skipped: SkippedGradients,
    ) -> None:
        self._task = task
        self._batches = batches
        self._skipped = skipped
        self._derivative = derivative
        self.reason = ""
        self.losses: dict[int, float] = {}
        self.failure: Exception | None = None
        self._redone = 0
        self._lockstep = Lockstep(task.source.model, task.parameters)
        self._whole = _find_whole(task)

    def choose_micro_batch_size(self, collection: Collection, width: int) -> int:
        """Choose how many gradients form a micro-batch.

        Args:
            collection: the setting.
            width: D.

        Returns:
            The number.
        """
        self.reason = self._reason_for_loop(collection)
        if self.reason:
            return 1
        at_once = micro_batch_size(self._task.count, self._batches.size or 1, width)
        self.reason = "" if at_once > 1 else "one gradient fills a micro-batch"
        return at_once

    def _reason_for_loop(self, collection: Collection) -> str:
        """Return why gradients must be computed one by one, if known in advance, or ``""``."""
        model, batches = self._task.source.model, self._batches
        if self._derivative is not None:
            return "Hessian products"
        if collection == "loop":
            return "requested"
        if any(module.training for module in model.modules()):
            return "in training mode samples of a batch may influence each other"
        if not batches.regroupable or batches.size is None:
            return batches.why_not_regroupable
        return find_obstacle(model, self._task.parameters) or ""

    def agree_on_method(self, first: int, rows: Tensor) -> None:
        """Use the method of the first micro-batch, which rank 0 has, on all ranks.

        Args:
            first: number of the first gradient of this rank.
            rows: its micro-batch, which is computed again if needed.
        """
        was_together = not self.reason
        self.reason = self._task.comm.broadcast_text(self.reason)
        if self.reason and was_together:
            self.start(first, rows)()

    def start(self, first: int, rows: Tensor) -> Callable[[], object]:
        """Start a micro-batch.

        Args:
            first: number of the first gradient.
            rows: ``[n, D]``; receives gradients ``first`` .. ``first + n - 1``.

        Returns:
            A function that checks the rows, computes them again if needed, and stores an
            error in ``failure``. Call it before they are used.
        """
        # After a failure the other ranks still wait for rows from this one.
        if self.failure is not None or not len(rows):
            return rows.zero_
        if self.reason or len(rows) < 2:
            return self._start_loop(first, rows)
        return functools.partial(
            self._finish_together, first, rows, self._try(first, rows)
        )

    def describe(self) -> str:
        """Describe how gradients were computed.

        Returns:
            The same text on every rank.
        """
        counts = self._task.comm.gather_numbers([self._redone])
        redone = int(sum(row[0] for row in counts))
        if self.reason:
            return f"loop: {self.reason}"
        return "per-sample" + f", but {redone} micro-batches by loop" * (redone > 0)

    # ------------------------------------------------------------ one by one

    def _start_loop(self, first: int, rows: Tensor) -> Callable[[], object]:
        singles: list[_Single] = []
        try:
            for index, row in enumerate(rows, start=first):
                with self._task.seeded(index):
                    batch = self._batches.fetch(index)
                    scale = next(self._task.source.loss_scales())
                    loss = self._write(index, batch, row, scale)
                singles.append(_Single(index, row, batch, loss))
        except Exception as error:
            self.failure = error
            return rows.zero_
        losses = torch.stack([single.loss.double() for single in singles])
        numbers = HostCopy(torch.cat([losses, rows.sum(dim=1).double()]))
        return functools.partial(self._finish_loop, rows, singles, numbers)

    def _finish_loop(
        self, rows: Tensor, singles: Sequence[_Single], numbers: HostCopy
    ) -> None:
        if self.failure is not None:
            rows.zero_()
            return
        try:
            values, count = numbers.read(), len(singles)
            for single, loss, total in zip(
                singles, values[:count], values[count:], strict=True
            ):
                self._finish_single(single, loss, total)
        except Exception as error:
            self.failure = error
            rows.zero_()

    def _finish_single(self, single: _Single, loss: float, total: float) -> None:
        """Check a gradient; one that may be left out is recorded, and its row is zero."""
        problem: NonFiniteError | None = None
        try:
            if not math.isfinite(loss):
                raise self._nonfinite(
                    f"the loss of {self._name(single.index)} is {loss}"
                )
            # The sum is fast, but may overflow although all values are finite.
            if not math.isfinite(total) and not bool(single.row.isfinite().all()):
                self._repeat(single)
            self.losses[single.index] = loss
        except NonFiniteError as error:
            problem = error
            single.row.zero_()
        self._skipped.record(single.index, problem)

    def _repeat(self, single: _Single) -> None:
        """Compute a gradient that has overflowed under smaller loss scales."""
        task, row = self._task, single.row
        with task.seeded(single.index):
            for scale in [*task.source.loss_scales()][1:]:
                self._write(single.index, single.batch, row, scale)
                if bool(row.isfinite().all()):
                    return
        parts = torch.split(
            row, [len(task.positions[name]) for name in task.parameters]
        )
        bad = [
            name
            for name, part in zip(task.parameters, parts, strict=True)
            if not bool(part.isfinite().all())
        ]
        raise self._nonfinite(
            f"{self._name(single.index)} is not finite in {', '.join(bad)}"
        )

    def _name(self, index: int) -> str:
        return f"gradient {index} ({self._batches.describe(index)})"

    def _nonfinite(self, text: str) -> PruningError:
        # Other errors must stay errors if non-finite gradients are left out.
        return (NonFiniteError if self._skipped.allowed else PruningError)(text)

    def _write(self, index: int, batch: Any, row: Tensor, scale: float) -> Tensor:
        """Write one gradient into ``row``; return its loss."""
        task = self._task
        positions = [task.positions[name] for name in task.parameters]
        targets = torch.split(row, [len(where) for where in positions])
        loss = loss_with_graph(task.source, batch, index)
        if self._derivative is not None:
            gradients = self._derivative(loss * scale, index)
        else:
            gradients = differentiate(loss * scale, [*task.parameters.values()])
        for name, target, where, gradient in zip(
            task.parameters, targets, positions, gradients, strict=True
        ):
            if gradient is None:
                target.zero_()
                continue
            values = gradient.to_dense() if gradient.is_sparse else gradient
            values = values.detach().reshape(-1)
            # Converted before it is unscaled: float16 would underflow.
            target.copy_(values if name in self._whole else values[where])
            if scale != 1.0:
                target.div_(scale)
        return loss.detach()

    # ------------------------------------------------------------ at once

    def _try(
        self, first: int, rows: Tensor, scales: Sequence[float] | None = None
    ) -> str | Callable[[], str]:
        """Start all gradients in one pass.

        Returns:
            A function that returns the problem found, or ``""``; or the problem, if it is
            known already.
        """
        scales = [*self._task.source.loss_scales()] if scales is None else scales
        try:
            found, dtype = self._together(first, rows, scales[0])
            numbers = HostCopy(self._measure(found, first, rows, scales[0]))
        except PruningError as error:
            return str(error)
        except Exception as error:
            # An error that does not come from the single pass is raised again in the loop.
            return f"{type(error).__name__}: {error}"
        return functools.partial(
            self._find_problem, first, rows, scales[1:], numbers, _tolerance(dtype)
        )

    def _finish_together(
        self, first: int, rows: Tensor, attempt: str | Callable[[], str]
    ) -> None:
        if self.failure is not None:
            rows.zero_()
            return
        problem = attempt if isinstance(attempt, str) else attempt()
        if not problem:
            return
        if first == 0:
            self.reason = problem
        else:
            self._redone += 1
        self._start_loop(first, rows)()

    def _together(
        self, first: int, rows: Tensor, scale: float
    ) -> tuple[SharedPass, torch.dtype]:
        """Fill all rows; return the losses and the dtype of the backward pass."""
        task, count = self._task, len(rows)
        positions = {name: task.positions[name] for name in task.parameters}
        batches: list[Any] = []
        states: list[RandomStates] = []
        versions: list[int] = []

        def compute(number: int) -> Tensor:
            if number < len(batches):
                states[number].restore()
            else:
                reseed(derive_seed(task.seed, first + number))
                batches.append(self._batches.fetch(first + number))
                versions.extend(_versions(batches[-1]))
                states.append(RandomStates.capture())
            return task.source.loss(batches[number], first + number)

        with preserve_random_states():
            # Another one is compared in each micro-batch.
            compared = first // count % (count - 1)
            found = self._lockstep.run(count, compute, compared)
        if _versions(batches) != versions:
            raise PruningError("the loss changes its batch in place")
        if first == 0 and _is_loop_faster(found, count):
            raise PruningError("faster for mini-batches of this size")
        dtype = fill_rows(
            found.layers, found.losses, positions, self._whole, rows, scale
        )
        return found, dtype

    def _measure(
        self, found: SharedPass, first: int, rows: Tensor, scale: float
    ) -> Tensor:
        """Compute all that is checked of a micro-batch.

        Returns:
            float64 ``[2n + 3]``: losses; sums of rows; whether a loss called the network
            with other inputs when repeated; the largest error of outputs and of rows.
        """
        device = rows.device
        unequal = [flag.to(device).double() for flag in found.unequal]
        outputs = [_relative(error, norm) for error, norm in found.distances]
        checks = [
            torch.stack(values).amax() if values else rows.new_zeros(())
            for values in (unequal, outputs, self._compare_rows(first, rows, scale))
        ]
        losses = [loss.detach() for loss in found.losses]
        return torch.cat(
            [
                torch.stack(losses).double(),
                rows.sum(dim=1).double(),
                torch.stack([check.double() for check in checks]),
            ]
        )

    def _compare_rows(self, first: int, rows: Tensor, scale: float) -> list[Tensor]:
        """Compare some rows with gradients computed alone; return the relative errors."""
        if first % _GRADIENTS_PER_CHECK >= len(rows):
            return []
        largest = torch.linalg.vector_norm(rows, dim=1).amax()
        errors = []
        for place in (0, len(rows) - 1) if first == 0 else (0,):
            alone = torch.empty_like(rows[0])
            with self._task.seeded(first + place):
                batch = self._batches.fetch(first + place)
                self._write(first + place, batch, alone, scale)
            norm = torch.maximum(alone.norm(), _SHARE_OF_LARGEST * largest)
            errors.append(_relative((alone - rows[place]).norm(), norm))
        return errors

    def _find_problem(
        self,
        first: int,
        rows: Tensor,
        scales: Sequence[float],
        numbers: HostCopy,
        tolerance: float,
    ) -> str:
        """Check a micro-batch, and store its losses.

        Args:
            first: number of the first gradient.
            rows: the micro-batch.
            scales: smaller loss scales to try after an overflow.
            numbers: from :meth:`_measure`.
            tolerance: largest relative error.

        Returns:
            The problem, or ``""``.
        """
        values, count = numbers.read(), len(rows)
        losses, sums = values[:count], values[count : 2 * count]
        unequal, outputs, gradients = values[2 * count :]
        if not all(map(math.isfinite, losses)):
            return "a loss is not finite"
        if unequal:
            return "a loss that is computed twice calls the network with other inputs"
        if not outputs <= tolerance:
            return (
                f"the outputs of the network alone differ by {outputs:.1e} of their "
                "norm, so samples of a batch influence each other"
            )
        # The sum is fast, but may overflow although all values are finite.
        if not all(map(math.isfinite, sums)) and not bool(rows.isfinite().all()):
            if not scales:
                return "a gradient is not finite"
            again = self._try(first, rows, scales)
            return again if isinstance(again, str) else again()
        if not gradients <= tolerance:
            return (
                f"a gradient alone differs by {gradients:.1e} of its norm, so samples of a "
                "batch influence each other"
            )
        self.losses |= dict(enumerate(losses, start=first))
        return ""


def micro_batch_size(count: int, size: int, weights: int) -> int:
    """Choose how many gradients are computed in one pass.

    Args:
        count: N.
        size: m.
        weights: D.

    Returns:
        A number that does not depend on the ranks.
    """
    wanted = max(_FEWEST_GRADIENTS, count // _MICRO_BATCHES_WANTED)
    by_memory = _MAX_BYTES // (4 * max(1, weights))
    return max(1, min(wanted, count, _MAX_GRADIENTS, _MAX_SAMPLES // size, by_memory))


def _is_loop_faster(found: SharedPass, count: int) -> bool:
    """Return whether a pass for each gradient is faster than one for all ``count``.

    The rule reads sizes and no clock, so that it is the same in every run.
    """
    layers = found.layers
    outputs = sum(call.size for call in layers)
    on_cpu = bool(layers) and layers[0].inputs.device.type == "cpu"
    return on_cpu and outputs >= _OUTPUTS_FOR_LOOP * len(layers) * count


def _find_whole(task: GradientTask) -> set[str]:
    """Find the parameters whose weights are all active, in order."""
    # With a pattern, all weights of a tensor may come in another order.
    full = {
        name: where
        for name, parameter in task.parameters.items()
        if len(where := task.positions[name]) == parameter.numel() > 0
    }
    if not full:
        return set()
    in_order = torch.stack(
        [
            (where == torch.arange(len(where), device=where.device)).all()
            for where in full.values()
        ]
    )
    return {name for name, whole in zip(full, in_order.tolist(), strict=True) if whole}


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, _TOLERANCE_16_BIT)


def _relative(error: Tensor, norm: Tensor) -> Tensor:
    """Divide an error by a norm, both of which may be zero."""
    return error.double() / norm.double().clamp(min=torch.finfo(torch.float64).tiny)


def _versions(batch: Any) -> list[int]:
    """Count the changes in place of each tensor."""
    return [leaf._version for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]
