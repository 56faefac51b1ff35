"""The callback in a Trainer: its schedule, its promises, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from devices import DEVICE
from fits import (
    WEIGHTS,
    Classifier,
    Counting,
    Manual,
    RawManual,
    Talkative,
    differences,
    final_state,
    images,
    loader,
    pruning,
    seed_all,
    trainer,
)
from lightning.pytorch.callbacks import (
    EarlyStopping,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from rank_pool import RankPool
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    OneShotSchedule,
    PolynomialSchedule,
    PruningError,
    PruningReport,
    SelectionConfig,
    WoodFisherPruningCallback,
    prune,
)
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.weights.masks import Masks


def zeros(module: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in module.parameters() if p.dim() > 1)


# ---------------------------------------------------------------- schedules


def test_one_shot() -> None:
    pruner, module = pruning(schedule=OneShotSchedule(1)), Classifier()
    trainer(pruner).fit(module, loader())
    (report,) = pruner.reports
    assert (report.epoch, report.step) == (1, 6)
    assert report.zeros == zeros(module) == round(0.75 * WEIGHTS)
    assert report.sparsity == zeros(module) / WEIGHTS
    assert report.world_size == 1
    assert report.predicted_increase > 0
    assert report.measured_increase == report.loss_after - report.loss_before


def test_polynomial() -> None:
    pruner, module = pruning(schedule=PolynomialSchedule(1, 5, 2)), Classifier()
    trainer(pruner, max_epochs=7).fit(module, loader())
    assert [report.epoch for report in pruner.reports] == [1, 3, 5]
    shares = [0.75 * (1 - (1 - i / 3) ** 3) for i in (1, 2, 3)]
    assert [report.zeros for report in pruner.reports] == [
        round(share * WEIGHTS) for share in shares
    ]
    for before, after in zip(pruner.reports, pruner.reports[1:], strict=False):
        for old, new in zip(before.layers, after.layers, strict=True):
            assert old.zeros_after == new.zeros_before
    assert zeros(module) == round(0.75 * WEIGHTS)


def test_the_default_schedule_leaves_a_tenth_and_the_last_quarter_alone() -> None:
    pruner = pruning(schedule=None)
    trainer(pruner, max_epochs=8).fit(Classifier(), loader())
    assert [report.epoch for report in pruner.reports] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedule_in_optimizer_steps(accumulate: int) -> None:
    schedule = PolynomialSchedule(start_step=1, end_step=5, every_n_steps=2)
    pruner, module = pruning(schedule=schedule), Classifier()
    fitted = trainer(pruner, accumulate_grad_batches=accumulate, max_epochs=2)
    fitted.fit(module, loader())
    assert fitted.global_step == 12 / accumulate
    assert [report.step for report in pruner.reports] == [1, 3, 5]
    assert zeros(module) == round(0.75 * WEIGHTS)


def test_training_limited_by_steps() -> None:
    pruner, module = pruning(schedule=OneShotSchedule(step=3)), Classifier()
    trainer(pruner, max_epochs=-1, max_steps=4).fit(module, loader())
    assert [report.step for report in pruner.reports] == [3]


def test_layer_scope_by_magnitude_in_parts() -> None:
    pruner, module = (
        pruning(
            criterion="magnitude",
            selection=SelectionConfig(scope="layer"),
            recompute_steps=2,
        ),
        Classifier(),
    )
    trainer(pruner).fit(module, loader())
    for layer in pruner.reports[0].layers:
        weight = module.get_parameter(layer.name)
        assert int((weight == 0).sum()) == round(0.75 * weight.numel())
    assert pruner.reports[0].stages == 2


def test_the_plan_names_a_target_that_nobody_chose(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pruner = WoodFisherPruningCallback(criterion="magnitude")
    trainer(pruner, max_epochs=1).fit(Classifier(), loader())
    assert "to target_sparsity=0.9 (the default) by magnitude:" in caplog.text


def test_the_plan_is_printed_before_training(caplog: pytest.LogCaptureFixture) -> None:
    shown = []

    class First(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            shown.append(caplog.text)

    pruner = pruning(schedule=PolynomialSchedule(0, 1, degree=1.0), target_sparsity=0.5)
    module = Classifier()
    trainer(First(), pruner).fit(module, loader())
    lines = [line.split() for line in shown[0].splitlines()]
    assert (
        "Pruning 1,371 weights of 3 tensors to target_sparsity=0.5 by woodfisher:"
        in shown[0]
    )
    parameters = sum(p.numel() for p in module.parameters())
    assert f"1,371 of {parameters:,} parameters" in shown[0]
    assert "Linear (2), Conv2d (1)" in shown[0]
    assert "(biases, norms and other vectors): net." in shown[0]
    whole = pruner.reports[0].model_sparsity
    assert f"Pruned to 25.02% ({whole:.2%} of the whole model)" in shown[0]
    assert ["epoch", "0", "25.00%", "1,028"] in lines
    assert ["epoch", "1", "50.00%", "685"] in lines


class Terminal(io.StringIO):
    """Text that believes it is on a screen."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_a_progress_bar_shows_the_collection(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bar: Any = TQDMProgressBar()
    if kind == "rich":
        console = {"file": screen, "force_terminal": True, "width": 100}
        bar = RichProgressBar(console_kwargs=console)
    rows: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if kind == "rich":
                rows.append(len(bar.progress.tasks))

    two_parts = pruning(recompute_steps=2)
    fitting = trainer(two_parts, bar, Count(), enable_progress_bar=True)
    fitting.fit(Classifier(), loader())
    # That of training and ours.
    assert set(rows) == ({2} if kind == "rich" else set())
    assert re.search(r"Collecting gradients.* 0/6 ", screen.getvalue())
    if kind == "rich":  # which draws every time; tqdm leaves some out
        assert re.search(r"Collecting gradients.* 6/6 ", screen.getvalue())
    screen.truncate(0)
    trainer(pruning()).fit(Classifier(), loader())
    assert "Collecting gradients" not in screen.getvalue()


