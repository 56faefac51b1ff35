"""A run that is resumed ends where the uninterrupted run ends, bit for bit."""

from __future__ import annotations

import contextlib
import inspect
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    WEIGHTS,
    Classifier,
    Reseed,
    differences,
    final_state,
    images,
    loader,
    pruning,
    seed_all,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_pool import RankPool
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler

from lightning_woodfisher import (
    ConfigurationError,
    ConstantSchedule,
    PolynomialSchedule,
    PruningSchedule,
    SelectionConfig,
    WoodFisherPruningCallback,
)
from lightning_woodfisher.pruning.schedule import Horizon

EPOCHS = 4
_LIGHTNING_KNOWS_WEIGHTS_ONLY = (
    "weights_only" in inspect.signature(pl.Trainer.fit).parameters
)
# The resumed runs do not save; Lightning misses the ModelCheckpoint.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@dataclass(frozen=True)
class Run:
    """What a fit has made."""

    state: dict[str, Any]
    masks: dict[str, torch.Tensor]
    reports: list[dict[str, Any]]
    checkpoints: list[str] = field(default_factory=list)


def epochs() -> PruningSchedule:
    return PolynomialSchedule(0, 3)


def steps() -> PruningSchedule:
    return PolynomialSchedule(start_step=2, end_step=20, every_n_steps=4)


def fit(
    schedule: PruningSchedule,
    saving: dict[str, Any] | None = None,
    resumed: str | None = None,
    data: DataLoader[Any] | None = None,
    stop: int | None = None,
    plain: bool = False,
    **options: Any,
) -> Run:
    seed_all(1 if resumed is None else 99)
    pruner = pruning(schedule=schedule)
    callbacks: list[Any] = [Reseed(), pruner]
    folder = Path.cwd() / "checkpoints"
    if saving is not None:
        name = "{epoch}-{step}"
        callbacks.append(ModelCheckpoint(folder, name, save_top_k=-1, **saving))
        options["enable_checkpointing"] = True
    fitted = trainer(*callbacks, max_epochs=EPOCHS, **options)
    module = Classifier()
    if stop is not None:
        module.on_train_epoch_end = lambda: stop_after(fitted, stop - 1)  # type: ignore[method-assign]
    train, validation = data or loader(), loader(16, shuffle=False)
    only = {"weights_only": True} if plain and _LIGHTNING_KNOWS_WEIGHTS_ONLY else {}
    # A run that stops early warns that steps are missing.
    with contextlib.nullcontext() if stop is None else pytest.warns(match="planned"):
        fitted.fit(module, train, validation, ckpt_path=resumed, **only)
    reports = [{**r.to_dict(), "seconds": {}} for r in pruner.reports]
    files = sorted(map(str, folder.glob("*.ckpt")))
    return Run(final_state(fitted), pruner.masks.state_dict(), reports, files)


SAVINGS: dict[str, dict[str, Any]] = {
    "end of the epoch": {"save_on_train_epoch_end": True},
    "after validation": {"save_on_train_epoch_end": False},
    "middle of an epoch": {"every_n_train_steps": 5},
}


@pytest.mark.parametrize("schedule", [epochs, steps])
@pytest.mark.parametrize("saving", list(SAVINGS))
def test_resumed_equals_uninterrupted(schedule: Any, saving: str) -> None:
    # An order that depends on nothing but the epoch: Lightning does not restore another.
    data = loader(shuffle=False, sampler=DistributedSampler(images(), 1, 0))
    if saving == "middle of an epoch":
        # Lightning begins again with the first batch, so that all must be the same.
        data = DataLoader(ConcatDataset([images(8)] * 6), batch_size=8)
    whole = fit(schedule(), SAVINGS[saving], data=data)
    assert len(whole.checkpoints) == 4
    pruned = []
    for path in whole.checkpoints:
        resumed = fit(schedule(), resumed=path, data=data)
        assert differences(resumed.masks, whole.masks) == [], path
        assert differences(resumed.reports, whole.reports) == [], path
        assert differences(resumed.state, whole.state) == [], path
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["global_step"] <= 24
        pruned.append(zeros_in(checkpoint["state_dict"]))
    # The checkpoints differ: some steps of the schedule were done, others not.
    assert len(set(pruned)) >= 3


def zeros_in(state: dict[str, torch.Tensor]) -> int:
    return sum(int((value == 0).sum()) for value in state.values() if value.dim() > 1)


