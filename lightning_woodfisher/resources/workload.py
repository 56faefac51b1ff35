"""What the cost of a part of a pruning step depends on, and the counts that follow."""

from __future__ import annotations

__all__ = ["Work"]

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_woodfisher.criteria import CRITERIA, make_criterion
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.fisher.config import (
    FisherConfig,
    first_order_batches,
    mini_batches_in_group,
)
from lightning_woodfisher.gradients.collect import micro_batch_size
from lightning_woodfisher.pruning.line_search import count_trials
from lightning_woodfisher.weights.partition import Partition
from lightning_woodfisher.weights.patterns import UNSTRUCTURED, Pattern

# Searches measure more losses than the fewest where the first guess is not the best.
_MORE_TRIALS = 4


@dataclass(frozen=True)
class Work:
    """What the cost of a part of a step depends on.

    Args:
        weights: weights of each selected tensor.
        active: those of them that are not pruned yet.
        fisher: how the Fisher is estimated.
        world_size: number of ranks, R.
        criterion: name of the criterion.
        update: how the kept weights make up for the removed ones.
        weight_bytes: bytes of a weight in the model.
        threads: units in work at once.
        sharded: every rank holds 1/R of every tensor (FSDP2) and all of it is its own.
        shapes: of each selected tensor; for K-FAC and patterns.
        line_search: the length of the update is measured.
        measure_loss: so is the loss after the step.
        local_model_points: points at which it is measured on the way.
        pattern: what goes together.

    Attributes:
        engine: what the criterion keeps of the curvature.
        held: weights of each selected tensor that a rank holds.
        exchanging: ranks among which gradients are exchanged.
        partition: the blocks and their owners, the same as in the step itself.
    """

    weights: Sequence[int]
    active: Sequence[int]
    fisher: FisherConfig
    world_size: int = 1
    criterion: str = "woodfisher"
    update: Update = "joint"
    weight_bytes: int = 4
    threads: int = 1
    sharded: bool = False
    shapes: Sequence[Sequence[int]] = ()
    line_search: bool = True
    measure_loss: bool = True
    local_model_points: int = 0
    pattern: Pattern = UNSTRUCTURED
    engine: str = field(init=False)
    held: Sequence[int] = field(init=False)
    exchanging: int = field(init=False)
    partition: Partition = field(init=False)

    def __post_init__(self) -> None:
        criterion = make_criterion(self.criterion, self.fisher, self.update)
        shards = self.world_size if self.sharded else 1
        exchanging = 1 if self.sharded else self.world_size
        object.__setattr__(self, "held", [-(-n // shards) for n in self.weights])
        object.__setattr__(self, "exchanging", exchanging)
        active = [-(-n // shards) for n in self.active]
        partition = criterion.layout(active, exchanging, self.group_sizes or None)
        object.__setattr__(self, "partition", partition)
        object.__setattr__(self, "engine", criterion.engine)

    @property
    def group_sizes(self) -> list[int]:
        """Weights of each tensor that go together; none without a pattern."""
        if not self.pattern.is_grouped:
            return []
        return [self.pattern.group_size(shape) for shape in self.shapes]

    @property
    def searches(self) -> bool:
        """Whether losses of trials are measured."""
        moves = self.update != "none" and CRITERIA[self.criterion].compensates
        return self.line_search and moves

    @property
    def first_order(self) -> bool:
        """Whether there is a direction of first order."""
        return CRITERIA[self.criterion].first_order

    @property
    def trials(self) -> tuple[int, int]:
        """Fewest and most losses that the search measures."""
        if not self.searches:
            return 0, 0
        fewest, most = count_trials(self.first_order)
        others = int(self.update == "joint")
        return fewest + others, most + others

    @property
    def usual_trials(self) -> int:
        """What is expected between the fewest and the most."""
        fewest, most = self.trials
        return min(most, fewest + _MORE_TRIALS)

    @property
    def uses_gradients(self) -> bool:
        """Whether there are backward passes."""
        return CRITERIA[self.criterion].needs != "nothing"

    @property
    def twice(self) -> bool:
        """Whether the loss is differentiated twice."""
        return CRITERIA[self.criterion].needs == "hessian rows"

    @property
    def computed_bytes(self) -> int:
        """Bytes of a number in a gradient row when it is computed."""
        return 8 if self.weight_bytes == 8 else 4

    @property
    def row_bytes(self) -> int:
        """Bytes of a number in a gradient row that is sent and kept."""
        return 2 if self.fisher.row_dtype == "bfloat16" else self.computed_bytes

    @property
    def gradients_at_once(self) -> int:
        """Rows that a rank computes in one pass, if the network allows more than one."""
        fisher = self.fisher
        return self._at_once(fisher.num_gradients, fisher.gradient_batch_size)

    @property
    def first_order_batches(self) -> tuple[int, int]:
        """Number and size of the mini-batches of the first-order sample."""
        return first_order_batches(self.fisher) if self.first_order else (0, 0)

    @property
    def first_order_at_once(self) -> int:
        """Rows of that sample that a rank computes in one pass."""
        count, size = self.first_order_batches
        return self._at_once(count, size) if count else 0

    def _at_once(self, count: int, size: int) -> int:
        if self.fisher.collection == "loop" or self.sharded or self.twice:
            return 1
        return micro_batch_size(count, size, self.partition.size)

    @property
    def gather_bytes(self) -> int:
        """Bytes of a weight when the ranks exchange the new ones."""
        return 8 if self.weight_bytes == 8 else 4

    @property
    def gradient_passes(self) -> int:
        """Gradients of mini-batches of m samples that a rank computes."""
        count = self.fisher.num_gradients if self.uses_gradients else 0
        return -(-count // self.exchanging)

    @property
    def first_order_passes(self) -> int:
        """Gradients of the first-order sample that a rank computes."""
        return -(-self.first_order_batches[0] // self.exchanging)

    @property
    def loss_samples(self) -> int:
        """Samples of which a rank computes losses alone, of map-style data."""
        fisher = self.fisher
        group = mini_batches_in_group(fisher)
        own = -(-(fisher.num_gradients // group) // self.exchanging)
        samples = own * group * fisher.gradient_batch_size
        trials = self.usual_trials
        # The last measurement of the search is that of the new weights.
        after = int(self.measure_loss and not trials)
        number = after + max(0, self.local_model_points - 2) + self._losses_before
        return (number + trials) * samples

    @property
    def _losses_before(self) -> int:
        """Whether the losses of the gradients are not those to compare with."""
        needs = CRITERIA[self.criterion].needs
        if not self.measure_loss:
            return 0
        if needs == "nothing":
            return 1
        if self.fisher.sample_labels:
            return 1
        # Factors are taken in the groups in which losses are measured.
        return int(needs != "factors" and mini_batches_in_group(self.fisher) > 1)
