"""Prune all layers of a network, one after another, in the order in which they run."""

from __future__ import annotations

__all__ = ["LayerResult", "LayerwiseStep", "StageSamples", "share_out"]

import operator
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.isolation import (
    RandomStates,
    derive_seed,
    eager,
    seeded,
)
from lightning_woodfisher.data.losses import LossSource, map_tensors, run_loss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.layerwise.allocation import (
    SPARSITIES,
    Share,
    error_curve,
    fill,
    propose,
)
from lightning_woodfisher.layerwise.config import LayerwiseConfig
from lightning_woodfisher.layerwise.interception import Interception
from lightning_woodfisher.layerwise.maps import (
    LinearCall,
    LinearMap,
    MapKey,
    WeightTable,
)
from lightning_woodfisher.layerwise.moments import (
    InputSums,
    MomentSums,
    Sample,
    require_finite,
)
from lightning_woodfisher.layerwise.padding import Side, TokenMasks
from lightning_woodfisher.layerwise.residuals import Trail
from lightning_woodfisher.layerwise.rows import RowShare
from lightning_woodfisher.layerwise.selection import MaskRule
from lightning_woodfisher.layerwise.solver import Curvature, LayerProblem, Moments
from lightning_woodfisher.layerwise.streams import NetworkRun, open_runs
from lightning_woodfisher.layerwise.survey import Surveyed, survey
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import Pattern

# Damping of a layer as a share of the mean diagonal, unless it is set.
_DAMPING_LINEAR = 0.1
_DAMPING_CONVOLUTION = 1e-3


@dataclass(frozen=True)
class LayerResult:
    """Result for one linear map.

    Attributes:
        name: name of the parameter.
        variance: mean square of the targets, summed over outputs.
        error_masked: error of the dense weights with the mask, a share of ``variance``.
        error: error of the new weights, a share of ``variance``.
        iterations: of the search for the mask.
        damping: λ.
        target: ``"residual sum"`` or ``"outputs"`` of the dense network.
    """

    name: str
    variance: float
    error_masked: float
    error: float
    iterations: int
    damping: float
    target: str


@dataclass(frozen=True)
class StageSamples:
    """Mini-batches of one stage.

    Attributes:
        batches: the mini-batches.
        count: their number.
        seed: seed of the samples.
    """

    batches: Batches
    count: int
    seed: int


