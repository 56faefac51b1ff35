"""Describe the workload of one stage of a pruning step, and derive its counts."""

from __future__ import annotations

__all__ = ["Workload"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_woodfisher.criteria import CRITERIA, CriterionBase
from lightning_woodfisher.fisher.config import (
    FisherConfig,
    first_order_batches,
    mini_batches_in_group,
)
from lightning_woodfisher.gradients.row_computer import micro_batch_size
from lightning_woodfisher.layerwise.survey import SURVEYED_BATCHES
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.line_search import (
    FINALISTS,
    count_trials,
    screening_batches,
)
from lightning_woodfisher.weights.partition import Partition
from lightning_woodfisher.weights.patterns import Pattern, parse_pattern

# A usual line search measures this many losses more than the fewest possible.
_ADDITIONAL_TRIALS = 4


@dataclass(frozen=True)
class Workload:
    """Everything that determines the cost of one stage of a pruning step.

    Attributes:
        config: settings of the step.
        shapes: shape of each selected tensor, outputs first.
        active: number of weights of each tensor that are not pruned yet.
        world_size: number of ranks, R.
        weight_bytes: bytes of one weight in the model.
        threads: number of units that a rank processes at the same time.
        sharded: whether every rank holds 1/R of every tensor (FSDP2) and prunes only
            its own part.
        positions: tokens in a sample, for the activations of ``criterion="layerwise"``.
    """

    config: PruningConfig
    shapes: Sequence[Sequence[int]]
    active: Sequence[int]
    world_size: int = 1
    weight_bytes: int = 4
    threads: int = 1
    sharded: bool = False
    positions: int = 0

    @property
    def fisher(self) -> FisherConfig:
        """Settings of the Fisher."""
        return self.config.fisher

    @cached_property
    def criterion(self) -> CriterionBase:
        """The criterion of the step."""
        criterion = CRITERIA[self.config.criterion]
        return criterion(self.fisher, self.config.update)

    @property
    def engine(self) -> str:
        """What the criterion stores of the curvature."""
        return self.criterion.engine

    @property
    def has_blocks(self) -> bool:
        """Whether the criterion uses a block Fisher."""
        return self.engine in {"primal", "dual", "full"}

    @property
    def pattern(self) -> Pattern:
        """The sparsity pattern."""
        return parse_pattern(self.config.selection.pattern)

    @property
    def exchange_ranks(self) -> int:
        """Number of ranks that exchange gradients."""
        return 1 if self.sharded else self.world_size

    @cached_property
    def local_weights(self) -> list[int]:
        """Number of weights of each selected tensor that a rank holds."""
        return self._per_rank([math.prod(shape) for shape in self.shapes])

    @cached_property
    def group_sizes(self) -> list[int]:
        """Group size of each tensor; empty for an unstructured pattern."""
        if not self.pattern.is_grouped:
            return []
        return [self.pattern.group_size(shape) for shape in self.shapes]

    @cached_property
    def partition(self) -> Partition:
        """Blocks and their owners, the same as in the step itself."""
        return self.criterion.layout(
            self._per_rank(self.active), self.exchange_ranks, self.group_sizes or None
        )

    def _per_rank(self, counts: Sequence[int]) -> list[int]:
        shards = self.world_size if self.sharded else 1
        return [-(-count // shards) for count in counts]

    @property
    def trials(self) -> tuple[int, int]:
        """Fewest and most losses that the line search measures."""
        if not self.config.searches:
            return 0, 0
        fewest, most = count_trials(self.criterion.first_order)
        others = int(self.config.update == "joint")
        return fewest + others, most + others

    @property
    def expected_trials(self) -> int:
        """Usual number of losses that the line search measures."""
        fewest, most = self.trials
        return min(most, fewest + _ADDITIONAL_TRIALS)

    @property
    def uses_gradients(self) -> bool:
        """Whether the criterion needs backward passes on all samples."""
        return self.criterion.needs not in {"nothing", "layer inputs"}

    @property
    def uses_hessian(self) -> bool:
        """Whether the loss is differentiated twice."""
        return self.criterion.needs == "hessian rows"

    @property
    def value_bytes(self) -> int:
        """Bytes of one number in new gradient rows and in exchanged weights."""
        return 8 if self.weight_bytes == 8 else 4

    @property
    def row_bytes(self) -> int:
        """Bytes of one number in gradient rows that are sent and stored."""
        return 2 if self.fisher.row_dtype == "bfloat16" else self.value_bytes

    @property
    def mini_batches(self) -> int:
        """Number of mini-batches in which losses and layers are evaluated."""
        return self.fisher.num_gradients // mini_batches_in_group(self.fisher)

    @property
    def samples_at_once(self) -> int:
        """Samples in each of them."""
        return self.fisher.gradient_batch_size * mini_batches_in_group(self.fisher)

    @property
    def layers_compete(self) -> bool:
        """Whether ``criterion="layerwise"`` chooses the sparsity of each layer."""
        selection = self.config.selection
        competing = self.pattern.sparsity is None and len(self.shapes) > 1
        return competing and selection.scope == "global"

    @property
    def first_order_batches(self) -> tuple[int, int]:
        """Number and size of the mini-batches of the first-order sample."""
        if not self.criterion.first_order:
            return 0, 0
        return first_order_batches(self.fisher)

    def rows_at_once(self, count: int, size: int) -> int:
        """Count the rows that a rank computes in one pass, if the network allows it.

        Args:
            count: number of gradients, at least one.
            size: samples of each gradient.

        Returns:
            Number of rows.
        """
        if self.fisher.collection == "loop" or self.sharded or self.uses_hessian:
            return 1
        return micro_batch_size(count, size, self.partition.size)

    @property
    def gradient_passes(self) -> int:
        """Number of mini-batches of m samples whose gradients a rank computes."""
        if self.engine == "layers":
            # Every rank computes the weights of all outputs.
            surveyed = min(SURVEYED_BATCHES, self.mini_batches)
            group = mini_batches_in_group(self.fisher)
            return surveyed * group * self.config.layerwise.output_weights
        count = self.fisher.num_gradients if self.uses_gradients else 0
        return -(-count // self.exchange_ranks)

    @property
    def first_order_passes(self) -> int:
        """The same for the mini-batches of the first-order sample."""
        return -(-self.first_order_batches[0] // self.exchange_ranks)

    @property
    def _groups_measured(self) -> tuple[int, int, int]:
        """Mini-batches in a group, groups whose loss is measured, and for all trials."""
        step, fisher = self.config.step, self.fisher
        group = mini_batches_in_group(fisher)
        size = fisher.gradient_batch_size * group
        groups = min(fisher.num_gradients // group, max(1, step.search_samples // size))
        return group, groups, min(groups, screening_batches(size))

    @property
    def finalists(self) -> int:
        """Number of trials that are measured on more samples than the others."""
        _, groups, first = self._groups_measured
        return min(self.expected_trials, FINALISTS) * (groups > first)

    @property
    def loss_passes(self) -> int:
        """Mini-batches whose loss a rank computes without a gradient (map-style data)."""
        step, fisher = self.config.step, self.fisher
        # How often all samples are measured, and how often only the first ones.
        trials, passes = self.expected_trials, max(0, step.local_model_points - 2)
        group, groups, first = self._groups_measured
        checked = 0
        if step.measure_loss:
            # The last measurement of the line search is the loss of the new weights.
            passes += not trials
            # The loss before the step is known from the gradients if these are computed
            # with the labels of the data; one group shows whether the loss is a mean.
            known = self.uses_gradients and not fisher.sample_labels
            passes += not known
            if known and group > 1 and self.criterion.needs != "factors":
                checked = group
        times = (passes, groups), (trials, first), (self.finalists, groups - first)
        ranks = self.exchange_ranks
        passes = group * sum(often * -(-count // ranks) for often, count in times)
        if self.engine == "layers":
            # The dense and the pruned network.
            passes += 2 * -(-self.mini_batches // self.exchange_ranks) * group
        return passes + checked
