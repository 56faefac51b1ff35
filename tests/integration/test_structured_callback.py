"""Whole channels removed during fit: masks, smaller models, resuming, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structured_fits
import torch
import yaml
from devices import ACCELERATOR
from fits import (
    MemoryLogger,
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
from structured_fits import (
    CHANNELS,
    Module,
    ResidualNet,
    WithForward,
    config,
    structured,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_woodfisher import (
    ConfigurationError,
    ConstantSchedule,
    HAPPruningCallback,
    OneShotSchedule,
    PolynomialSchedule,
    PruningError,
    SOSPPruningCallback,
    load_shrunk,
)
from lightning_woodfisher.cli.main import main
from lightning_woodfisher.structured.graph.groups import channel_masks

METHODS: dict[str, dict[str, Any]] = {
    "sosp_i": {"kind": SOSPPruningCallback, "variant": "I"},
    "sosp_h": {"kind": SOSPPruningCallback, "variant": "H"},
    "hap": {"kind": HAPPruningCallback},
    "magnitude": {"config": config(method="magnitude")},
    "random": {"config": config(method="random")},
}


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-2)


def fit(callback: Any, module: Any = None, *more: Any, **options: Any) -> Any:
    seed_all(1)
    module = module or Module()
    fitted = trainer(callback, *more, **options)
    fitted.fit(module, loader(), loader(16, shuffle=False))
    return module


def removed_of(callback: Any) -> int:
    return sum(len(s) for s in callback.reports[-1].removed.values())


def slices(net: ResidualNet, removed: dict[str, Any]) -> list[Tensor]:
    """All that must be zero, written out by hand."""
    outer, inner = list(removed.get("stem", ())), list(removed.get("conv1", ()))
    found = [t.weight[outer] for t in (net.stem, net.bn, net.conv2, net.bn2)]
    found += [net.bn.bias[outer], net.bn2.bias[outer]]
    found += [net.conv1.weight[inner], net.conv1.bias[inner]]
    return [*found, net.bn1.weight[inner], net.bn1.bias[inner]]


def assert_equals_removal(callback: Any, module: Any) -> None:
    pixels = images(16).tensors[0]
    module.eval()
    smaller = callback.shrunk_model(module).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(pixels), module.net(pixels), rtol=0, atol=1e-5
        )
    dense = sum(p.numel() for p in module.net.parameters())
    report = callback.reports[-1]
    gone = dense - sum(p.numel() for p in smaller.parameters())
    assert gone == report.parameters_dense - report.parameters > 0
    net = getattr(smaller, "net", smaller)
    for layer, group in (("stem", "stem"), ("conv1", "conv1")):
        gone = len(callback.removed.get(group, ()))
        before = getattr(module.net, layer).out_channels
        assert getattr(net, layer).out_channels == before - gone


# The settings of unstructured pruning are not named.
TOO_MANY = (
    r"^num_samples=49 is more than the 48 samples that the data has; lower num_samples to "
    r"at most 48, or give more data\.$"
)


@pytest.mark.parametrize("method", METHODS)
def test_channels_stay_away_and_can_be_cut_out(method: str) -> None:
    callback = structured(**METHODS[method])
    module = fit(callback, Module(optimizer=momentum))
    assert removed_of(callback) == CHANNELS // 2
    assert callback.reports[0].method == method
    assert callback.reports[0].parameters_dense == sum(
        p.numel() for p in module.parameters()
    )
    gone = slices(module.net, callback.removed)
    assert sum(t.numel() for t in gone) > 50
    assert all(bool((t == 0).all()) for t in gone)
    alive = [g for g in ("stem", "conv1") if len(callback.removed.get(g, ())) < 6]
    assert alive
    for parameter in module.net.parameters():
        assert bool((parameter != 0).any())
    assert_equals_removal(callback, module)


@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_targets_are_met_with_adam_over_a_schedule(measure: str) -> None:
    callback = structured(
        SOSPPruningCallback,
        variant="I",
        target=0.6,
        config=config(measure=measure),
        schedule=PolynomialSchedule(0, 3),
    )
    module = fit(callback, WithForward(), max_epochs=4)
    reports = callback.reports
    assert len(reports) > 2
    for before, after in zip(reports, reports[1:], strict=False):
        for name, structures in before.removed.items():
            assert {*structures} <= {*after.removed[name]}
    for report in reports:
        left, dense = getattr(report, measure), getattr(report, f"{measure}_dense")
        assert left <= (1 - report.target) * dense
    gone = slices(
        module.net, {n.split(".")[-1]: s for n, s in callback.removed.items()}
    )
    assert all(bool((t == 0).all()) for t in gone)
    pixels = images(16).tensors[0]
    module.eval()
    torch.testing.assert_close(
        callback.shrunk_model(module)(pixels), module(pixels), rtol=0, atol=1e-5
    )


def test_the_report_the_export_and_the_time(tmp_path: Path) -> None:
    logger = MemoryLogger()
    callback = structured(
        SOSPPruningCallback,
        report_path=str(tmp_path / "reports" / "r.json"),
        export_path=str(tmp_path / "small"),
        latency_runs=3,
    )
    module = fit(callback, None, logger=logger).eval()
    (plain,) = json.loads((tmp_path / "reports" / "r.json").read_text())
    report = callback.reports[0]
    assert type(report).from_dict(plain) == report
    assert plain["epoch"] == 0
    assert plain["step"] == 0
    fresh = load_shrunk(tmp_path / "small", ResidualNet().eval())
    pixels = images(16).tensors[0]
    assert torch.equal(fresh(pixels), callback.shrunk_model(module)(pixels))
    torch.testing.assert_close(fresh(pixels), module.net(pixels), rtol=0, atol=1e-5)
    assert report.latency_runs == 3
    assert report.latency > 0 < report.latency_dense
    logged = {k: v for _, numbers in logger.history for k, v in numbers.items()}
    assert logged["pruning/latency_dense"] == report.latency_dense
    assert logged["pruning/latency"] == report.latency
    assert plain["latency_runs"] == 3
    assert logged["pruning/structures_removed"] == 0.5
    assert logged["pruning/channels/net.conv1"] == 8 - len(callback.removed["conv1"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_with_more_epochs_removes_channels_once() -> None:
    """A share of training is later in a longer one, when the target is reached already."""

    def run(epochs: int, resumed: str | None = None) -> Any:
        seed_all(1)
        callback = structured(schedule=OneShotSchedule(share=0.5))
        fitted = trainer(callback, max_epochs=epochs)
        fitted.fit(Module(), loader(), ckpt_path=resumed)
        fitted.save_checkpoint("last.ckpt")
        return callback

    short = run(2)
    longer = run(4, "last.ckpt")
    assert [report.epoch for report in longer.reports] == [1]
    assert longer.removed == short.removed


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    data = loader(shuffle=False, sampler=DistributedSampler(images(), 1, 0))

    def run(
        resumed: str | None = None, *more: Any, epochs: int = 4, **options: Any
    ) -> Any:
        seed_all(1 if resumed is None else 99)
        callback = structured(
            SOSPPruningCallback, variant="I", schedule=PolynomialSchedule(0, 3)
        )
        fitted = trainer(Reseed(), callback, *more, max_epochs=epochs, **options)
        fitted.fit(Module(), data, ckpt_path=resumed)
        reports = [{**r.to_dict(), "seconds": {}} for r in callback.reports]
        return callback, final_state(fitted), callback.state_dict()["masks"], reports

    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = run(None, saving, enable_checkpointing=True)
    paths = sorted(map(str, tmp_path.glob("*.ckpt")))
    assert len(paths) == 4
    for path in paths[:2]:
        resumed = run(path)
        assert differences(list(resumed[1:]), list(whole[1:])) == []
    assert [len(g["removed"]) for g in whole[3][0]["groups"]] != [
        len(g["removed"]) for g in whole[3][-1]["groups"]
    ]
    state = torch.load(paths[0], weights_only=True)["callbacks"]
    assert whole[0].state_key in state
    assert "network" in whole[0].state_key
    # A run that has nothing left to train ends as it began, and can be cut all the same.
    module = Module().eval()
    callback = structured(
        SOSPPruningCallback,
        variant="I",
        schedule=PolynomialSchedule(0, 3),
        export_path=str(tmp_path / "small"),
    )
    trainer(callback, max_epochs=4).fit(module, data, ckpt_path=paths[-1])
    assert callback.reports == whole[0].reports
    assert_equals_removal(callback, module)
    small = load_shrunk(tmp_path / "small", ResidualNet()).eval()
    pixels = images(16).tensors[0]
    torch.testing.assert_close(small(pixels), module.net(pixels), rtol=0, atol=1e-5)


def write_yaml(callback: dict[str, Any]) -> str:
    path = Path("run.yaml")
    settings = {
        "max_epochs": 1,
        "accelerator": ACCELERATOR,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [callback],
    }
    data = {"class_path": "structured_fits.Data"}
    whole = {
        "seed_everything": 1,
        "trainer": settings,
        "model": "structured_fits.Module",
        "data": data,
    }
    path.write_text(yaml.safe_dump(whole))
    return str(path)


def test_yaml_with_short_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning's use of jsonargparse is behind its time.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-woodfisher"])
    init: dict[str, Any] = {
        "target": 0.5,
        "report_path": "r.json",
        "config": {
            "measure": "structures",
            "num_samples": 16,
            "batch_size": 8,
            "batchnorm_recalibration_batches": 2,
        },
    }
    more = {"variant": "I", "schedule": {"class_path": "OneShotSchedule"}}
    callback = {"class_path": "SOSPPruningCallback", "init_args": {**init, **more}}
    assert main(["fit", "--config", write_yaml(callback)]) == 0
    (report,) = json.loads(Path("r.json").read_text())
    assert report["method"] == "sosp_i"
    assert report["batchnorm_layers"] == 3
    assert sum(len(g["removed"]) for g in report["groups"]) == 7
    init["config"] = {"num_sample": 16}
    path = write_yaml({"class_path": "SOSPPruningCallback", "init_args": init})
    with pytest.raises(SystemExit):
        main(["fit", "--config", path])
    assert "num_samples" in capsys.readouterr().err


def fit_on_ranks(world_size: int) -> Any:
    torch.set_num_threads(1)
    found: list[Any] = []
    times: list[Any] = []
    for kind, batches, more in (
        (SOSPPruningCallback, 0, {"variant": "I", "latency_runs": 2}),
        (HAPPruningCallback, 3, {"implant_ratio": 0.5, "implant_init": "lstsq"}),
    ):
        callback = structured(
            kind,
            target=0.4,
            config=config(measure="macs", batchnorm_recalibration_batches=batches),
            schedule=PolynomialSchedule(0, 1),
            **more,
        )
        sampler = DistributedSampler(images(), world_size, 0, shuffle=False)
        torch.manual_seed(0)
        # Nothing is learned, so that only pruning changes the weights.
        module = Module(optimizer=lambda p: torch.optim.SGD(p, 0.0))
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.0
        strategy = "ddp" if world_size > 1 else "auto"
        fitted = trainer(callback, strategy=strategy, devices=world_size)
        fitted.fit(module, DataLoader(images(), 8, sampler=sampler))
        weights = {
            n: t for n, t in module.net.state_dict().items() if "tracked" not in n
        }
        reports = [(r.removed, r.implanted) for r in callback.reports]
        found.append([reports, weights])
        times += [(r.latency_dense, r.latency) for r in callback.reports]
    return found, times


def test_one_and_two_processes_remove_the_same(ranks: RankPool) -> None:
    ((alone, _),) = ranks.run(1, fit_on_ranks, 1)
    for reports, _ in alone:
        assert sum(len(s) for s in reports[-1][0].values()) > 2
    assert sum(len(s) for s in alone[1][0][-1][1].values()) > 1
    # The statistics of the second run are new.
    assert not bool((alone[1][1]["bn1.running_var"] == 1).any())
    both = ranks.run(2, fit_on_ranks, 2, launch="trainer")
    for found, times in both:
        assert differences(found, alone) == []
        # Of one clock, and the same in the reports of all ranks.
        assert times == both[0][1]
        assert min(times[0]) > 0


@pytest.mark.parametrize("channels_first", [True, False])
def test_channels_then_weights_in_one_run(channels_first: bool) -> None:
    first = structured(SOSPPruningCallback)
    second = pruning(target_sparsity=0.8, schedule=PolynomialSchedule(1, 1))
    order = [first, second] if channels_first else [second, first]
    module = fit(order[0], None, order[1], max_epochs=3)
    assert len(first.reports) == len(second.reports) == 1
    assert all(bool((t == 0).all()) for t in slices(module.net, first.removed))
    assert_equals_removal(first, module)
    # WoodFisher counts the channels: exactly k zeros, all channels among them.
    masks = second.masks
    weights = sum(p.numel() for p in masks.parameters.values())
    zeros = sum(int((p == 0).sum()) for p in masks.parameters.values())
    assert zeros == round(0.8 * weights) == sum(masks.zeros().values())
    gone = channel_masks(module.net, first._groups, first.removed)
    gone = {f"net.{name}": mask for name, mask in gone.items()}
    for name in masks.parameters:
        if name in gone:
            assert not bool((masks.kept(name) & gone[name]).any())


def test_fine_tuning_keeps_channels_that_are_zero(tmp_path: Path) -> None:
    """From the weights alone: a channel is removed if all of it is zero."""
    first = structured(config=config(structure="conv"))
    module = Module()
    trainer(first).fit(module, loader())
    assert removed_of(first) == CHANNELS // 2
    # A layer that begins with zeros is not one without channels.
    for name in ("stem", "bn", "conv2", "bn2"):
        for parameter in module.net.get_submodule(name).parameters():
            torch.nn.init.zeros_(parameter)
    again = structured(
        config=config(structure="conv"),
        schedule=ConstantSchedule(),
        export_path=str(tmp_path / "small"),
    )
    tuned = Module()
    tuned.load_state_dict(module.state_dict())
    trainer(again).fit(tuned, loader())
    assert again.reports == []
    assert again.removed == {"conv1": first.removed["conv1"]}
    assert not torch.equal(tuned.net.conv1.weight, module.net.conv1.weight)
    assert bool(again.masks.kept("net.stem.weight").all())
    small = load_shrunk(tmp_path / "small", ResidualNet()).eval()
    assert small.conv1.out_channels == 8 - len(again.removed["conv1"])
    pixels = images(16).tensors[0]
    torch.testing.assert_close(
        small(pixels), tuned.eval().net(pixels), rtol=0, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("init", ["zero", "lstsq"])
def test_implants_are_trained_exported_and_resumed(init: Any, tmp_path: Path) -> None:
    data = loader(shuffle=False, sampler=DistributedSampler(images(), 1, 0))

    def run(resumed: str | None = None, *more: Any, **options: Any) -> Any:
        seed_all(1)
        callback = structured(
            HAPPruningCallback,
            config=config(structure="conv+bn"),
            schedule=PolynomialSchedule(1, 2),
            implant_ratio=0.5,
            implant_init=init,
            export_path=str(tmp_path / "small"),
        )
        module = Module(optimizer=momentum)
        fitted = trainer(Reseed(), callback, *more, max_epochs=4, **options)
        fitted.fit(module, data, ckpt_path=resumed)
        return callback, module, final_state(fitted)

    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callback, module, state = run(None, saving, enable_checkpointing=True)
    report = callback.reports[-1]
    made = sum(map(len, report.implanted.values()))
    assert made in {3, 4}
    assert made + removed_of(callback) == 7
    # Trained, and nothing but the centre taps. From zero, a channel whose norm has a bias
    # below zero gets no gradient through its ReLU, and stays.
    trained = 0
    for name, layers in {"stem": ("stem", "conv2"), "conv1": ("conv1",)}.items():
        for layer in layers:
            weight = getattr(module.net, layer).weight.detach()
            for s in callback.implanted.get(name, ()):
                centre = weight[s, :, 1, 1].clone()
                assert int((weight[s] != 0).sum()) == int((centre != 0).sum())
                trained += bool((centre != 0).any())
                assert init == "zero" or bool((centre != 0).any())
    assert trained
    pixels = images(16).tensors[0]
    expected = module.eval().net(pixels)
    smaller = callback.shrunk_model(module).eval()
    torch.testing.assert_close(smaller(pixels), expected, rtol=0, atol=1e-5)
    gone = report.parameters_dense - report.parameters
    for net, sign in ((module.net, 1), (smaller, -1)):
        gone -= sign * sum(p.numel() for p in net.parameters())
    assert gone == 0
    fresh = load_shrunk(tmp_path / "small", ResidualNet().eval())
    assert torch.equal(fresh(pixels), smaller(pixels))
    again, _, resumed = run(str(tmp_path / "epoch=1.ckpt"))
    assert differences(resumed, state) == []
    assert again.implanted == callback.implanted


class Broken(Module):
    """The loss fails once channels are gone."""

    def loss(self, batch: Any) -> Tensor:
        if bool((self.net.bn1.weight == 0).any()):
            raise RuntimeError("no channels")
        return super().loss(batch)


def test_a_failing_step_leaves_everything() -> None:
    callback, module = structured(SOSPPruningCallback), Broken()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises((RuntimeError, PruningError), match="no channels"):
        fit(callback, module)
    assert callback.reports == []
    assert callback.masks.state_dict() == {}
    after = {n: p.detach() for n, p in module.named_parameters()}
    assert differences(after, before) == []


class ZeroHead(Module):
    """No gradient passes its head before the first optimizer step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        nn.init.zeros_(self.net.fc.weight)


