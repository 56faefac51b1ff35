"""Blocks and owners: complete, inside their tensor, the same for every world size."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.fisher.inverse import block_cost, full_column_chunk
from lightning_woodfisher.weights.partition import Partition, Unit, make_partition

MLPNET = [784 * 40, 40 * 20, 20 * 10]
RESNET20 = [432, *[2304] * 6, 4608, *[9216] * 5, 18432, *[36864] * 5, 640]
DIGITS = [144, 4608, 32768, 640]

segment_lists = st.lists(st.integers(0, 3000), min_size=1, max_size=6)
COSTS: dict[str, Callable[[int], float]] = {
    "size": float,
    "primal": block_cost(FisherConfig(300, block_size=50, engine="primal")),
    "dual": block_cost(FisherConfig(10, block_size=50, engine="dual")),
}


def blocks(partition: Partition) -> list[tuple[int, int, int]]:
    """Every block as (tensor, first weight, one past the last)."""
    return [
        (unit.segment, unit.start + i * unit.size, unit.start + (i + 1) * unit.size)
        for unit in partition.units
        for i in range(unit.count)
    ]


@given(
    segments=segment_lists,
    block_size=st.integers(1, 800),
    world_size=st.integers(1, 9),
    cost=st.sampled_from(sorted(COSTS)),
)
def test_blocks_cover_everything_once_and_never_leave_their_tensor(
    segments: list[int], block_size: int, world_size: int, cost: str
) -> None:
    partition = make_partition(segments, block_size, world_size, COSTS[cost])
    position = 0
    for segment, first, last in blocks(partition):
        assert first == position
        assert 1 <= last - first <= block_size
        begin = sum(segments[:segment])
        assert begin <= first
        assert last <= begin + segments[segment]
        position = last
    assert position == sum(segments) == partition.size


@given(segments=segment_lists, block_size=st.integers(1, 800))
def test_only_the_last_block_of_a_tensor_is_smaller(
    segments: list[int], block_size: int
) -> None:
    partition = make_partition(segments, block_size, 1)
    for index, weights in enumerate(segments):
        sizes = [last - first for s, first, last in blocks(partition) if s == index]
        assert len(sizes) == -(-weights // block_size)
        assert all(size == block_size for size in sizes[:-1])


@given(
    segments=segment_lists,
    block_size=st.integers(1, 800),
    world_size=st.integers(2, 9),
    cost=st.sampled_from(sorted(COSTS)),
)
def test_units_do_not_depend_on_the_world_size(
    segments: list[int], block_size: int, world_size: int, cost: str
) -> None:
    alone = make_partition(segments, block_size, 1, COSTS[cost])
    shared = make_partition(segments, block_size, world_size, COSTS[cost])
    assert shared.units == alone.units
    assert shared.segments == alone.segments


@given(
    segments=segment_lists, block_size=st.integers(1, 800), world_size=st.integers(1, 9)
)
def test_each_unit_has_one_owner_and_shards_are_consecutive(
    segments: list[int], block_size: int, world_size: int
) -> None:
    partition = make_partition(segments, block_size, world_size)
    owned = [partition.owned(rank) for rank in range(world_size)]
    assert tuple(itertools.chain.from_iterable(owned)) == partition.units
    shards = [partition.shard(rank) for rank in range(world_size)]
    assert partition.world_size == world_size
    assert shards[0].start == 0
    assert shards[-1].stop == partition.size
    assert all(a.stop == b.start for a, b in itertools.pairwise(shards))
    assert partition.shard_sizes() == [
        sum(unit.stop - unit.start for unit in units) for units in owned
    ]
    for units, shard in zip(owned, shards, strict=True):
        if units:
            assert (units[0].start, units[-1].stop) == (shard.start, shard.stop)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(
    ("segments", "num_gradients", "block_size"),
    [
        (RESNET20, 1000, 50),
        (RESNET20, 256, 256),
        (RESNET20, 100, 1000),
        (RESNET20, 1000, None),
        (MLPNET, 1000, 50),
        (MLPNET, 1000, 784),
        (MLPNET, 300, 784),
        (MLPNET, 1000, None),
        (DIGITS, 256, 256),
        (DIGITS, 256, None),
    ],
)
def test_work_and_memory_are_within_a_tenth_of_an_even_share(
    segments: list[int], num_gradients: int, block_size: int | None, world_size: int
) -> None:
    cost = block_cost(FisherConfig(num_gradients, block_size=block_size))
    primal = block_size is not None and num_gradients >= block_size
    partition = make_partition(
        segments, block_size or full_column_chunk(segments), world_size, cost
    )

    def share(of: Callable[[Unit], float], rank: int) -> float:
        everything = sum(of(unit) for unit in partition.units)
        return sum(of(unit) for unit in partition.owned(rank)) / everything

    for rank in range(world_size):
        work = share(lambda unit: cost(unit.size) * unit.count, rank)
        memory = share(lambda unit: unit.size ** (1 + primal) * unit.count, rank)
        assert work * world_size == pytest.approx(1.0, abs=0.1)
        assert memory * world_size == pytest.approx(1.0, abs=0.1)


def test_more_ranks_than_blocks_leaves_some_without_work() -> None:
    partition = make_partition([10, 3], 5, 7)
    sizes = partition.shard_sizes()
    assert len(sizes) == 7
    assert sum(sizes) == 13
    assert sorted(sizes)[-3:] == [3, 5, 5]
    assert sum(partition.owned(rank) == () for rank in range(7)) == 4


@pytest.mark.parametrize("segments", [[0], [0, 0, 0]])
def test_nothing_left_to_share(segments: list[int]) -> None:
    partition = make_partition(segments, 5, 3)
    assert partition.units == ()
    assert partition.shard_sizes() == [0, 0, 0]


def test_tensors_without_active_weights_are_passed_over() -> None:
    partition = make_partition([4, 0, 6], 4, 1)
    assert blocks(partition) == [(0, 0, 4), (2, 4, 8), (2, 8, 10)]


def test_small_model_by_hand() -> None:
    partition = make_partition([7, 4], 3, 2)
    assert blocks(partition) == [
        (0, 0, 3),
        (0, 3, 6),
        (0, 6, 7),
        (1, 7, 10),
        (1, 10, 11),
    ]
    assert partition.shard_sizes() == [6, 5]
    assert Unit(0, 3, 4, 2).stop == 11


def test_units_of_a_shard_belong_to_the_rank_that_holds_it() -> None:
    # Two tensors on three ranks; rank 1 holds nothing of either.
    cut = make_partition([7, 2, 0, 0, 3, 100], 3, 3)
    partition = cut.owned_by_segment([0, 0, 1, 1, 2, 2])
    assert partition.units == cut.units
    assert partition.shard_sizes() == [9, 0, 103]
    assert {unit.segment for unit in partition.owned(0)} == {0, 1}
    assert {unit.segment for unit in partition.owned(2)} == {4, 5}
    assert partition.shard(1) == slice(9, 9)


def test_units_are_small_but_not_many_for_a_large_network() -> None:
    small = make_partition([8_000_000], 256, 1)
    assert max(unit.size * unit.count for unit in small.units) <= 2**13
    large = make_partition([4_000_000_000, 100], 50, 1)
    assert len(large.units) <= 1100