def test_the_schedule_of_a_resumed_run_shows_what_is_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = fit(epochs(), {"save_on_train_epoch_end": True})
    caplog.clear()
    fit(epochs(), resumed=whole.checkpoints[1])
    plan = [line for line in caplog.text.splitlines() if line.startswith("epoch ")]
    assert [line.endswith("done") for line in plan] == [True, True, False, False]


@pytest.mark.parametrize("saved", [1, 3])
def test_more_epochs_keep_the_steps_that_are_done(
    saved: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The default schedule depends on the length of training; a target is reached once."""
    short = fit(PolynomialSchedule(), {"save_on_train_epoch_end": True})
    assert [report["epoch"] for report in short.reports] == [1, 2]
    seed_all(99)
    pruner = pruning(schedule=PolynomialSchedule())
    longer = trainer(pruner, max_epochs=3 * EPOCHS)
    caplog.clear()
    longer.fit(Classifier(), loader(), ckpt_path=short.checkpoints[saved])
    found = [(report.epoch, report.target_sparsity) for report in pruner.reports]
    ramp = PolynomialSchedule().plan(0.75, Horizon(3 * EPOCHS))
    done = [(r["epoch"], r["target_sparsity"]) for r in short.reports][:saved]
    left = [(s.position, s.sparsity) for s in ramp if s.sparsity > done[-1][1]]
    assert found == [*done, *left]
    assert [sparsity for _, sparsity in found] == sorted({s for _, s in found})
    assert len(left) == (0 if saved == 3 else 4)
    lines = [line for line in caplog.text.splitlines() if line.startswith("epoch ")]
    assert [int(line.split()[1]) for line in lines] == [epoch for epoch, _ in found]
    assert [line.endswith("done") for line in lines].count(True) == len(done)
    assert pruner.masks.sparsity() == pytest.approx(0.75, abs=1e-3)


# ---------------------------------------------------------------- two processes


def resume_on_two(folder: str) -> list[str]:
    """Job: a run, and the same run resumed from its second epoch."""
    import os

    os.chdir(folder)
    two = {"devices": 2, "strategy": "ddp"}
    whole = fit(epochs(), {"save_on_train_epoch_end": True}, **two)
    path = next(p for p in whole.checkpoints if "epoch=1-" in p)
    resumed = fit(epochs(), resumed=path, **two)
    return (
        differences(resumed.state, whole.state)
        + differences(resumed.masks, whole.masks)
        + differences(resumed.reports, whole.reports)
    )


def test_resumed_equals_uninterrupted_on_two_processes(
    ranks: RankPool, tmp_path: Path
) -> None:
    results = ranks.run(2, resume_on_two, str(tmp_path), launch="trainer")
    assert results == [[], []]


# ---------------------------------------------------------------- without the package

LOAD_WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["lightning_woodfisher"] = None  # an import of it fails
checkpoint = torch.load(sys.argv[1], weights_only=True)
(state,) = [v for k, v in checkpoint["callbacks"].items() if "WoodFisher" in k]
assert len(state["masks"]) == 3, state["masks"]
removed = 0
for name, kept in state["masks"].items():
    assert kept.dtype == torch.bool
    weights = checkpoint["state_dict"][name]
    assert bool((weights[~kept] == 0).all()), name
    removed += int((~kept).sum())
assert state["reports"][-1]["layers"][0]["name"] == "net.0.weight"
assert all("parametrizations" not in k and "_orig" not in k for k in checkpoint["state_dict"])
print(removed)
"""


@pytest.mark.spawns
def test_a_checkpoint_loads_where_the_package_is_missing(tmp_path: Path) -> None:
    whole = fit(epochs(), {"save_on_train_epoch_end": True})
    path = whole.checkpoints[-1]
    command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, path]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    weights = sum(mask.numel() for mask in whole.masks.values())
    assert int(done.stdout) == round(0.75 * weights)
    plain = Classifier()
    state = torch.load(path, weights_only=True)["state_dict"]
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state, strict=True)


# ---------------------------------------------------------------- other entry points


@pytest.fixture
def checkpoint() -> str:
    saving = {"save_on_train_epoch_end": True}
    return fit(epochs(), saving, limit_val_batches=0).checkpoints[-1]


def test_validate_from_a_checkpoint(checkpoint: str) -> None:
    pruner = pruning(schedule=epochs())
    checker = trainer(pruner)
    module = Classifier()
    (metrics,) = checker.validate(
        module, loader(16, shuffle=False), ckpt_path=checkpoint, verbose=False
    )
    assert metrics["val_loss"] > 0
    assert zeros_in(module.state_dict()) == round(0.75 * WEIGHTS)
    assert len(pruner.reports) == 4


