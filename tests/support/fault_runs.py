"""Small fits that fail in the middle of a pruning step and are then resumed.

A fault replaces a function of the package, the module or the data. It is active only while
the callback runs the second of three planned steps (or the first).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from fits import (
    Classifier,
    MemoryLogger,
    Reseed,
    differences,
    final_state,
    images,
    pruning,
    seed_all,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from structured_fits import ResidualNet, structured
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_woodfisher import (
    PolynomialSchedule,
    SOSPPruningCallback,
    StepConfig,
    WoodFisherPruningCallback,
)
from lightning_woodfisher.callbacks.training_step import TrainingStepLoss
from lightning_woodfisher.criteria.woodfisher import WoodFisher
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.selector import Selector
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.masks import Masks

EPOCHS = 3
_LASTING = {"error", "out of memory"}
# Zeros after each of the planned steps: a cubic ramp to 0.75 of 64 * 10 + 10 * 4.
PLANNED = (359, 491, 510)
# Removed channels after each of the steps: the same ramp to half of 14.
PLANNED_CHANNELS = (5, 7, 7)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 4))


@dataclass(frozen=True)
class Fault:
    """A fault: its kind, its place and its step.

    Attributes:
        place: a key of ``PLACES``, or a method of :class:`Images`.
        kind: one of the kinds in :meth:`strike`.
        rank: the rank that has the fault.
        epoch: epoch of the pruning step.
    """

    place: str
    kind: str
    rank: int = 0
    epoch: int = 1

    def strike(self) -> None:
        """Raise the error, send the signal, or wait."""
        if self.kind == "error":
            raise LookupError("a book is missing")
        if self.kind == "out of memory":
            raise torch.OutOfMemoryError("no room left")
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "wait":
            # Until the other rank has ended; the limit is a safety net.
            wait_for(Path("the other rank has ended"))
            raise LookupError("a book is missing")
        if self.kind == "deviate":
            return
        number = {"terminate": signal.SIGTERM, "kill": signal.SIGKILL}[self.kind]
        os.kill(os.getpid(), number)


def wait_for(path: Path, seconds: float = 60.0) -> None:
    """Wait until a file exists."""
    import time

    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)


# The function that fails, and in which of its calls in a step.
PLACES: dict[str, tuple[Any, str, int]] = {
    "training_step": (Classifier, "training_step", 2),
    "loss": (TrainingStepLoss, "loss", 2),
    "exchange": (Communicator, "exchange", 1),
    "send": (dist, "all_to_all_single", 1),
    "solve": (WoodFisher, "score", 1),
    "update": (WoodFisher, "compensate", 1),
    "select": (Selector, "choose", 1),
    "write": (ActiveWeights, "_overwrite", 1),
    "masks": (Masks, "prune", 1),
    "verify": (Masks, "verify", 1),
    # No error is raised here: the step must detect the difference.
    "one weight": (Masks, "verify", 1),
    "one mask": (Masks, "verify", 1),
    "optimizer": (Masks, "apply_to_optimizers", 1),
    "log": (MemoryLogger, "log_metrics", 1),
    "report file": (Path, "write_text", 1),
}


class Images(Dataset[Any]):
    """Three batches; reading a sample or collating a batch can fail."""

    def __init__(self) -> None:
        self.data = images(24)
        self.strike: Callable[[str], None] = lambda place: None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.strike("dataset")
        return self.data[index]

    def collate(self, samples: Any) -> Any:
        self.strike("collate")
        return default_collate(samples)


@contextlib.contextmanager
def struck(fault: Fault | None, data: Images) -> Iterator[None]:
    """Install a fault on its rank while the block runs."""
    if fault is None or fault.rank != int(os.environ.get("RANK", "0")):
        yield
        return
    inside, calls = [False], [0]
    prune_if_due = WoodFisherPruningCallback._prune_if_due

    def step(self: Any, trainer: Any, *arguments: Any) -> Any:
        inside[0] = trainer.current_epoch == fault.epoch
        try:
            return prune_if_due(self, trainer, *arguments)
        finally:
            inside[0] = False

    def strike(place: str, when: int = 3) -> None:
        if not inside[0] or place != fault.place:
            return
        calls[0] += 1
        # A signal is sent once; an error is raised again in every later call.
        if calls[0] == when or (calls[0] > when and fault.kind in _LASTING):
            fault.strike()

    with contextlib.ExitStack() as stack:
        stack.callback(
            setattr, WoodFisherPruningCallback, "_prune_if_due", prune_if_due
        )
        WoodFisherPruningCallback._prune_if_due = step  # type: ignore[method-assign]
        data.strike = strike
        if fault.place in PLACES:
            owner, name, when = PLACES[fault.place]
            original = getattr(owner, name)

            def stand_in(*arguments: Any, **options: Any) -> Any:
                if fault.place == "write" and inside[0]:
                    # Some weights are already written when it fails.
                    active, parts = arguments
                    original(active, dict(list(parts.items())[:1]))
                if fault.kind == "deviate" and inside[0]:
                    deviate(arguments[0], fault.place)
                strike(fault.place, when)
                return original(*arguments, **options)

            stack.callback(setattr, owner, name, original)
            setattr(owner, name, stand_in)
        yield


class KeepWhatIsLeft(pl.Callback):
    """Save a checkpoint of the state after an exception."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


