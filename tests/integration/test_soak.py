"""Nothing piles up in many steps and fits, and nothing is lost in fits that get signals."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from fits import Classifier, Reseed, images, pruning, seed_all, trainer
from killed_fits import strike_often
from rank_pool import RankPool
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader

from lightning_woodfisher import FisherConfig, PolynomialSchedule, StepConfig


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 4))


def batches() -> DataLoader[Any]:
    return DataLoader(images(24), batch_size=8)


def live_tensors() -> tuple[int, int]:
    """Number and bytes of the tensors that somebody still holds."""
    gc.collect()
    # Not isinstance: it would ask lazy proxies for their class.
    kinds = ((o, type(o)) for o in gc.get_objects())
    # Fakes of torch.compile, of an earlier test, have sizes that are symbols.
    found = [o for o, k in kinds if issubclass(k, Tensor) and k is not FakeTensor]
    return len(found), sum(t.numel() * t.element_size() for t in found)


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def hooks_of(module: pl.LightningModule) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    kinds += ("_backward_pre_hooks", "_state_dict_hooks")
    found = sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)
    return found + sum(len(p._backward_hooks or ()) for p in module.parameters())


class Watch(pl.Callback):
    """Looks at the rest of the process after some of the steps, each of which prunes."""

    def __init__(self, looks: set[int]) -> None:
        self.looks = looks
        self.tensors: list[tuple[int, int]] = []
        self.resident: list[int] = []
        self.others: list[tuple[int, int, int]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any
    ) -> None:
        if trainer.global_step not in self.looks:
            return
        self.tensors.append(live_tensors())
        self.resident.append(resident_bytes())
        hooks = [len(o._optimizer_step_post_hooks) for o in trainer.optimizers]
        self.others.append((hooks_of(module), sum(hooks), threading.active_count()))


def soak(steps: int) -> Watch:
    """Prune in every optimizer step but the first."""
    seed_all(3)
    # Lightning shares or copies the tensor of a logged value by the place in the epoch:
    # look at ends of epochs, of three batches each.
    watch = Watch({3 * (part * steps // 9) for part in (1, 2, 3)})
    pruner = pruning(
        schedule=PolynomialSchedule(start_step=1, end_step=steps, every_n_steps=1),
        fisher=FisherConfig(num_gradients=6, gradient_batch_size=2, block_size=16),
        target_sparsity=0.9,
        step=StepConfig(recompute_steps=2),
    )
    module = Classifier(build=perceptron)
    fitted = trainer(Reseed(), pruner, watch, max_epochs=-1, max_steps=steps + 1)
    fitted.fit(module, batches())
    # Towards the end a step may have no weight to prune.
    assert len(pruner.reports) >= 0.7 * steps
    assert pruner.masks.sparsity() == pytest.approx(0.9, abs=1e-3)
    return watch


def require_flat(watch: Watch) -> None:
    assert len(watch.tensors) == 3
    assert len(set(watch.tensors)) == 1, watch.tensors
    assert len(set(watch.others)) == 1, watch.others


def surroundings() -> tuple[Any, ...]:
    return (
        {t.name for t in threading.enumerate() if not t.daemon},
        dict(os.environ),
        dist.is_initialized(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )


@pytest.mark.slow
def test_twenty_steps_leave_nothing_behind() -> None:
    before = surroundings()
    require_flat(soak(20))
    after = surroundings()
    # pytest's own note of the test that runs.
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "fresh", [True, False], ids=["fresh callbacks", "one callback"]
)
def test_three_fits_in_a_row(fresh: bool) -> None:
    def build() -> Any:
        return pruning(schedule=PolynomialSchedule(0, 1))

    callback, before, seen = build(), surroundings(), []
    for _ in range(3):
        seed_all(4)
        pruner = build() if fresh else callback
        module = Classifier(build=perceptron)
        fitted = trainer(Reseed(), pruner, max_epochs=2)
        fitted.fit(module, batches())
        assert len(pruner.reports) == 2
        assert pruner._handles == []
        weights = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
        hooks = hooks_of(module)
        assert not any(o._optimizer_step_post_hooks for o in fitted.optimizers)
        del module, fitted, pruner
        seen.append((live_tensors(), hooks, weights.tolist()))
        del weights
    assert seen[0][2] == seen[1][2] == seen[2][2]
    assert seen[1][:2] == seen[2][:2]
    assert surroundings() == before


@pytest.mark.soak
def test_two_hundred_steps_in_flat_memory() -> None:
    watch = soak(200)
    require_flat(watch)
    # What is left to grow are the reports, a few kB for each step.
    assert watch.resident[2] - watch.resident[1] < 16e6


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_fits_that_get_signals_at_random_times_lose_nothing(
    ranks: RankPool, tmp_path: Path
) -> None:
    seed = int(os.environ.get("SOAK_SEED", "1"))
    print(f"SOAK_SEED={seed}", *strike_often(ranks, tmp_path, 50, seed), sep="\n")