def state_in(path: Any) -> dict[str, Any]:
    """The pruning state of a checkpoint, with the zeros of its weights."""
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "WoodFisher" in k]
    return {**state, "zeros": zeros_in(checkpoint["state_dict"])}


def masked(masks: dict[str, torch.Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def test_a_checkpoint_saved_after_validation_is_whole(
    checkpoint: str, tmp_path: Path
) -> None:
    checker = trainer(pruning(schedule=epochs()), enable_checkpointing=True)
    checker.validate(
        Classifier(), loader(16, shuffle=False), ckpt_path=checkpoint, verbose=False
    )
    copy = str(tmp_path / "copy.ckpt")
    checker.save_checkpoint(copy)
    assert differences(state_in(copy), state_in(checkpoint)) == []
    assert masked(state_in(copy)["masks"]) == round(0.75 * WEIGHTS)
    module, schedule = Classifier(), PolynomialSchedule(0, 5)
    fitted = trainer(pruning(schedule=schedule, target_sparsity=0.9), max_epochs=7)
    fitted.fit(module, loader(), ckpt_path=copy)
    assert zeros_in(module.state_dict()) == round(0.9 * WEIGHTS)


def test_state_belongs_to_the_weights_after_a_test_of_an_older_checkpoint(
    tmp_path: Path,
) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            """Do nothing."""

    pruner, folder = pruning(schedule=epochs()), tmp_path / "all"
    saving = ModelCheckpoint(
        folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    fitted = trainer(pruner, saving, max_epochs=EPOCHS, enable_checkpointing=True)
    module = Tested()
    fitted.fit(module, loader())
    assert len(pruner.reports) == 4
    older = str(folder / "epoch=1.ckpt")
    fitted.test(module, loader(16, shuffle=False), ckpt_path=older, verbose=False)
    assert len(pruner.reports) == 2
    assert masked(pruner.masks.state_dict()) == zeros_in(module.state_dict())
    again = str(tmp_path / "again.ckpt")
    fitted.save_checkpoint(again)
    assert differences(state_in(again), state_in(older)) == []


def test_a_fit_from_scratch_after_validation_does_not_take_the_old_masks(
    checkpoint: str,
) -> None:
    pruner = pruning(schedule=epochs())
    trainer(pruner).validate(
        Classifier(), loader(16, shuffle=False), ckpt_path=checkpoint, verbose=False
    )
    trainer(pruner, max_epochs=EPOCHS).fit(Classifier(), loader())
    assert len(pruner.reports) == 4
    assert pruner.reports[0].layers[0].zeros_before == 0


def test_fine_tuning_keeps_the_zeros_of_the_weights(checkpoint: str) -> None:
    """From the weights alone: the masks are where the zeros are."""
    module = Classifier()
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pruner = pruning(schedule=ConstantSchedule())
    trainer(pruner).fit(module, loader())
    after = module.state_dict()
    for name in pruner.masks.parameters:
        assert torch.equal(after[name] == 0, before[name] == 0), name
        assert not torch.equal(after[name], before[name])
    assert zeros_in(after) == round(0.75 * WEIGHTS)
    assert pruner.reports == []


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_fine_tuning_a_resumed_checkpoint_keeps_its_masks(
    target: float, checkpoint: str
) -> None:
    pruner = pruning(schedule=ConstantSchedule(), target_sparsity=target)
    module = Classifier()
    trainer(pruner, max_epochs=EPOCHS + 1).fit(module, loader(), ckpt_path=checkpoint)
    assert zeros_in(module.state_dict()) == round(0.75 * WEIGHTS)
    assert len(pruner.reports) == 4


def test_pruning_goes_on_from_a_sparse_network(checkpoint: str) -> None:
    module = Classifier()
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    old = {n: p.detach() == 0 for n, p in module.named_parameters() if p.dim() > 1}
    schedule = PolynomialSchedule(0, 1, initial_sparsity=0.75)
    trainer(pruning(schedule=schedule, target_sparsity=0.9)).fit(module, loader())
    assert zeros_in(module.state_dict()) == round(0.9 * WEIGHTS)
    for name, parameter in module.named_parameters():
        if name in old:
            assert bool((parameter[old[name]] == 0).all())


# ---------------------------------------------------------------- what is refused


def edited(path: str, edit: Any) -> str:
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "WoodFisher" in k]
    edit(checkpoint["state_dict"], state)
    torch.save(checkpoint, path)
    return path


def revive(weights: dict[str, Any], state: dict[str, Any]) -> None:
    weights["net.5.weight"][~state["masks"]["net.5.weight"]] = 0.5


def rename(weights: dict[str, Any], state: dict[str, Any]) -> None:
    state["masks"]["net.9.weight"] = state["masks"].pop("net.5.weight")


def reshape(weights: dict[str, Any], state: dict[str, Any]) -> None:
    state["masks"]["net.5.weight"] = state["masks"]["net.5.weight"][:3]


def advance(weights: dict[str, Any], state: dict[str, Any]) -> None:
    state["version"] = 99


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (revive, "weights and masks disagree.*'net.5.weight': "),
        (rename, "a mask for 'net.9.weight', which is not among the selected"),
        (
            reshape,
            r"mask of 'net.5.weight' has shape \(3, 108\), the parameter \(12, 108\)",
        ),
        (advance, "version 99"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    checkpoint: str, edit: Any, message: str
) -> None:
    pruner = pruning(schedule=epochs())
    fitted = trainer(pruner, max_epochs=EPOCHS + 1)
    with pytest.raises(ConfigurationError, match=message):
        fitted.fit(Classifier(), loader(), ckpt_path=edited(checkpoint, edit))
    assert fitted.global_step in {0, 24}


def test_a_lower_target_than_the_checkpoint_has_is_refused(checkpoint: str) -> None:
    pruner = pruning(schedule=PolynomialSchedule(4, 5), target_sparsity=0.5)
    with pytest.raises(
        ConfigurationError, match=r"sparsity 0\.5, .* have 0\.7498 already"
    ):
        trainer(pruner, max_epochs=6).fit(Classifier(), loader(), ckpt_path=checkpoint)


@pytest.mark.parametrize(
    "selection",
    [SelectionConfig(exclude=["net.0"]), SelectionConfig(only=["net.5"])],
)
def test_another_selection_than_in_the_checkpoint_is_refused(
    checkpoint: str, selection: SelectionConfig
) -> None:
    pruner = pruning(schedule=epochs(), selection=selection)
    with pytest.raises(
        ConfigurationError,
        match=r"run with \{'include': \[\], 'exclude': \[\], 'only': \[\]\}, but",
    ):
        trainer(pruner, max_epochs=6).fit(Classifier(), loader(), ckpt_path=checkpoint)
    # To look at the weights it does not matter.
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer(pruner).validate(
            Classifier(), loader(16, shuffle=False), ckpt_path=checkpoint, verbose=False
        )


def test_a_higher_target_than_the_steps_that_were_done_is_refused(
    checkpoint: str,
) -> None:
    class Unwanted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError

    pruner = pruning(schedule=epochs(), target_sparsity=0.9)
    with pytest.raises(
        ConfigurationError, match=r"steps .* are done, .* 0\.7498 and not .*=0\.9"
    ):
        trainer(pruner, max_epochs=6).fit(Unwanted(), loader(), ckpt_path=checkpoint)


def test_a_second_callback_may_join_a_resumed_run() -> None:
    first = pruning(schedule=epochs(), selection=SelectionConfig(only=["Conv2d"]))
    saving = ModelCheckpoint(Path.cwd(), save_on_train_epoch_end=True)
    trainer(first, saving, max_epochs=EPOCHS, enable_checkpointing=True).fit(
        Classifier(), loader()
    )
    both = [
        pruning(schedule=schedule, selection=SelectionConfig(only=[pattern]))
        for pattern, schedule in (
            ("Conv2d", epochs()),
            ("Linear", PolynomialSchedule(4, 4)),
        )
    ]
    trainer(*both, max_epochs=EPOCHS + 1).fit(
        Classifier(), loader(), ckpt_path=saving.best_model_path
    )
    assert [len(pruner.reports) for pruner in both] == [len(first.reports), 1]
    assert both[0].masks.sparsity() == first.masks.sparsity()


def test_states_of_two_callbacks_are_kept_apart() -> None:
    def callbacks() -> list[WoodFisherPruningCallback]:
        return [
            pruning(schedule=epochs(), selection=SelectionConfig(only=[pattern]))
            for pattern in ("Conv2d", "Linear")
        ]

    first = callbacks()
    checkpoints = ModelCheckpoint(Path.cwd(), save_on_train_epoch_end=True)
    options = {"max_epochs": EPOCHS, "enable_checkpointing": True}
    trainer(*first, checkpoints, **options).fit(Classifier(), loader())
    second = callbacks()
    trainer(*second, max_epochs=EPOCHS + 1).fit(
        Classifier(), loader(), ckpt_path=checkpoints.best_model_path
    )
    for before, after in zip(first, second, strict=True):
        assert differences(before.masks.state_dict(), after.masks.state_dict()) == []
    assert list(second[0].masks.parameters) == ["net.0.weight"]
    assert list(second[1].masks.parameters) == ["net.5.weight", "net.7.weight"]


# ---------------------------------------------------------------- other ways to go on


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_goes_on_with_the_last_checkpoint_and_plain_types_only() -> None:
    """``save_last``, ``ckpt_path="last"``, and no pickled objects."""
    data = loader(shuffle=False)
    whole = fit(epochs(), data=data)
    saving = {"save_last": True, "save_on_train_epoch_end": True}
    first = fit(epochs(), saving, data=data, stop=2)
    assert len(first.reports) == 2
    resumed = fit(epochs(), saving, "last", data=data, plain=True)
    assert differences(resumed.state, whole.state) == []
    assert differences(resumed.masks, whole.masks) == []
    assert differences(resumed.reports, whole.reports) == []


def continue_on(folder: str, world_size: int, last: int) -> dict[str, Any]:
    """Job: train to an epoch from the last checkpoint, if there is one."""
    os.chdir(folder)
    pruner, module = pruning(schedule=epochs()), Classifier()
    started: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            started.update(pruner.masks.state_dict())

    saving = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    many = {"devices": world_size, "strategy": "ddp" if world_size > 1 else "auto"}
    fitted = trainer(
        pruner, Look(), saving, max_epochs=EPOCHS, enable_checkpointing=True, **many
    )
    module.on_train_epoch_end = lambda: stop_after(fitted, last)  # type: ignore[method-assign]
    fitted.fit(module, loader(shuffle=False), ckpt_path="last")
    return {
        "started": started,
        "masks": pruner.masks.state_dict(),
        "removed": [sum(r.zeros_after for r in s.layers) for s in pruner.reports],
        "broken": pruner.masks.violations(),
    }


def stop_after(fitted: pl.Trainer, epoch: int) -> None:
    fitted.should_stop = fitted.current_epoch >= epoch


@pytest.mark.filterwarnings("ignore:.*ckpt_path=.last.*")
def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: RankPool, tmp_path: Path
) -> None:
    masks: dict[str, torch.Tensor] = {}
    counts: list[int] = []
    for world_size, last in ((2, 0), (1, 1), (3, EPOCHS)):
        found = ranks.run(
            world_size, continue_on, str(tmp_path), world_size, last, launch="trainer"
        )
        for one in found:
            assert differences(one["started"], masks) == []
            assert differences(one["masks"], found[0]["masks"]) == []
            assert one["removed"][: len(counts)] == counts
            assert one["removed"][-1] == masked(one["masks"])
            assert one["broken"] == {}
        masks, counts = found[0]["masks"], found[0]["removed"]
        assert len(counts) == min(last + 1, EPOCHS)
    assert counts[-1] == round(0.75 * WEIGHTS)


@pytest.fixture
def unpruned(tmp_path: Path) -> tuple[str, int]:
    """A checkpoint of a run without the callback, and its zeros."""
    saving = ModelCheckpoint(tmp_path / "unpruned", save_on_train_epoch_end=True)
    module = Classifier()
    fitted = trainer(saving, max_epochs=1, enable_checkpointing=True)
    fitted.fit(module, loader())
    checkpoint = torch.load(saving.best_model_path, weights_only=True)
    weight = checkpoint["state_dict"]["net.5.weight"]
    weight[:, :50] = 0.0
    torch.save(checkpoint, saving.best_model_path)
    return saving.best_model_path, weight.shape[0] * 50


def test_a_checkpoint_without_masks_starts_without_masks(
    unpruned: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = unpruned
    pruner = pruning(schedule=PolynomialSchedule(2, 3))
    trainer(pruner, max_epochs=EPOCHS).fit(Classifier(), loader(), ckpt_path=path)
    assert "no masks of this callback" in caplog.text
    # Its zeros were weights like any others.
    assert [report.layers[0].zeros_before for report in pruner.reports][0] == 0
    assert pruner.masks.sparsity() == pytest.approx(0.75, abs=1e-3)


def test_masks_are_made_from_zeros_where_asked_for(unpruned: tuple[str, int]) -> None:
    path, zeros = unpruned
    module, pruner = Classifier(), pruning(schedule=ConstantSchedule())
    trainer(pruner, max_epochs=2).fit(module, loader(), ckpt_path=path)
    assert masked(pruner.masks.state_dict()) == zeros
    assert zeros_in(module.state_dict()) == zeros