class LayerwiseStep:
    """All stages of one pruning step.

    The targets of every stage are the outputs of the network at the start of the step.

    Args:
        source: source of losses, inside its session.
        masks: masks at the start of the step.
        config: the settings.
        updates: whether kept weights and biases change.
        pattern: weights that are pruned together.
        comm: the ranks.
    """

    def __init__(
        self,
        source: LossSource,
        masks: Masks,
        config: LayerwiseConfig,
        updates: bool,
        pattern: Pattern,
        comm: Communicator,
    ) -> None:
        self._source = source
        self._masks = masks
        self._config = config
        self._updates = updates
        self._pattern = pattern
        self._comm = comm
        self._table = WeightTable(masks.parameters)
        # Of all parameters: a bias elsewhere is computed in each call, and cannot change.
        self._storages = {
            p.untyped_storage().data_ptr() for p in source.model.parameters()
        }
        # The dense network: weights by name; biases and running means, once they have
        # changed, by address.
        self._dense = {n: p.detach().clone() for n, p in masks.parameters.items()}
        self._biases: dict[tuple[int, int], Tensor] = {}
        self._means: dict[int, Tensor] = {}

    def survey(self, samples: StageSamples, competing: bool) -> list[Surveyed]:
        """Find the maps of the network; see :func:`~.survey.survey`."""
        with eager():
            return survey(
                self._source,
                self._masks.parameters,
                samples.batches,
                samples.count,
                samples.seed,
                output_weights=self._config.output_weights,
                inputs=competing,
            )

    def allocate(
        self,
        maps: Sequence[Surveyed],
        groups: Sequence[int],
        totals: Sequence[int],
        caps: Sequence[int],
    ) -> list[int]:
        """Choose how many weights of each map are zero after a stage.

        Args:
            maps: the result of :meth:`survey`.
            groups: group of competing layers, by index of the parameter.
            totals: number of zeros of each group after the stage.
            caps: largest number of zeros, by index of the parameter.

        Returns:
            The numbers, in the order of the maps.
        """
        names = list(self._masks.parameters)
        shares = [self._share(each.map, caps) for each in maps]
        counts = [0] * len(maps)
        for group, total in enumerate(totals):
            members = [
                i
                for i, m in enumerate(maps)
                if groups[names.index(m.map.name)] == group
            ]
            if not members:
                continue
            own = [shares[i] for i in members]
            weights = [share.weights for share in own]
            sparsity = total / sum(weights)
            wanted = [sparsity] * len(members)
            if all(maps[i].inputs is not None for i in members) and len(members) > 1:
                curves = self._curves([maps[i] for i in members])
                wanted = propose(curves, weights, sparsity)
            for i, number in zip(members, fill(own, wanted, total), strict=True):
                counts[i] = number
        return counts

    def prune(
        self,
        maps: Sequence[Surveyed],
        counts: Sequence[int],
        samples: StageSamples,
        tick: Callable[[int], object],
    ) -> list[LayerResult]:
        """Prune all maps. Call on all ranks.

        Args:
            maps: the result of :meth:`survey`.
            counts: number of zeros of each map afterwards.
            samples: the mini-batches.
            tick: called with the number of finished maps.

        Returns:
            One result for each map.
        """
        comm, results = self._comm, []
        indices = list(range(comm.rank, samples.count, comm.world_size))
        # A rank without a mini-batch of its own runs the last one, which does not count.
        counted = bool(indices)
        indices = indices or [samples.count - 1]
        keys = {each.map.key for each in maps}
        dense: list[_Half] = []
        pruned: list[_Half] = []
        for index in indices:
            with seeded(derive_seed(samples.seed, index)):
                batch = samples.batches.fetch(index)
                states = RandomStates.capture()
            # Code of the user may change a batch in place.
            for halves, is_dense in ((dense, True), (pruned, False)):
                copy = map_tensors(Tensor.clone, batch)
                halves.append(_Half(self, keys, copy, index, states, is_dense))
        halves = [*dense, *pruned]
        shared = _SharedInputs()
        gone: dict[str, Tensor] = {}
        with eager(), open_runs([half.run for half in halves]):
            for half in halves:
                half.run.advance()
            for each, count in zip(maps, counts, strict=True):
                for half in halves:
                    half.require(each.map)
                result, removed = self._solve(
                    each, count, dense, pruned, samples, counted, shared
                )
                mask = gone.setdefault(
                    each.map.name,
                    torch.zeros_like(self._dense[each.map.name], dtype=torch.bool),
                )
                each.map.rows_of(mask).copy_(removed)
                results.append(result)
                for half in pruned:
                    half.run.advance()
                tick(1)
        self._masks.prune(gone)
        return results

    # ------------------------------------------------------------------ one map

    @torch.no_grad()
    def _solve(
        self,
        each: Surveyed,
        count: int,
        dense: Sequence[_Half],
        pruned: Sequence[_Half],
        samples: StageSamples,
        counted: bool,
        shared: _SharedInputs,
    ) -> tuple[LayerResult, Tensor]:
        linear, comm = each.map, self._comm
        # First, because it frees the inputs of the last map.
        known = shared.find(linear, [half.call.inputs for half in pruned])
        bias = pruned[0].call.bias
        if bias is not None and not self._is_parameter(bias):
            bias = None
        pairs, has_skip = [], False
        for one, other in zip(dense, pruned, strict=True):
            # One mini-batch after another, because to follow outputs takes much memory.
            one.run.advance()
            target, found = one.target(other)
            if bias is None and other.call.bias is not None:
                target = target - linear.spread(other.call.bias)
            x, target = other.tokens.drop(linear, other.side, other.call.inputs, target)
            pairs.append(Sample(x, target))
            has_skip |= found
            require_finite(linear, samples.batches, one.index, x, target)
        mean = dense[0].batchnorm
        # A mean that another map has shifted cannot be shifted again in this stage.
        if bias is not None or (mean is not None and mean.data_ptr() in shared.means):
            mean = None
        has_bias = bias is not None or mean is not None
        sums = MomentSums(linear, pairs if counted else [], samples.count, comm)
        moments, shared.known = sums.add_up(has_bias, known)
        # The targets are not needed any more.
        del sums, pairs, target
        curvature = shared.curvature(moments, has_bias, self._damping(linear))
        old = linear.to_matrix(linear.rows_of(self._dense[linear.name])).double()
        parameter = self._masks.parameters[linear.name]
        double = parameter.dtype == torch.float64
        groups, outputs, _ = linear.sides
        rows = RowShare(groups, outputs, comm.device, comm)
        problem = LayerProblem(
            curvature,
            moments.products,
            old,
            each.output_weights,
            rows,
            torch.float64 if double else torch.float32,
        )
        rule = self._rule(linear, count)
        removed, iterations = problem.find_mask(rule, self._config.admm_iterations)
        masked = rows.own(old).masked_fill(rows.own(removed), 0.0)
        if self._updates:
            own = problem.solve(rows.own(removed))
        else:
            kept = linear.to_matrix(linear.rows_of(parameter.detach())).double()
            own = rows.own(kept).masked_fill(rows.own(removed), 0.0)
        errors = torch.stack([moments.errors(w, rows) for w in (masked, own)], -1)
        before, after = rows.gather(errors).sum((0, 1)).tolist()
        new = rows.gather(own)
        self._write(linear, new)
        if self._updates and has_bias:
            self._write_bias(moments.bias(new).flatten(), bias, mean, shared)
        variance = float(moments.targets.sum())
        unit = variance or 1.0
        result = LayerResult(
            linear.name,
            variance,
            before / unit,
            after / unit,
            iterations,
            float(curvature.damping),
            "residual sum" if has_skip else "outputs",
        )
        return result, linear.from_matrix(removed)

    def _is_parameter(self, bias: Tensor) -> bool:
        storage = bias.untyped_storage().data_ptr()
        return bias.dim() == 1 and storage in self._storages

    def _write(self, linear: LinearMap, new: Tensor) -> None:
        rows = linear.rows_of(self._masks.parameters[linear.name].detach())
        values = linear.from_matrix(new).to(rows.dtype)
        if not bool(values.isfinite().all()):
            raise PruningError(
                f"the new weights of {linear.name} are not finite; raise "
                "layerwise.relative_damping"
            )
        rows.copy_(values)

    def _write_bias(
        self,
        new: Tensor,
        bias: Tensor | None,
        mean: Tensor | None,
        shared: _SharedInputs,
    ) -> None:
        if bias is not None:
            self._biases.setdefault(_address(bias), bias.detach().clone())
            bias.detach().copy_(new)
        elif mean is not None:
            # BatchNorm subtracts its mean, and so adds what it is lowered by.
            self._means.setdefault(mean.data_ptr(), mean.clone())
            dense = self._means[mean.data_ptr()]
            mean.copy_(dense.double() - new)
            shared.means.add(mean.data_ptr())

    def _damping(self, linear: LinearMap) -> float:
        if self._config.relative_damping is not None:
            return self._config.relative_damping
        return _DAMPING_CONVOLUTION if linear.is_convolution else _DAMPING_LINEAR

    # ------------------------------------------------------------------ selection

    def _places(self, linear: LinearMap) -> tuple[Tensor, Tensor]:
        """Return the groups of a map by position in its matrix, and its pruned weights."""
        masks = self._masks
        gone = linear.rows_of(~masks.kept(linear.name))
        pruned = linear.to_matrix(gone).flatten()
        numbers = torch.arange(pruned.numel(), device=pruned.device)
        if not self._pattern.is_grouped:
            return numbers.unsqueeze(1), pruned
        order = linear.to_matrix(numbers.view(linear.shape)).flatten()
        place = torch.empty_like(order)
        place[order] = numbers
        weights = place.view(linear.shape)
        return self._pattern.grouped(masks.outputs_first(linear.name, weights)), pruned

    def _rule(self, linear: LinearMap, count: int) -> MaskRule:
        places, pruned = self._places(linear)
        leaving = places.shape[1] - self._pattern.kept
        return MaskRule(places, self._pattern, pruned, count // leaving)

    def _share(self, linear: LinearMap, caps: Sequence[int]) -> Share:
        places, pruned = self._places(linear)
        number = pruned.numel()
        leaving = places.shape[1] - self._pattern.kept
        names = list(self._masks.parameters)
        parameter = self._masks.parameters[linear.name]
        cap = caps[names.index(linear.name)] * number // parameter.numel()
        most = min(len(places) * leaving, cap - cap % leaving)
        least = int(pruned.sum())
        return Share(number, leaving, least, max(least, most))

    def _curves(self, maps: Sequence[Surveyed]) -> list[list[float]]:
        """Compute the error curve of each map on one rank."""
        comm = self._comm
        owners = share_out([each.map.sides for each in maps], comm.world_size)
        own = [
            self._curve(each) if owner == comm.rank else [0.0] * len(SPARSITIES)
            for each, owner in zip(maps, owners, strict=True)
        ]
        rows = comm.gather_numbers([error for curve in own for error in curve])
        return [
            rows[owner][i * len(SPARSITIES) : (i + 1) * len(SPARSITIES)]
            for i, owner in enumerate(owners)
        ]

    def _curve(self, each: Surveyed) -> list[float]:
        """Compute the errors of a map alone, in units of the loss."""
        linear, inputs = each.map, each.inputs
        if inputs is None:
            return []
        places, pruned = self._places(linear)
        curvature = Curvature(inputs, self._damping(linear))
        dense = linear.to_matrix(linear.rows_of(self._dense[linear.name])).double()
        products = dense @ inputs
        groups, outputs, _ = linear.sides
        rows = RowShare(groups, outputs, inputs.device)
        problem = LayerProblem(curvature, products, dense, each.output_weights, rows)

        def choose(sparsity: float, scores: Tensor) -> Tensor:
            number = max(int(pruned.sum()), round(sparsity * pruned.numel()))
            leaving = places.shape[1] - self._pattern.kept
            return MaskRule(places, self._pattern, pruned, number // leaving)(scores)

        def errors(weights: Tensor) -> float:
            change = weights - dense
            quadratic = ((change @ inputs) * change).sum(-1)
            return float((quadratic * each.output_weights).sum().clamp(min=0.0))

        return error_curve(problem, errors, choose)


class _Half:
    """The dense or the pruned network on one mini-batch."""

    def __init__(
        self,
        step: LayerwiseStep,
        keys: Set[MapKey],
        batch: object,
        index: int,
        states: RandomStates,
        is_dense: bool,
    ) -> None:
        self.index = index
        self.tokens = TokenMasks(batch)
        # Of the inputs of the last call.
        self.side: Side | None = None
        self.call: LinearCall = None  # type: ignore[assignment]
        #: Running mean of the BatchNorm layer after the last map of :meth:`target`.
        self.batchnorm: Tensor | None = None
        self._step = step
        self._trail: Trail | None = None
        self._output: Tensor | None = None
        self._left = set(keys)
        self._is_dense = is_dense
        means = step._means if is_dense else None
        self._interception = Interception(
            step._table, self._visit, means, self.tokens.sources()
        )
        self._pause: Callable[[], None] = lambda: None

        def work(pause: Callable[[], None]) -> None:
            self._pause = pause
            with self._interception:
                run_loss(step._source, batch, index)

        device = next(step._source.model.parameters()).device
        self.run = NetworkRun(work, states, device)

    def _visit(self, call: LinearCall) -> Tensor:
        is_new = call.map.key in self._left
        if is_new:
            self._left.remove(call.map.key)
            self.call = call
            self.side = self._interception.side(call.inputs)
            self._pause()
        # Autocast keeps copies of parameters, and a bias is about to change.
        bias = None if call.bias is None else call.bias.detach()
        if not self._is_dense:
            parameter = self._step._masks.parameters[call.map.name].detach()
            return call.run(call.map.rows_of(parameter), bias)
        if bias is not None:
            bias = self._step._biases.get(_address(bias), bias)
        weight = call.map.rows_of(self._step._dense[call.map.name])
        output = call.run(weight, bias)
        if is_new:
            # Not the output itself, which later functions may overwrite.
            self._output = output.clone()
            self._trail = self._interception.trail = Trail(output)
        return output

    def require(self, linear: LinearMap) -> None:
        """Check that this run has paused before a map."""
        found = None if self.call is None or self.run.is_done else self.call.map
        if found == linear:
            return
        place = "the end" if found is None else found.name
        if found is not None and found.key == linear.key:
            place += " with another stride, padding or dilation"
        raise PruningError(
            f"mini-batch {self.index} has reached {place} where the first ones reached "
            f"{linear.name}; criterion='layerwise' needs the same layers in the same "
            "order for every mini-batch"
        )

    def target(self, pruned: _Half) -> tuple[Tensor, bool]:
        """Return the targets of the last map of a dense run, and whether it has a skip."""
        output, trail = self._output, self._trail
        if output is None or trail is None:
            raise PruningError("no map has run")
        found = False
        for skip in trail.skips:
            other = pruned._interception.named(skip.key)
            if other is not None and other.shape == skip.dense.shape:
                output = output + skip.difference(other, output.shape)
                found = True
        self.batchnorm = trail.batchnorm
        self._output = self._trail = self._interception.trail = None
        return output, found


class _SharedInputs:
    """Sums and curvature of the inputs of the last map, which the next one may share."""

    def __init__(self) -> None:
        self.known: InputSums | None = None
        self._inputs: list[Tensor] = []
        self._versions: list[int] = []
        self._geometry: tuple[object, ...] = ()
        self._curvatures: dict[tuple[bool, float], Curvature] = {}
        #: Addresses of the running means that have been shifted in this stage.
        self.means: set[int] = set()

    def find(self, linear: LinearMap, inputs: list[Tensor]) -> InputSums | None:
        """Return the sums if a map has the inputs of the last one."""
        geometry = (
            linear.shape[2:],
            linear.groups,
            linear.stride,
            linear.padding,
            linear.dilation,
            linear.transposed,
        )
        versions = [x._version for x in inputs]
        same = len(inputs) == len(self._inputs) and all(
            map(operator.is_, inputs, self._inputs)
        )
        if not (same and versions == self._versions and geometry == self._geometry):
            self._curvatures, self.known = {}, None
        self._inputs, self._versions, self._geometry = inputs, versions, geometry
        return self.known

    def curvature(self, moments: Moments, centered: bool, damping: float) -> Curvature:
        key = (centered, damping)
        if key not in self._curvatures:
            self._curvatures[key] = Curvature(moments.inputs, damping)
        return self._curvatures[key]


def share_out(sides: Sequence[tuple[int, int, int]], ranks: int) -> list[int]:
    """Choose the rank that computes the error curve of each map.

    Args:
        sides: g, o and d of each map.
        ranks: number of ranks.

    Returns:
        The rank of each map: the most expensive first, to the rank with the least work.
    """
    work, owners = [0] * ranks, [0] * len(sides)
    costs = [g * (o + d) * d**2 for g, o, d in sides]
    for index in sorted(range(len(sides)), key=lambda i: -costs[i]):
        owners[index] = work.index(min(work))
        work[owners[index]] += costs[index]
    return owners


def _address(bias: Tensor) -> tuple[int, int]:
    return bias.data_ptr(), bias.numel()