@pytest.mark.parametrize("kind", [SOSPPruningCallback, HAPPruningCallback])
def test_a_head_of_zeros_is_trained_before_channels_are_ranked(kind: Any) -> None:
    # Nothing is known of the channels, so the first step is refused.
    callback = structured(kind)
    with pytest.raises(PruningError, match="zero for all structures"):
        fit(callback, ZeroHead())
    callback = structured(kind, schedule=OneShotSchedule(1), report_path="r.json")
    module = fit(callback, ZeroHead(), max_epochs=2)
    assert removed_of(callback) == CHANNELS // 2
    assert_equals_removal(callback, module)
    # JSON has no NaN.
    (plain,) = json.loads(Path("r.json").read_text(), parse_constant=pytest.fail)
    assert plain["notes"] == callback.reports[0].notes


class TwoCalls(Module):
    """No module that is called holds all layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.other = nn.Conv2d(1, 1, 3, padding=1)

    def loss(self, batch: Any) -> Tensor:
        return super().loss([self.other(batch[0]), batch[1]])


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"network": "nett"}, Module, "network='nett' is not called"),
        ({}, TwoCalls, "no module of TwoCalls that is called holds all"),
        ({"config": config(only=["fc"])}, Module, "fc"),
        ({"target": 0.95}, Module, "the limits of the groups allow"),
        ({"config": config(num_samples=49)}, Module, TOO_MANY),
        ({"report_path": "."}, Module, "report_path='.' is a folder"),
        ({"export_path": "/dev/null"}, Module, "/plan.json' cannot be written"),
        ({"loss_method": "absent"}, Module, "loss_method='absent'"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    options: dict[str, Any], module: Any, message: str
) -> None:
    callback = structured(schedule=PolynomialSchedule(1, 1), **options)
    with pytest.raises(ConfigurationError, match=message):
        fit(callback, module())
    assert callback.reports == []


def test_bad_settings_are_refused() -> None:
    for options, message in (
        ({"target": 1.0}, "target=1.0"),
        ({"latency_runs": -1}, "latency_runs=-1"),
        ({"latency_runs": True}, "latency_runs=True"),
        ({"dataloader": iter([])}, "read only once"),
        ({"kind": SOSPPruningCallback, "variant": "J"}, "variant='J'"),
        (
            {
                "kind": HAPPruningCallback,
                "implant_ratio": 0.2,
                "config": config(round_to=4),
            },
            "round_to=4",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            structured(**options)
    with pytest.raises(ConfigurationError, match="measure='flops'"):
        config(measure="flops")
    with pytest.raises(ConfigurationError, match="batches=-1 must be at least 0"):
        config(batchnorm_recalibration_batches=-1)
    with pytest.raises(ConfigurationError, match="select the same weights"):
        fit(structured(), None, structured(HAPPruningCallback))


def test_a_named_network_is_pruned_alone() -> None:
    callback = structured(network="net")
    module = fit(callback, TwoCalls())
    assert isinstance(callback.shrunk_model(module), ResidualNet)
    assert_equals_removal(callback, module)


def test_fast_dev_run() -> None:
    callback = structured(schedule=PolynomialSchedule(5, 9))
    fit(callback, None, fast_dev_run=1)
    assert removed_of(callback) == CHANNELS // 2


class Autocast(Module):
    """Notes whether autocast is on where derivatives and losses are computed."""

    def loss(self, batch: Any) -> Tensor:
        self.seen = getattr(self, "seen", [])
        self.seen.append((self.net.training, torch.is_autocast_enabled(ACCELERATOR)))
        return super().loss(batch)


def test_mixed_precision_is_off_while_scoring() -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        callback = structured(SOSPPruningCallback, variant="I")
        seed_all(1)
        module = Autocast()
        trainer(callback, precision=precision, max_epochs=1).fit(module, loader())
        mixed = precision != "32-true"
        assert {on for training, on in module.seen if training} == {mixed}
        assert {on for training, on in module.seen if not training} == {False}
        found.append(
            {**callback.reports[0].to_dict(), "seconds": {}, "logged_after": {}}
        )
    assert differences(*found) == []


# Dynamo reads .grad of tensors that are no leaves when it compiles self.log().
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("where", ["a part", "in place", "the module"])
def test_compiled_networks_lose_the_same_channels(where: str) -> None:
    found, pixels = [], images(16).tensors[0]
    for compiles in (False, True):
        torch._dynamo.reset()
        callback = structured(SOSPPruningCallback, latency_runs=1)
        seed_all(1)
        module: Any = Module()
        if compiles and where == "a part":
            module.net = torch.compile(module.net, backend="eager")
        elif compiles and where == "in place":
            module.net.compile(backend="eager")
        whole = compiles and where == "the module"
        given = torch.compile(module, backend="eager") if whole else module
        trainer(callback).fit(given, loader())
        smaller = callback.shrunk_model(module).eval()(pixels)
        torch.testing.assert_close(
            smaller, module.eval().net(pixels), rtol=0, atol=1e-5
        )
        (report,) = callback.reports
        found.append([*report.removed.values(), report.loss_before, report.loss_after])
    assert found[0] == found[1]


IN_A_FRESH_PROCESS = """
import sys, torch
sys.path[:0] = [{support!r}]
from structured_fits import Module, ResidualNet
from lightning_woodfisher import load_shrunk
from lightning_woodfisher.cli.main import main

