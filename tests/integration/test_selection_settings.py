"""Patterns, targets of layers and FLOPs: on several processes, sharded, and in a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fits import Classifier, differences, loader, pruning, seed_all, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rank_pool import RankPool
from step_options import in_step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PolynomialSchedule,
    SelectionConfig,
    prune,
)

pytestmark = [
    # The resumed run does not save; Lightning misses the ModelCheckpoint.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def network() -> nn.Sequential:
    seed_all(3)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 4),
    )


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(80, 4, 6, 6, generator=generator)
    return TensorDataset(pixels, torch.randint(0, 4, (80,), generator=generator))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


PRIMAL, DUAL, FULL = (
    FisherConfig(24, 2, 16),
    FisherConfig(9, 2, 50),
    FisherConfig(13, 3, None),
)
CASES: dict[str, dict[str, Any]] = {
    f"{pattern}, {name}": {
        "target_sparsity": target,
        "fisher": fisher,
        "selection": SelectionConfig(pattern=pattern),
    }
    for name, fisher in {"primal": PRIMAL, "dual": DUAL, "full": FULL}.items()
    for pattern, target in {"2:4": 0.5, "block4": 0.6, "rows": 0.4}.items()
}
CASES |= {
    "magnitude": {
        "target_sparsity": 0.75,
        "criterion": "magnitude",
        "selection": SelectionConfig(pattern="1:4"),
    },
    "magnitude, rows": {
        "target_sparsity": 0.5,
        "criterion": "magnitude",
        "selection": SelectionConfig(pattern="rows", scope="layer"),
    },
    "2:4 in parts": {
        "target_sparsity": 0.5,
        "recompute_steps": 3,
        "selection": SelectionConfig(pattern="2:4"),
    },
    "limit": {
        "target_sparsity": 0.7,
        "selection": SelectionConfig(max_layer_sparsity=0.72),
    },
    "targets": {
        "target_sparsity": 0.7,
        "recompute_steps": 2,
        "selection": SelectionConfig(layer_targets={"^0": 0.2, "6": 0.5}),
    },
    "power": {
        "target_sparsity": 0.6,
        "selection": SelectionConfig(flops_power=0.5),
    },
    "flops": {"flops_target": 0.4, "recompute_steps": 2},
    "flops, blocks with a limit": {
        "flops_target": 0.5,
        "selection": SelectionConfig(pattern="block2", max_layer_sparsity=0.8),
    },
}


def step(name: str, net: nn.Module) -> dict[str, Any]:
    options = {"fisher": PRIMAL, **CASES[name]}
    report = prune(net, images(), loss, **in_step(**{"seed": 5, **options})).to_dict()
    varies = ("seconds", "bytes_exchanged", "fisher_bytes", "world_size")
    return {k: v for k, v in report.items() if k not in varies}


def every_step() -> dict[str, Any]:
    """Job: every case."""
    results = {}
    for name in CASES:
        net = network()
        results[name] = step(name, net), net.state_dict()
    return results


def test_world_size_does_not_change_the_result(ranks: RankPool) -> None:
    (expected,) = ranks.run(1, every_step)
    for world_size in (2, 3):
        for found in ranks.run(world_size, every_step):
            assert differences(found, expected) == []
    for name, (report, state) in expected.items():
        options = CASES[name]
        zeros = sum(layer["zeros_after"] for layer in report["layers"])
        weights = {k: v for k, v in state.items() if v.dim() > 1}
        total = sum(v.numel() for v in weights.values())
        assert zeros == sum(int((v == 0).sum()) for v in weights.values()) > 0
        if "rows" not in name and "target_sparsity" in options:
            assert zeros == pytest.approx(options["target_sparsity"] * total, abs=4)
        if "flops" in name:
            share = report["flops_after"] / report["flops_dense"]
            # Two weights of the first layer are more than half a per cent.
            near = 0.01 if "blocks" in name else 0.005
            assert share == pytest.approx(options["flops_target"], rel=near)


SHARDED = (
    "2:4, primal",
    "block4, dual",
    "magnitude",
    "2:4 in parts",
    "limit",
    "targets",
)


def sharded_steps(world_size: int) -> dict[str, Any]:
    """Job: some cases with sharded parameters."""
    results = {}
    for name in SHARDED:
        net = network()
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in net:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        step(name, net)
        results[name] = {n: p.full_tensor().detach() for n, p in net.named_parameters()}
    with pytest.raises(ConfigurationError, match="need whole parameters"):
        step("flops", net)
    return results


def test_sharded_parameters_keep_the_patterns(ranks: RankPool) -> None:
    first, second = ranks.run(2, sharded_steps, 2)
    assert differences(first, second) == []
    for name, found in first.items():
        net = network()
        step(name, net)
        weights = [(n, p) for n, p in net.named_parameters() if p.dim() > 1]
        gone = [int((found[n] == 0).sum()) for n, _ in weights]
        assert sum(gone) == sum(int((p == 0).sum()) for _, p in weights), name
        if "2:4" in name:
            for parameter, _ in weights:
                groups = found[parameter].movedim(1, -1).reshape(-1, 4)
                assert bool(((groups != 0).sum(dim=1) == 2).all())
        if name == "magnitude":
            # Here nothing depends on how the Fisher is cut into blocks.
            assert all(torch.equal(found[n], p) for n, p in weights)


# ---------------------------------------------------------------- in a fit


class Grouped(Classifier):
    """Linear layers whose inputs are multiples of four."""

    def __init__(self) -> None:
        super().__init__(
            build=lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)
            )
        )


def kept_of_groups(module: nn.Module) -> set[int]:
    return {
        int(number)
        for p in module.parameters()
        if p.dim() > 1
        for number in (p.reshape(-1, 4) != 0).sum(dim=1)
    }


class Watch(Callback):
    """Looks at the groups after every epoch."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(kept_of_groups(pl_module))


