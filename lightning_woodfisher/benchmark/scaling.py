"""Measure a pruning step on several gloo processes of this machine."""

from __future__ import annotations

__all__ = ["ScalingRow", "measure_scaling", "run_on_ranks"]

import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from lightning_woodfisher.benchmark.networks import cross_entropy
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
    """A pruning step on R processes of one thread each.

    Attributes:
        world_size: R.
        num_gradients: N, each of one sample.
        block_size: B.
        seconds: time of the slowest rank, median over repetitions.
        speedup: seconds of one process divided by ``seconds``.
        no_exchange_seconds: ``seconds`` without messages in the exchange of rows.
        exchange_share: share of ``seconds`` that the messages take.
        state_bytes: bytes of the Fisher on each rank.
    """

    world_size: int
    num_gradients: int
    block_size: int
    seconds: float
    speedup: float
    no_exchange_seconds: float
    exchange_share: float
    state_bytes: tuple[int, ...]


class SilentCommunicator(Communicator):
    """A communicator that sends no rows; each rank repeats its own instead.

    Results are wrong, but the work is the same, so that the difference in time is the cost
    of the exchange.
    """

    def exchange(
        self, rows: Tensor, sizes: Sequence[int], counts: Sequence[int]
    ) -> Pending:
        """Return rows of the right shape; see :meth:`Communicator.exchange`.

        Args:
            rows: ``[n, D]``; n may be 0.
            sizes: number of columns that each rank owns.
            counts: number of rows that each rank has.

        Returns:
            ``[sum(counts), D_r]``, copies of the first own row.
        """
        start, own = sum(sizes[: self.rank]), sizes[self.rank]
        if not len(rows):
            rows = rows.new_ones(1, sum(sizes))
        return Pending(rows[:1, start : start + own].repeat(sum(counts), 1))


def measure_scaling(
    max_world_size: int,
    model: nn.Module,
    data: TensorDataset,
    block_size: int = 288,
    *,
    repeats: int = 3,
) -> list[ScalingRow]:
    """Measure pruning steps on 1 to ``max_world_size`` processes.

    Args:
        max_world_size: largest number of processes.
        model: the network, on the CPU and in evaluation mode.
        data: N inputs and labels; each sample has one gradient.
        block_size: B.
        repeats: number of repetitions, after one that is not counted.

    Returns:
        A row for each world size.
    """
    fisher = FisherConfig(len(data), 1, block_size, damping=1e-5)
    rows: list[ScalingRow] = []
    for world_size in tqdm(range(1, max_world_size + 1), leave=False, disable=None):
        spent, silent, state = run_on_ranks(
            world_size, _measure_rank, model, data, fisher, repeats
        )
        seconds, no_exchange_seconds = (
            statistics.median(spent),
            statistics.median(silent),
        )
        rows.append(
            ScalingRow(
                world_size=world_size,
                num_gradients=len(data),
                block_size=block_size,
                seconds=seconds,
                speedup=(rows[0].seconds if rows else seconds) / seconds,
                no_exchange_seconds=no_exchange_seconds,
                exchange_share=1.0 - no_exchange_seconds / seconds,
                state_bytes=tuple(state),
            )
        )
    return rows


def run_on_ranks(
    world_size: int, work: Callable[..., Any], *arguments: Any, backend: str = "gloo"
) -> Any:
    """Run a function on several new processes of one thread each.

    Args:
        world_size: number of processes.
        work: function of a module, called on each process within a process group.
        arguments: its arguments.
        backend: of the process group.

    Returns:
        Its result on rank 0: numbers, tensors, and containers of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            _run_rank, (world_size, folder, backend, work, arguments), nprocs=world_size
        )
        return torch.load(Path(folder, "result"), weights_only=True)


def _run_rank(
    rank: int,
    world_size: int,
    folder: str,
    backend: str,
    work: Callable[..., Any],
    arguments: Sequence[Any],
) -> None:
    """Run one process; rank 0 writes the result to a file."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # All ranks are on this machine, whose name may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        result = work(*arguments)
        if rank == 0:
            torch.save(result, Path(folder, "result"))
    finally:
        destroy_group()


def _measure_rank(
    model: nn.Module, data: TensorDataset, fisher: FisherConfig, repeats: int
) -> tuple[list[float], list[float], list[int]]:
    """Return seconds with and without messages, in turn, and state bytes of each rank."""
    config = PruningConfig(fisher=fisher, step=StepConfig(measure_loss=False))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    state: list[int] = []
    for repeat in range(repeats + 1):
        for silent in (False, True):
            comm = SilentCommunicator() if silent else Communicator()
            pruned = copy.deepcopy(model)
            pruner = Pruner(Masks(prunable_parameters(pruned)), config, comm)
            comm.raise_together(None)
            start = time.perf_counter()
            report = pruner.step(FunctionLoss(pruned, data, cross_entropy), _SPARSITY)
            spent = time.perf_counter() - start
            slowest = max(row[0] for row in comm.gather_numbers([spent]))
            if repeat:
                seconds[silent].append(slowest)
            if not silent:
                state = list(report.fisher_bytes)
    return seconds[False], seconds[True], state