# ---------------------------------------------------------------- the step itself


class Snapshot(pl.Callback):
    """Weights before and after another callback's epoch start."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self.model: Any = None
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.model = copy.deepcopy(module.net)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and trainer.current_epoch == self.epoch:
            state = module.net.state_dict()
            self.weights = {name: value.clone() for name, value in state.items()}


def net_loss(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


class OneBackward(Classifier):
    """Manual optimisation, the loss in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(0.25 * loss, retain_graph=True)
        self.manual_backward(0.75 * loss)
        optimizer.step()


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("module", [Classifier, OneBackward])
def test_the_callback_does_what_prune_does(module: Any, mode: Any) -> None:
    seed_all(4)
    fisher = FisherConfig(7, 3, 16, model_mode=mode)
    pruner, snapshot = pruning(fisher=fisher, seed=9), Snapshot()
    trainer(snapshot, pruner, max_epochs=1).fit(module(), loader())
    dense, chosen = snapshot.model, {"fisher": fisher, "seed": 9}
    report = prune(dense, images(), net_loss, target_sparsity=0.75, **in_step(**chosen))
    found = pruner.reports[0]
    for old, new in zip(report.layers, found.layers, strict=True):
        assert new.name == f"net.{old.name}"
        assert new.zeros_after == old.zeros_after
    for name, weight in dense.state_dict().items():
        if module is Classifier:
            assert torch.equal(snapshot.weights[name], weight), name
        else:  # a sum of two parts is rounded differently
            torch.testing.assert_close(snapshot.weights[name], weight)
    assert found.loss_after == pytest.approx(report.loss_after, rel=1e-4)
    assert found.predicted_increase == pytest.approx(
        report.predicted_increase, rel=1e-4
    )