def test_a_schedule_converts_groups_and_resumes(tmp_path: Path) -> None:
    def fit(resumed: str | None = None) -> tuple[Any, Any, Watch]:
        seed_all(1)
        watch, module = Watch(), Grouped()
        pruner = pruning(
            target_sparsity=0.5,
            schedule=PolynomialSchedule(0, 3),
            selection=SelectionConfig(pattern="2:4"),
        )
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        callbacks = [pruner, watch] if resumed else [pruner, watch, saving]
        options = {} if resumed else {"enable_checkpointing": True}
        fitted = trainer(*callbacks, max_epochs=5, **options)
        fitted.fit(module, loader(shuffle=False), ckpt_path=resumed)
        return pruner, module, watch

    pruner, module, watch = fit()
    assert watch.seen == [{2, 4}, {2, 4}, {2, 4}, {2}, {2}]
    assert kept_of_groups(module) == {2}
    sparsities = [report.sparsity for report in pruner.reports]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == 0.5
    resumed, again, _ = fit(str(tmp_path / "epoch=1.ckpt"))
    assert differences(again.state_dict(), module.state_dict()) == []
    assert [r.zeros for r in resumed.reports] == [r.zeros for r in pruner.reports]


def test_flops_fall_with_the_schedule() -> None:
    pruner, module = (
        pruning(
            target_sparsity=0.8, flops_target=0.3, schedule=PolynomialSchedule(0, 3)
        ),
        Classifier(),
    )
    trainer(pruner, max_epochs=5).fit(module, loader())
    shares = [report.flops_share for report in pruner.reports]
    assert shares == sorted(shares, reverse=True)
    for report in pruner.reports:
        progress = report.target_sparsity / 0.8
        # One of the 27 weights of the convolution makes up 1.6 %.
        assert report.flops_share == pytest.approx(1 - 0.7 * progress, abs=0.016)
    assert report.target_sparsity == 0.8


def test_layers_with_targets_reach_them_in_steps() -> None:
    pruner = pruning(
        target_sparsity=0.8,
        schedule=PolynomialSchedule(0, 3),
        selection=SelectionConfig(layer_targets={"net.0": 1 / 3}),
    )
    trainer(pruner, max_epochs=5).fit(Classifier(), loader())
    assert [report.layers[0].zeros_after for report in pruner.reports][-1] == 9
    assert pruner.reports[0].layers[0].zeros_after < 9
    assert pruner.reports[-1].sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": SelectionConfig(pattern="2:4")}, "set target_sparsity=0.5"),
        (
            {
                "target_sparsity": 0.5,
                "selection": SelectionConfig(pattern="2:4"),
            },
            r"net.0.weight \(1 inputs\)",
        ),
        (
            {"selection": SelectionConfig(pattern="block8")},
            r"net.0.weight \(1 inputs\)",
        ),
        ({"flops_target": 1e-4, "selection": SelectionConfig(exclude=["7"])}, "reach"),
        ({"selection": SelectionConfig(layer_targets={"7": 0.0, "5": 0.0})}, "zeros"),
        ({"selection": SelectionConfig(layer_targets={"fc": 0.5})}, "matches no"),
        ({"selection": SelectionConfig(max_layer_sparsity=0.5)}, "out of reach"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    options: dict[str, Any], message: str
) -> None:
    class Stopped(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            raise AssertionError("training has begun")

    def fit() -> None:
        pruner = pruning(schedule=PolynomialSchedule(1, 3), **in_step(**options))
        trainer(pruner, max_epochs=5).fit(Stopped(), loader())

    with pytest.raises(ConfigurationError, match=message):
        fit()
