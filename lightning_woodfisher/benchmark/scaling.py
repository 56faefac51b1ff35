"""How a pruning step scales over gloo processes on this machine."""

from __future__ import annotations

__all__ = ["ScalingRow", "measure_scaling"]

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from lightning_woodfisher.benchmark.networks import (
    RandomImages,
    ResNet20,
    cross_entropy,
)
from lightning_woodfisher.benchmark.timing import Tick
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import (
    Communicator,
    Pending,
    destroy_group,
)
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.config import PruningConfig, StepConfig
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks

_SPARSITY = 0.5


@dataclass(frozen=True)
class ScalingRow:
    """A pruning step of ResNet-20 on R processes of one thread each.

    Attributes:
        world_size: R.
        num_gradients: N, of one sample each.
        block_size: B; None for the full Fisher.
        seconds: median over repetitions of the slowest rank.
        speedup: seconds of one process over ``seconds``.
        silent_seconds: the same without messages in the exchange of rows.
        exchange_share: part of ``seconds`` that goes away with them.
        state_bytes: of each rank's part of the Fisher.
    """

    world_size: int
    num_gradients: int
    block_size: int | None
    seconds: float
    speedup: float
    silent_seconds: float
    exchange_share: float
    state_bytes: tuple[int, ...]


class SilentCommunicator(Communicator):
    """Exchanges rows without a message: each rank repeats its own slice.

    The numbers are wrong and everything else is as it was, which is what it takes to
    see how much of a step the exchange costs.
    """

    def exchange(
        self,
        rows: Tensor | None,
        sizes: Sequence[int],
        counts: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Pending:
        """See :meth:`Communicator.exchange`.

        Args:
            rows: ``[n, D]``, or None when this rank has none this time.
            sizes: columns owned by each rank.
            counts: rows that each rank has.
            dtype: of the rows.

        Returns:
            ``[sum(counts), D_r]``, the first own row again and again.
        """
        start, own = sum(sizes[: self.rank]), sizes[self.rank]
        if rows is None:
            return Pending(
                torch.ones(sum(counts), own, dtype=dtype, device=self.device)
            )
        return Pending(rows[:1, start : start + own].repeat(sum(counts), 1))


def measure_scaling(
    most: int,
    num_gradients: int = 128,
    block_size: int | None = 288,
    *,
    repeats: int = 3,
    width: int = 16,
    image_size: int = 32,
    tick: Tick = lambda _: None,
) -> list[ScalingRow]:
    """Measure pruning steps on 1 to ``most`` processes.

    Args:
        most: largest world size.
        num_gradients: N, of one sample each.
        block_size: B.
        repeats: repetitions, after one that is not counted.
        width: of the network.
        image_size: of the images.
        tick: called after every world size.

    Returns:
        A row for each world size.
    """
    rows: list[ScalingRow] = []
    for world_size in range(1, most + 1):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
                _run_rank,
                (
                    world_size,
                    folder,
                    (num_gradients, block_size, repeats, width, image_size),
                ),
                nprocs=world_size,
            )
            loud, silent, state = torch.load(Path(folder, "result"), weights_only=True)
        seconds = statistics.median(loud)
        quiet = statistics.median(silent)
        rows.append(
            ScalingRow(
                world_size=world_size,
                num_gradients=num_gradients,
                block_size=block_size,
                seconds=seconds,
                speedup=(rows[0].seconds if rows else seconds) / seconds,
                silent_seconds=quiet,
                exchange_share=1.0 - quiet / seconds,
                state_bytes=tuple(state),
            )
        )
        tick(f"{world_size} processes")
    return rows


def _run_rank(
    rank: int,
    world_size: int,
    folder: str,
    settings: tuple[int, int | None, int, int, int],
) -> None:
    """Body of a process; rank 0 leaves the result in a file."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # All ranks are on this machine; its name may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        result = _measure_rank(*settings)
        if rank == 0:
            torch.save(result, Path(folder, "result"))
    finally:
        destroy_group()


def _measure_rank(
    num_gradients: int,
    block_size: int | None,
    repeats: int,
    width: int,
    image_size: int,
) -> tuple[list[float], list[float], list[int]]:
    """Seconds with and without messages, in turn, and bytes of every rank's state."""
    data = RandomImages(num_gradients, image_size)
    config = PruningConfig(
        fisher=FisherConfig(num_gradients, 1, block_size, damping=1e-5),
        step=StepConfig(measure_loss=False),
    )
    seconds: dict[bool, list[float]] = {False: [], True: []}
    state: list[int] = []
    for repeat in range(repeats + 1):
        for silent in (False, True):
            comm = SilentCommunicator() if silent else Communicator()
            torch.manual_seed(0)
            model = ResNet20(width).eval()
            pruner = Pruner(Masks(prunable_parameters(model)), config, comm)
            comm.raise_together()
            start = time.perf_counter()
            report = pruner.step(FunctionLoss(model, data, cross_entropy), _SPARSITY)
            spent = time.perf_counter() - start
            slowest = max(row[0] for row in comm.gather_numbers([spent]))
            if repeat:
                seconds[silent].append(slowest)
            if not silent:
                state = list(report.fisher_bytes)
    return seconds[False], seconds[True], state