def test_loss_method_replaces_the_training_step() -> None:
    class TwoFaced(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.calls = {"step": 0, "method": 0}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.calls["step"] += 1
            return super().training_step(batch, batch_idx)

        def pruning_loss(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls["method"] += 1
            assert len(batch[0]) == 2
            return self.loss(batch)

    module = TwoFaced()
    options: dict[str, Any] = {"measure_loss": False, "line_search": False}
    pruner = pruning(loss_method="pruning_loss", **in_step(**options))
    trainer(pruner).fit(module, loader())
    # Twice for each of 6 gradients but the last, and for two of them alone as a check.
    assert module.calls == {"step": 12, "method": 11 + 2}


def test_hooks_of_the_module_transform_the_batches() -> None:
    class Hooked(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.sizes.append(len(batch[0]))
            return [batch[0][:, :, :, ::1] * 2, batch[1]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"x": batch[0], "y": batch[1]}

        def training_step(self, batch: Any) -> Any:
            assert batch["x"].abs().max() > 4
            return self.loss((batch["x"], batch["y"]))

    module = Hooked()
    trainer(pruning(measure_loss=False)).fit(module, loader())
    # Twice for each of 6 gradients but the last, two of them alone as a check, the trials
    # of the search, and the training.
    assert module.sizes == [2] * (11 + 2) + [12] * 4 + [8] * 12


def test_a_dict_with_a_loss_and_a_loss_of_shape_one() -> None:
    class Odd(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.loss(batch).reshape(1), "logits": batch[0]}

    pruner = pruning()
    trainer(pruner).fit(Odd(), loader())
    assert pruner.reports[0].zeros == round(0.75 * WEIGHTS)


def test_limited_batches_and_validation_only() -> None:
    """Samples come from the whole data set; validation alone needs no masks."""
    pruner = pruning(fisher=FisherConfig(20, 2, 16))
    options = {"limit_train_batches": 2, "limit_val_batches": 1}
    fitted, module = trainer(pruner, **options), Classifier()
    fitted.validate(module, loader(shuffle=False), verbose=False)
    fitted.fit(module, loader(), loader(shuffle=False))
    assert fitted.global_step == 4
    fitted.validate(module, loader(shuffle=False), verbose=False)
    assert pruner.masks.sparsity() == round(0.75 * WEIGHTS) / WEIGHTS


def test_fast_dev_run_prunes_once() -> None:
    pruner = pruning(schedule=PolynomialSchedule(30, 90), report_path="report.json")
    module = Classifier()
    trainer(pruner, fast_dev_run=True).fit(module, loader(), loader(shuffle=False))
    assert [report.epoch for report in pruner.reports] == [0]
    assert zeros(module) == round(0.75 * WEIGHTS)


class Stream(IterableDataset[Any]):
    """Samples that come as they come."""

    def __iter__(self) -> Iterator[Any]:
        return iter(images())


def test_a_stream_needs_a_dataloader() -> None:
    stream = DataLoader(Stream(), batch_size=8)
    expected = r"a DataLoader of the iterable-style Stream, .* pass dataloader="
    fitted, module = trainer(pruning(), max_steps=6), Counting()
    with pytest.raises(ConfigurationError, match=expected):
        fitted.fit(module, stream)
    assert module.steps == 0
    # With one: a batch for each gradient, from an iterable of any kind.
    for given in (DataLoader(Stream(), batch_size=3), list(loader()), loader()):
        pruner = pruning(dataloader=given)
        module = Counting()
        trainer(pruner, max_steps=6).fit(module, stream)
        assert pruner.reports[0].zeros == zeros(module) == round(0.75 * WEIGHTS)


def test_a_dataloader_that_ends_too_early() -> None:
    batches, module = list(loader())[:4], Counting()
    late = OneShotSchedule(epoch=1)
    with pytest.raises(
        ConfigurationError, match="dataloader has 4 batches.*num_gradients=6"
    ):
        trainer(pruning(dataloader=batches, schedule=late)).fit(module, loader())
    assert module.steps == 0
    # Of an iterator nobody knows.
    with pytest.raises(
        ConfigurationError, match="ended after 4 batches.*num_gradients=6"
    ):
        trainer(pruning(dataloader=iter(batches))).fit(Classifier(), loader())


def test_several_training_loaders_need_a_dataloader() -> None:
    class Paired(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch = batch["a"] if isinstance(batch, dict) else batch
            return super().training_step(batch, batch_idx)

    loaders = {"a": loader(), "b": loader()}
    with pytest.raises(ConfigurationError, match="the training data is a dict"):
        trainer(pruning()).fit(Paired(), loaders)
    pruner = pruning(dataloader=loader())
    trainer(pruner).fit(Paired(), loaders)
    assert pruner.masks.sparsity() > 0.74


def test_a_loader_without_automatic_batching() -> None:
    batches = [images()[i : i + 4] for i in range(0, 48, 4)]
    pruner = pruning()
    trainer(pruner).fit(Classifier(), DataLoader(batches, batch_size=None))
    assert pruner.masks.sparsity() > 0.74


def test_frozen_and_unused_weights() -> None:
    class Partial(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)
            self.unused = nn.Linear(5, 6)

    pruner, module = pruning(), Partial()
    with (
        pytest.warns(match=r"not pruned in this step.*unused\.weight: all gradients"),
        pytest.warns(match=r"the last step could not prune unused\.weight"),
    ):
        trainer(pruner).fit(module, loader())
    names = ["net.5.weight", "net.7.weight", "unused.weight"]
    assert list(pruner.masks.parameters) == names
    # The others reach the sparsity without it.
    zeros = pruner.masks.zeros()
    used = sum(pruner.masks.parameters[name].numel() for name in names[:2])
    assert zeros["unused.weight"] == 0
    assert sum(zeros.values()) == round(0.75 * used)


# ---------------------------------------------------------------- promises


class Stopper(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        trainer.should_stop = True


def test_training_that_ends_too_early_is_a_warning() -> None:
    pruner = pruning(schedule=PolynomialSchedule(0, 3))
    stopped = (
        r"sparsity 0\.4333, not at the target 0\.75: 3 planned .* first at epoch 1"
    )
    with pytest.warns(match=stopped):
        trainer(Stopper(), pruner, max_epochs=5).fit(Classifier(), loader())
    early = EarlyStopping("train_loss", patience=1, min_delta=1e9)
    pruner.hold_monitors = False
    with pytest.warns(match=r"planned step.*EarlyStopping\(monitor='train_loss'\)"):
        trainer(early, pruner, max_epochs=5).fit(Classifier(), loader())


def test_weights_that_are_revived_behind_our_back_are_an_error() -> None:
    class Reviver(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
            module.net[7].weight.data += 1.0

    with pytest.raises(
        PruningError, match=r"not zero, by parameter: \{'net.7.weight': "
    ):
        trainer(pruning(), Reviver()).fit(Classifier(), loader())


class Recorded(SingleDeviceStrategy):
    """Moves the module to the CPU at the end, as on any device, and records when."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(DEVICE)
        self.events = events

    def teardown(self) -> None:
        self.events.append("teardown")
        super().teardown()


@pytest.mark.parametrize("sharded", [False, True])
def test_masks_are_checked_while_weights_are_on_their_device(
    monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """Every fit on a GPU ended with an error: masks and weights were on two devices."""
    events: list[str] = []
    pruner = pruning(log_masks=True)
    fitted = trainer(pruner, strategy=Recorded(events), accelerator="auto")

    class Record(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            # From now on, as if the ranks had parts of the weights.
            monkeypatch.setattr(Masks, "verify", lambda masks: events.append("verify"))
            monkeypatch.setattr(
                Masks, "state_dict", lambda masks: events.append("whole masks")
            )
            pruner.masks.sharded = sharded

    fitted.callbacks.append(Record())
    fitted.fit(Classifier(), loader())
    assert events[:3] == ["verify", "whole masks", "teardown"]
    # Without collectives, callbacks that come later are seen, too.
    assert events[3:] == [] if sharded else ["verify"]


def test_masks_after_fit() -> None:
    """Training has ended on another device than that of the masks."""
    pruner, module = pruning(), Classifier()
    fitted = trainer(pruner)
    fitted.fit(module, loader())
    for name, weight in pruner.masks.parameters.items():
        assert pruner.masks.kept(name).device == weight.device
    masks, before = pruner.masks, pruner.masks.zeros()
    module.net[7].weight.data[0] = 0.0
    masks.prune_zeros()
    assert masks.zeros()["net.7.weight"] > before["net.7.weight"]
    module.net[7].weight.data += 1.0
    with pytest.raises(PruningError, match=r"net\.7\.weight"):
        masks.verify()
    masks.apply()
    masks.verify()
    fitted.validate(module, loader(), verbose=False)
    module.to(DEVICE)
    masks.apply()
    masks.verify()
    assert masks.kept("net.7.weight").device.type == DEVICE.type
    fitted.fit_loop.max_epochs = 4
    fitted.fit(module, loader())
    assert pruner.masks.zeros() == masks.zeros()


def test_two_callbacks_on_different_weights() -> None:
    pruners = [
        pruning(target_sparsity=s, selection=SelectionConfig(only=[include]))
        for s, include in ((0.5, "Conv2d"), (0.9, "Linear"))
    ]
    module = Classifier()
    trainer(*pruners).fit(module, loader())
    assert int((module.net[0].weight == 0).sum()) == round(0.5 * 27)
    linear = (module.net[5].weight == 0).sum() + (module.net[7].weight == 0).sum()
    assert int(linear) == round(0.9 * (WEIGHTS - 27))


def test_a_failing_step_changes_nothing() -> None:
    class Failing(Classifier):
        def pruning_loss(self, batch: Any, batch_idx: int) -> Tensor:
            if torch.is_grad_enabled():
                return self.loss(batch)
            raise OSError("disk full")  # while the loss is measured, after the write

    seed_all(1)
    pruner, module = pruning(loss_method="pruning_loss"), Failing()
    before = copy.deepcopy(module.state_dict())
    fitted = trainer(pruner)
    with pytest.raises(OSError, match="disk full"):
        fitted.fit(module, loader())
    assert differences(module.state_dict(), before) == []
    assert pruner.masks.sparsity() == 0
    assert pruner.reports == []
    assert pruner.state_dict()["done"] == []
    assert {"log", "log_dict", "print", "optimizers"}.isdisjoint(vars(module))


def test_a_fit_of_a_raw_manual_module_goes_on() -> None:
    """Its optimizer steps are not counted: global_step stays 0."""
    pruner, module = pruning(), RawManual()
    fitted = trainer(pruner)
    fitted.fit(module, loader())
    before = pruner.masks.state_dict()
    fitted.fit_loop.max_epochs = 4
    fitted.fit(module, loader())
    assert fitted.global_step == 0
    assert [report.epoch for report in pruner.reports] == [0]
    assert differences(pruner.masks.state_dict(), before) == []


# ---------------------------------------------------------------- the object


@contextlib.contextmanager
def no_space() -> Iterator[None]:
    """Let no file grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class FullDisk(pl.Callback):
    """The disk is full from the first epoch to the end of fit."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.full = no_space()
        self.full.__enter__()

    def teardown(self, *_: Any, **__: Any) -> None:
        self.full.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", r"report_path='\.' is a folder; give the path of a file"),
        ("file/r.json", "'file/r.json' cannot be written .*; give the path of a file"),
        ("/proc/r.json", "'/proc/r.json' cannot be written"),
    ],
)
def test_a_report_that_cannot_be_written_is_found_before_training(
    path: str, message: str
) -> None:
    Path("file").touch()
    with pytest.raises(ConfigurationError, match=message):
        trainer(pruning(report_path=path)).fit(Classifier(), loader())
    with no_space(), pytest.raises(ConfigurationError, match="File too large"):
        trainer(pruning(report_path="r.json")).fit(Classifier(), loader())
    assert [file.name for file in Path().iterdir()] == ["file"]


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
def test_a_disk_that_is_full_later_ends_no_training() -> None:
    pruner = pruning(report_path="r.json")
    with pytest.warns(match=r"report_path=r.json could not be written .*checkpoints"):
        trainer(FullDisk(), pruner).fit(Classifier(), loader())
    assert len(pruner.reports) == 1
    assert [*Path().iterdir()] == []


def test_report_path() -> None:
    pruner = pruning(
        schedule=PolynomialSchedule(0, 1), report_path="new/folder/report.json"
    )
    sizes = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            sizes.append(len(json.loads(Path("new/folder/report.json").read_text())))

    trainer(pruner, Look()).fit(Classifier(), loader())
    assert sizes == [1, 2]
    read = json.loads(Path("new/folder/report.json").read_text())
    assert [PruningReport.from_dict(report) for report in read] == pruner.reports


class LogsItsEpoch(Classifier):
    """Logs its epoch in validation, and a value that JSON does not know."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val_epoch": float(self.current_epoch), "nothing": torch.nan})


def test_reports_have_what_the_module_has_logged() -> None:
    ramp = PolynomialSchedule(1, 3, every_n_epochs=2)
    pruner = pruning(schedule=ramp, report_path="report.json")
    fitted = trainer(pruner, max_epochs=5, num_sanity_val_steps=1)
    fitted.fit(LogsItsEpoch(), loader(), loader())
    logged = [(r.logged_before, r.logged_after) for r in pruner.reports]
    assert [
        [values["val_epoch"] for values in pair] for pair in logged
    ] == [[0, 2], [2, 4]]  # fmt: skip
    last = pruner.reports[-1].logged_after
    assert last["train_loss"] == pytest.approx(
        float(fitted.logged_metrics["train_loss"])
    )
    assert set(last) == {"train_loss", "val_epoch"}
    read = json.loads(Path("report.json").read_text())
    assert [PruningReport.from_dict(report) for report in read] == pruner.reports
    # A run that is resumed knows what was logged before.
    again = pruning(schedule=ramp)
    again.load_state_dict(pruner.state_dict())
    assert again.reports == pruner.reports
    assert again._logged == last


def test_repr_names_what_was_chosen() -> None:
    text = repr(pruning(target_sparsity=0.625, criterion="magnitude"))
    for part in ("target_sparsity=0.625", "magnitude", "OneShotSchedule(epoch=0)"):
        assert part in text


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_a_copy_does_the_same(duplicate: Any) -> None:
    results = []
    original = pruning(schedule=PolynomialSchedule(0, 1))
    for pruner in (original, duplicate(original)):
        seed_all(3)
        module = Classifier()
        trainer(pruner).fit(module, loader())
        results.append(module.state_dict())
    assert differences(*results) == []
    after = duplicate(original)
    assert repr(after) == repr(original)
    assert differences(after.masks.state_dict(), original.masks.state_dict()) == []


# ---------------------------------------------------------------- two processes


def prune_in_ddp(world_size: int) -> dict[str, Any]:
    """Job: what pruning at the first and the third epoch gives."""
    results: dict[str, Any] = {}
    options = {"devices": world_size, "strategy": "ddp"}
    modules = {"plain": Classifier, "manual": Manual, "all": Talkative}
    for name, module in modules.items():
        seed_all(4)
        pruner = pruning(schedule=PolynomialSchedule(0, 2, 2))
        first, third = Snapshot(0), Snapshot(2)
        callbacks = (pruner, first, third)
        if name == "manual":
            options["strategy"] = "ddp_find_unused_parameters_true"
        trainer(*callbacks, max_epochs=3, **options).fit(module(), loader())
        results[name] = {
            "first": first.weights,
            "third": third.weights,
            "masks": pruner.masks.state_dict(),
            "reports": [{**r.to_dict(), "seconds": {}} for r in pruner.reports],
        }
    # A training step that fails on one rank while gradients are collected.
    module = FailsOnRankOne()
    # One by one, so that rank 1 has the fourth of the six gradients.
    one_by_one = FisherConfig(6, 2, 16, collection="loop")
    fitted = trainer(pruning(fisher=one_by_one), **options)
    try:
        fitted.fit(module, loader())
    except (LookupError, PruningError) as error:
        results["error"] = (type(error).__name__, str(error))
    results["hooks"] = [len(o._optimizer_step_post_hooks) for o in fitted.optimizers]
    results["zeros after the error"] = zeros(module)
    return results


class FailsOnRankOne(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and batch_idx == 3:
            raise LookupError("where is it?")
        return super().training_step(batch, batch_idx)


def test_pruning_in_ddp(ranks: RankPool) -> None:
    (alone,) = ranks.run(1, prune_in_ddp, 1, launch="trainer")
    both = ranks.run(2, prune_in_ddp, 2, launch="trainer")
    # Rank 0 logs the loss of its own samples.
    varies = {"bytes_exchanged", "fisher_bytes", "world_size", "logged_after"}
    for name in ("plain", "manual", "all"):
        mine, theirs = (result[name] for result in both)
        assert set(mine["masks"]) == {"net.0.weight", "net.5.weight", "net.7.weight"}
        # BatchNorm's running statistics belong to each rank; all else is shared.
        for moment in ("first", "third"):
            left, right = (
                {k: v for k, v in result[moment].items() if "running" not in k}
                for result in (mine, theirs)
            )
            assert differences(left, right) == [], (name, moment)
        assert differences(mine["masks"], theirs["masks"]) == []
        assert differences(mine["reports"], theirs["reports"]) == []
        # Before any training the two ranks do what one alone does.
        assert differences(mine["first"], alone[name]["first"]) == []
        first, other = (
            {k: v for k, v in result[name]["reports"][0].items() if k not in varies}
            for result in (both[0], alone)
        )
        assert differences(first, other) == []
        assert mine["reports"][0]["world_size"] == 2
    assert [result["error"][0] for result in both] == ["PruningError", "LookupError"]
    assert both[0]["error"][1] == (
        "rank 1 failed in phase 'collect': LookupError: where is it?"
    )
    assert all(result["hooks"] == [0] for result in both)
    assert all(result["zeros after the error"] == 0 for result in both)


# ---------------------------------------------------------------- layers apart


class Uneven(Classifier):
    """Its second layer is almost gone, the others are dense."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.net[5].weight.view(-1)[:1270] = 0.0


@pytest.mark.parametrize("target", [0.5, 0.95, 0.985])
def test_a_sparse_layer_does_not_keep_the_schedule_from_the_others(
    target: float,
) -> None:
    schedule = PolynomialSchedule(0, 1, initial_sparsity=0.1)
    pruner = pruning(
        target_sparsity=target,
        schedule=schedule,
        selection=SelectionConfig(scope="layer"),
    )
    module = Uneven()
    if target < 1270 / 1296:
        with pytest.raises(
            ConfigurationError, match=r"net\.5\.weight \(0\.9799, target"
        ):
            trainer(pruner).fit(module, loader())
        return
    # The first step wants less than the layer has.
    trainer(pruner).fit(module, loader())
    zeros = [int((module.net[i].weight == 0).sum()) for i in (0, 5, 7)]
    assert zeros == [round(target * count) for count in (27, 1296, 48)]
    first = [layer.zeros_after for layer in pruner.reports[0].layers]
    assert first[1] == 1270
    assert len(pruner.reports) == 2


# ---------------------------------------------------------------- found in time


class Late(Counting):
    """Its hooks prepare what its training step needs."""

    def on_train_epoch_start(self) -> None:
        self.weight = 1.0 + self.current_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.weight


def test_a_useless_training_step_is_found_before_the_first_batch() -> None:
    class Broken(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

    for options in (
        {"schedule": OneShotSchedule(epoch=1)},
        {"schedule": OneShotSchedule(step=9)},
        {"schedule": OneShotSchedule(epoch=1), "criterion": "magnitude"},
    ):
        module = Broken()
        with pytest.raises(
            PruningError, match="Broken.training_step returned NoneType"
        ):
            trainer(pruning(**options)).fit(module, loader())
        # Twice in evaluation mode, and once in training mode in search of a remedy.
        assert module.steps == 3


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("make", [Talkative, Late, Manual])
def test_the_rehearsal_leaves_no_trace(
    make: Any, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes, rehearsals = [], []
    original = Pruner.rehearse
    for runs in (True, False):

        def rehearse(self: Pruner, source: Any, runs: bool = runs) -> None:
            rehearsals.append(runs)
            if runs:
                original(self, source)

        monkeypatch.setattr(Pruner, "rehearse", rehearse)
        seed_all(3)
        fisher = FisherConfig(6, 2, 16, model_mode=mode)
        pruner = pruning(schedule=OneShotSchedule(epoch=1), fisher=fisher)
        fitted = trainer(pruner)
        fitted.fit(make(), loader())
        outcomes.append([final_state(fitted), torch.get_rng_state()])
    assert rehearsals == [True, False]
    assert differences(*outcomes) == []


def test_there_is_no_rehearsal_where_nothing_is_to_be_found() -> None:
    counts = {}
    batches = [batch for _ in range(2) for batch in loader()]
    for name, options in {
        "iterator": {"dataloader": iter(batches), "schedule": OneShotSchedule(epoch=1)},
        "epoch 0": {"schedule": OneShotSchedule(epoch=0)},
        "epoch 1": {"schedule": OneShotSchedule(epoch=1)},
    }.items():
        module = Counting()
        fisher = FisherConfig(6, 2, 16, collection="loop")
        pruner = pruning(fisher=fisher, **in_step(**{"measure_loss": False, **options}))
        trainer(pruner).fit(module, loader())
        counts[name] = module.steps - 12  # Of training.
    # Six gradients, and four trials of all samples, which in a stream come in six batches.
    assert counts == {"iterator": 6 + 24, "epoch 0": 6 + 4, "epoch 1": 1 + 6 + 4}


def test_magnitude_without_measurement_needs_no_samples() -> None:
    large = FisherConfig(num_gradients=1000)
    options: dict[str, Any] = {"criterion": "magnitude", "fisher": large}
    pruner = pruning(measure_loss=False, **options)
    trainer(pruner).fit(Classifier(), loader())
    assert pruner.masks.sparsity() > 0.74
    # Measured on the 48 samples that there are.
    pruner = pruning(**options)
    trainer(pruner).fit(Classifier(), loader())
    assert pruner.reports[0].num_gradients == 48


@pytest.mark.parametrize(
    ("steps", "accumulated", "epochs"), [(13, 1, 3), (12, 1, 2), (4, 4, 2), (5, 4, 3)]
)
def test_max_steps_limit_the_epochs(steps: int, accumulated: int, epochs: int) -> None:
    options = {
        "max_epochs": None,
        "max_steps": steps,
        "accumulate_grad_batches": accumulated,
    }
    pruner = pruning(schedule=OneShotSchedule(epoch=epochs - 1))
    trainer(pruner, **options).fit(Classifier(), loader())
    assert pruner.reports[0].epoch == epochs - 1
    module = Counting()
    with pytest.raises(ConfigurationError, match=f"training has only {epochs} epochs"):
        trainer(pruning(schedule=OneShotSchedule(epoch=epochs)), **options).fit(
            module, loader()
        )
    assert module.steps == 0


def test_manual_optimisation_has_no_known_number_of_steps() -> None:
    # Two optimizers make 24 steps of 12 batches.
    ramp = PolynomialSchedule(start_step=0, every_n_steps=5)
    with pytest.raises(ConfigurationError, match="manual optimization .* set end_step"):
        trainer(pruning(schedule=ramp)).fit(Manual(), loader())
    late = pruning(schedule=OneShotSchedule(step=20))
    trainer(late).fit(Manual(), loader())
    assert [report.step for report in late.reports] == [20]
    ending = pruning(schedule=ramp)
    trainer(ending, max_epochs=-1, max_steps=12).fit(Manual(), loader())
    assert ending.masks.sparsity() > 0.74