@torch.no_grad()
def deviate(masks: Masks, place: str) -> None:
    """Change one bit of a weight, or one element of a mask, on this rank only."""
    weight = masks.local("net.3.weight")
    kept = masks.kept("net.3.weight")
    first = tuple(kept.nonzero()[0].tolist())
    if place == "one weight":
        weight[first] = torch.nextafter(weight[first], weight.new_tensor(9.0))
    else:
        gone = torch.zeros_like(kept)
        gone[first] = True
        masks.prune({"net.3.weight": gone})
        masks.apply()


@dataclass
class Run:
    """A fit that has ended, with or without an error."""

    trainer: pl.Trainer
    module: Classifier
    pruner: Any
    logger: MemoryLogger
    error: BaseException | None

    @property
    def result(self) -> dict[str, Any]:
        """State, masks and reports at the end, without the seconds."""
        reports = [{**r.to_dict(), "seconds": {}} for r in self.pruner.reports]
        # A fit without anything left to train has no masks but those of its checkpoint.
        masks = self.pruner.state_dict()["masks"]
        return {"state": final_state(self.trainer), "masks": masks, "reports": reports}


def run(
    folder: Path,
    fault: Fault | None = None,
    resume: str = "last",
    keep_what_is_left: bool = True,
    channels: bool = False,
    **options: Any,
) -> Run:
    """Train, starting from the last checkpoint in the folder if there is one."""
    seed_all(1)
    data, logger = Images(), MemoryLogger()
    module = Classifier(build=ResidualNet if channels else perceptron)
    settings = {
        "schedule": PolynomialSchedule(0, EPOCHS - 1),
        "report_path": str(folder / "reports" / "pruning.json"),
    }
    if channels:
        pruner = structured(SOSPPruningCallback, **settings)
    else:
        pruner = pruning(**settings, step=StepConfig(line_search=False))
    saving = ModelCheckpoint(
        folder, "{epoch}", save_top_k=-1, save_last=True, save_on_train_epoch_end=True
    )
    fitted = trainer(
        Reseed(),
        pruner,
        saving,
        *[KeepWhatIsLeft(folder / "left.ckpt")] * keep_what_is_left,
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        logger=[logger],
        **options,
    )
    loader = DataLoader(data, batch_size=8, collate_fn=data.collate)
    error: BaseException | None = None
    interrupts = signal.getsignal(signal.SIGINT)
    with struck(fault, data):
        try:
            fitted.fit(module, loader, ckpt_path=resume)
        except BaseException as caught:
            if fault is None:
                raise
            error = caught
        finally:
            # Lightning ignores further interrupts after the first.
            signal.signal(signal.SIGINT, interrupts)
    return Run(fitted, module, pruner, logger, error)


def faulty_checkpoints(folder: Path) -> list[str]:
    """Return the checkpoints whose weights and masks are not those of a planned step."""
    return [fault for p in sorted(folder.rglob("*.ckpt")) for fault in faults_in(p)]