pixels = torch.load("pixels.pt", weights_only=True)
for name in ("sosp", "hap"):
    command = f"export {{name}}.ckpt --format shrunk --network net --out {{name}}"
    assert main(command.split()) == 0
    expected = torch.load(f"{{name}}.pt", weights_only=True)
    for path in (name, f"{{name}}.ckpt"):
        found = load_shrunk(path, ResidualNet()).eval()
        assert torch.equal(found(pixels), expected), path
    whole = load_shrunk(f"{{name}}.ckpt", Module()).eval()
    assert torch.equal(whole.net(pixels), expected)
"""


@pytest.mark.spawns
def test_the_checkpoint_is_all_that_a_fresh_process_needs() -> None:
    pixels = images(16).tensors[0]
    torch.save(pixels, "pixels.pt")
    implants = {"implant_ratio": 0.5, "implant_init": "center"}
    for name, callback in {
        "sosp": structured(SOSPPruningCallback),
        "hap": structured(HAPPruningCallback, **implants),
    }.items():
        fitted = trainer(callback, max_epochs=1)
        seed_all(1)
        module = Module()
        fitted.fit(module, loader())
        fitted.save_checkpoint(f"{name}.ckpt")
        small = callback.shrunk_model(module).eval()
        torch.save(small(pixels).detach(), f"{name}.pt")
        assert bool(callback.implanted) == (name == "hap")
    support = str(Path(structured_fits.__file__).parent)
    script = IN_A_FRESH_PROCESS.format(support=support)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def test_what_has_no_smaller_network(capsys: pytest.CaptureFixture[str]) -> None:
    callback = structured(SOSPPruningCallback, schedule=PolynomialSchedule(0, 2))
    saving = ModelCheckpoint(".", "{epoch}", save_top_k=-1)
    fit(callback, None, saving, max_epochs=3, enable_checkpointing=True)
    torch.save({"state_dict": Module().state_dict()}, "plain.ckpt")
    Path("file").touch()
    for arguments, message in {
        "plain.ckpt --out small": "has no plan of removed channels",
        "plain.ckpt --out file": "--out file is a file; give a folder",
        "plain.ckpt --out small --from_zeros": "--from_zeros has no effect",
    }.items():
        command = ["export", *arguments.split(), "--format", "shrunk"]
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert main(["export", "epoch=0.ckpt", "--format", "shrunk", "--out", "small"]) == 0
    shown = capsys.readouterr()
    assert "not at the target" in shown.err
    small, dense = (
        sum(tensor.numel() for tensor in module.state_dict().values())
        for module in (load_shrunk("small", Module()), Module())
    )
    assert small < dense
    assert f"Smaller network: {small:,} of {dense:,} numbers" in shown.out


IN_FORKED_PROCESSES = """
import sys, warnings
sys.path[:0] = [{support!r}]
import pytest, torch
from fits import loader, trainer
from structured_fits import Module, ResidualNet, structured
from lightning_woodfisher import ConfigurationError, load_shrunk

callback = structured(report_path="r.json", export_path="small")
fitted = trainer(callback, max_epochs=1, devices=1, strategy="ddp_fork")
module = Module()
fitted.fit(module, loader())
assert callback.reports == [] and callback.masks is None
with pytest.raises(ConfigurationError, match="load_shrunk .* also after ddp_spawn"):
    callback.shrunk_model(module)
pixels = torch.rand(2, 1, 8, 8)
small = load_shrunk("small", ResidualNet()).eval()
torch.testing.assert_close(small(pixels), module.eval().net(pixels), rtol=0, atol=1e-5)
"""


@pytest.mark.spawns
@pytest.mark.slow
def test_what_stays_in_forked_processes_is_said() -> None:
    support = str(Path(structured_fits.__file__).parent)
    script = IN_FORKED_PROCESSES.format(support=support)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "read them from report_path or from a checkpoint" in done.stderr
    assert len(json.loads(Path("r.json").read_text())) == 1