def faults_in(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint."""
    faults = []
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "Pruning" in k]
    for name, kept in state["masks"].items():
        if bool(checkpoint["state_dict"][name][~kept].any()):
            faults.append(f"{path}: {name}")
    done = len(state["done"])
    if "removal_plan" in state:
        removed, planned = masked_channels(state["masks"]), PLANNED_CHANNELS
        groups = [group for r in state["reports"][-1:] for group in r["groups"]]
        found = sum(len(group["removed"]) for group in groups)
    else:
        removed = sum(int((~kept).sum()) for kept in state["masks"].values())
        planned = PLANNED
        found = sum(report_zeros(r) for r in state["reports"][-1:])
    if removed != [0, *planned][done]:
        faults.append(f"{path}: {removed} removed after {done} steps")
    if found != removed or len(state["reports"]) != done:
        faults.append(f"{path}: the reports do not belong to the masks")
    return faults


def masked_channels(masks: dict[str, Tensor]) -> int:
    """Count the masked channels of :class:`ResidualNet`, one norm of each group."""
    norms = [masks.get(f"net.{norm}.weight") for norm in ("bn", "bn1")]
    return sum(int((~kept).sum()) for kept in norms if kept is not None)


def report_zeros(report: dict[str, Any]) -> int:
    return sum(layer["zeros_after"] for layer in report["layers"])


def removed_in(run: Run) -> tuple[int, int]:
    """Count the zeros in the masks, and the pruned weights that are not zero."""
    masks: Masks = run.pruner.masks
    return sum(masks.zeros().values()), sum(masks.violations().values())


def weights_of(run: Run) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.module.state_dict().items()}


def die(folder: str, fault: Fault) -> None:
    """Run a fit in a process that is killed in the middle of a step."""
    torch.set_num_threads(1)
    os.chdir(folder)
    run(Path(folder), fault)


# ---------------------------------------------------------------- several ranks


def several(world_size: int, seconds: float = 30.0) -> dict[str, Any]:
    """Return options of a Trainer on several ranks with a timeout in seconds."""
    strategy = DDPStrategy(timeout=timedelta(seconds=seconds))
    return {"devices": world_size, "strategy": strategy}


def logged_steps(run: Run) -> int:
    """Count the pruning steps that were logged."""
    return sum("pruning/sparsity" in metrics for _, metrics in run.logger.history)


def strike_and_go_on(folder: str, world_size: int, faults: list[Fault]) -> list[Any]:
    """Run as a job: return how each fault ends here, and what is wrong after resuming."""
    os.chdir(folder)
    whole = run(Path(folder, "whole"), **several(world_size))
    outcomes: list[Any] = [removed_in(whole)]
    for number, fault in enumerate(faults):
        place = Path(folder, f"fault {number}")
        broken = run(place, fault, **several(world_size))
        left = removed_in(broken), len(broken.pruner.reports), logged_steps(broken)
        dist.barrier()
        wrong = faulty_checkpoints(place)
        again = run(place, **several(world_size))
        wrong += differences(again.result, whole.result) + faulty_checkpoints(place)
        outcomes.append((type(broken.error).__name__, str(broken.error), left, wrong))
    return outcomes


def strike_once(folder: str, world_size: int, fault: Fault, seconds: float) -> None:
    """Run as a job: write how a fault ends that the ranks cannot agree about."""
    os.chdir(folder)
    options = several(world_size, seconds)
    broken = run(Path(folder), fault, keep_what_is_left=False, **options)
    left = f"{removed_in(broken)}\n{type(broken.error).__name__}: {broken.error}"
    # If a rank has died, the job returns no results; the file stays.
    Path(folder, f"rank {dist.get_rank()}.txt").write_text(left)
    if fault.kind == "wait" and fault.rank != dist.get_rank():
        Path("the other rank has ended").touch()
    # The other ranks see closed connections only when this process has ended.
    os._exit(1)


def train_on(folder: str, world_size: int) -> list[Any]:
    """Run as a job: resume from the last checkpoint and compare with a full run."""
    os.chdir(folder)
    wrong = faulty_checkpoints(Path(folder))
    again = run(Path(folder), **several(world_size))
    whole = run(Path(folder, "whole"), **several(world_size))
    if world_size > 2:
        # DDP adds gradients of three ranks in an order that a restart changes.
        same = removed_in(again) == removed_in(whole)
        return wrong if same else ["other zeros"]
    return wrong + differences(again.result, whole.result)
