"""Pruning beside what else a Trainer and a network may have: callbacks, layers, data.

docs/reference/compatibility.md is the table of these companions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    CLASSES,
    WEIGHTS,
    Classifier,
    Counting,
    adamw,
    convolutional,
    copied,
    differences,
    images,
    loader,
    pruning,
    seed_all,
    trainer,
)
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from rank_pool import RankPool
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader

from lightning_woodfisher import (
    ConfigurationError,
    ConstantSchedule,
    FisherConfig,
    OneShotSchedule,
    PolynomialSchedule,
    PruningError,
    SelectionConfig,
    WoodFisherPruningCallback,
    prune,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]


def require_pruned(
    pruner: WoodFisherPruningCallback, module: nn.Module, share: float = 0.75
) -> None:
    """Check counts, exact zeros where masks say so, and that all numbers are finite."""
    masks = pruner.masks
    assert masks is not None
    weights = sum(p.numel() for p in masks.parameters.values())
    assert sum(masks.zeros().values()) == round(share * weights)
    named = dict(module.named_parameters())
    for name, count in masks.zeros().items():
        gone = ~masks.kept(name)
        assert int(gone.sum()) == count
        assert bool((named[name].detach()[gone] == 0).all()), name
    assert all(bool(p.isfinite().all()) for p in named.values())


# ---------------------------------------------------------------- callbacks, options


class Snapshots(pl.Callback):
    """Keeps the module as it is when each epoch ends."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.states.append(copied([module.state_dict(), optimizers]))


class WithRate(Classifier):
    """Has a learning rate that may be searched, and a batch size."""

    def __init__(self, rate: float = 1e-2) -> None:
        super().__init__(lambda p: torch.optim.AdamW(p, lr=self.rate))
        self.rate, self.batch_size = rate, 8

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(8, shuffle=False)


class MidwayRate(LearningRateFinder):
    """Searches the rate again in the middle, as Lightning's documentation does it."""

    def on_fit_start(self, *args: Any) -> None:
        """Do nothing."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.current_epoch == 2:
            self.lr_find(trainer, module)


class TwoPlayers(pl.LightningModule):
    """A generator and a discriminator that are trained in turn, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 64))
        self.critic = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0].flatten(1)
        first, second = self.optimizers()
        noise = torch.randn(len(real), 6, device=self.device)
        self.toggle_optimizer(first)
        loss = nn.functional.softplus(-self.critic(self.generator(noise))).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        false = self.critic(self.generator(noise).detach())
        loss = nn.functional.softplus(false) + nn.functional.softplus(
            -self.critic(real)
        )
        second.zero_grad()
        self.manual_backward(loss.mean())
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return [adamw(self.generator.parameters()), adamw(self.critic.parameters())]


class Nested(Classifier):
    """Batches are dicts of lists, as detection and language models have them."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss([batch["inputs"][0]["pixels"], batch["target"]])


def nested() -> DataLoader[Any]:
    samples = [
        {"inputs": [{"pixels": pixels}], "target": label} for pixels, label in images()
    ]
    return DataLoader(samples, batch_size=8, shuffle=True)


class Mixed(Classifier):
    """Several loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = batch if isinstance(batch[0], list) else (batch, batch)
        return self.loss(first) + self.loss(second)


class Module(pl.LightningDataModule):
    """Its setup makes the data."""

    def setup(self, stage: str) -> None:
        self.data = images()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=8, shuffle=True)


@dataclass(frozen=True)
class Company:
    """One companion of the pruning callback."""

    callbacks: Callable[[], list[pl.Callback]] = list
    options: Callable[[], dict[str, Any]] = dict
    module: Callable[[], pl.LightningModule] = Classifier
    data: Callable[[], Any] = loader
    own_data: Callable[[], Any] | None = None


COMPANIONS = {
    "GradientAccumulationScheduler": Company(
        lambda: [GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})]
    ),
    "EMAWeightAveraging": Company(lambda: [EMAWeightAveraging(decay=0.5)]),
    "StochasticWeightAveraging": Company(
        lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
    ),
    "LearningRateFinder": Company(
        lambda: [LearningRateFinder(num_training_steps=8, attr_name="rate")],
        module=WithRate,
    ),
    "BatchSizeFinder": Company(
        lambda: [BatchSizeFinder(max_trials=2, steps_per_trial=2)],
        module=WithRate,
        data=lambda: None,
    ),
    "two players": Company(module=TwoPlayers),
    "nested batches": Company(module=Nested, data=nested),
    "combined loaders": Company(
        module=Mixed,
        data=lambda: CombinedLoader([loader(), loader(16)], "max_size_cycle"),
        own_data=loader,
    ),
    "data module": Company(data=Module),
    "overfit_batches": Company(
        options=lambda: {"overfit_batches": 2}, data=lambda: loader(shuffle=False)
    ),
    "limit_train_batches": Company(options=lambda: {"limit_train_batches": 0.5}),
    "anomaly detection": Company(options=lambda: {"detect_anomaly": True}),
    "inference_mode=False": Company(options=lambda: {"inference_mode": False}),
}


@pytest.mark.parametrize("name", list(COMPANIONS))
def test_a_companion_of_the_callback(name: str) -> None:
    company = COMPANIONS[name]
    states = []
    for prunes in (True, False):
        seed_all(1)
        pruner, watch = pruning(schedule=OneShotSchedule(1)), Snapshots()
        if company.own_data is not None:
            pruner = pruning(schedule=OneShotSchedule(1), dataloader=company.own_data())
        module = company.module()
        callbacks = [*company.callbacks(), *[pruner] * prunes, watch]
        fitted = trainer(
            *callbacks,
            # The other run is compared until the step, and need not go on.
            max_epochs=3 if prunes else 1 + 2 * name.startswith("Stochastic"),
            **company.options(),
        )
        fitted.fit(module, company.data())
        states.append(watch.states)
        if prunes:
            require_pruned(pruner, module)
            (report,) = pruner.reports
            assert report.epoch == 1
            assert report.predicted_increase > 0
    # Up to the step, rehearsal included, training went on as it does without pruning.
    assert differences(states[0][0], states[1][0]) == []


def test_a_search_before_fit_leaves_nothing_behind() -> None:
    """The Tuner runs fit and throws it away; state of the callback must not stay."""
    results = []
    for searches in (True, False):
        seed_all(1)
        pruner, module = pruning(schedule=PolynomialSchedule(0, 1)), WithRate(3e-3)
        fitted = trainer(pruner)
        if searches:
            tuner = Tuner(fitted)
            tuner.lr_find(module, num_training=8, attr_name="rate", update_attr=False)
            assert pruner.masks is None or pruner.masks.sparsity() == 0
            assert pruner.reports == []
            assert pruner.state_dict()["done"] == []
            tuner.scale_batch_size(module, max_trials=2, steps_per_trial=2)
            module.batch_size = 8
        seed_all(2)
        fitted.fit(module)
        require_pruned(pruner, module)
        reports = [{**r.to_dict(), "seconds": {}} for r in pruner.reports]
        results.append([module.state_dict(), pruner.masks.state_dict(), reports])
    assert differences(*results) == []


def test_a_search_in_the_middle_of_training() -> None:
    """It trains, and then loads a checkpoint of its own over what it has done."""
    pruner, module = pruning(schedule=PolynomialSchedule(1, 3)), WithRate()
    search = MidwayRate(num_training_steps=8, attr_name="rate")
    trainer(pruner, search, max_epochs=5).fit(module)
    assert [report.epoch for report in pruner.reports] == [1, 2, 3]
    # The steps after the search hold as well, and are what a checkpoint gets.
    require_pruned(pruner, module)
    assert differences(pruner.state_dict()["masks"], pruner.masks.state_dict()) == []


def test_a_state_that_is_loaded_in_the_middle_of_training() -> None:
    """As that search does it, with an optimizer that moves weights without gradient."""

    class Reload(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
            if trainer.current_epoch == 2:
                pruner.load_state_dict(copied(pruner.state_dict()))

    pruner = pruning(schedule=PolynomialSchedule(1, 3))
    module = Classifier(lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=2))
    trainer(Reload(), pruner, max_epochs=5).fit(module, loader())
    require_pruned(pruner, module)


@pytest.mark.parametrize(
    "saving",
    [
        {"save_last": True, "every_n_train_steps": 4},
        {"monitor": "val_loss", "save_top_k": 2},
        {"save_on_train_epoch_end": True, "save_weights_only": True},
    ],
    ids=["every n steps and last", "best after validation", "weights only"],
)
def test_checkpoints_hold_pruned_weights(saving: dict[str, Any]) -> None:
    for first in (True, False):
        folder = Path.cwd() / str(first)
        checkpoints = ModelCheckpoint(folder, "{step}", **saving)
        pruner = pruning(schedule=PolynomialSchedule(0, 1))
        pair = (checkpoints, pruner) if first else (pruner, checkpoints)
        module = Classifier()
        options = {"enable_checkpointing": True, "max_epochs": 3}
        trainer(*pair, **options).fit(module, loader(), loader(8, shuffle=False))
        files = list(folder.glob("*.ckpt"))
        assert files
        for file in files:
            checkpoint = torch.load(file, weights_only=True)
            report = pruner.reports[min(1, (checkpoint["global_step"] - 1) // 6)]
            zeros = [
                int((checkpoint["state_dict"][layer.name] == 0).sum())
                for layer in report.layers
            ]
            assert zeros == [layer.zeros_after for layer in report.layers]
            if "callbacks" in checkpoint:
                masks = checkpoint["callbacks"][pruner.state_key]["masks"]
                counts = {name: int((~mask).sum()) for name, mask in masks.items()}
                assert [counts.get(layer.name, 0) for layer in report.layers] == zeros


# ---------------------------------------------------------------- weights that are frozen


class Backbone(Classifier):
    """A backbone and a head; only the head is in the optimizer at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:5], self.net[5:]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(filter(lambda p: p.requires_grad, self.parameters()))


@pytest.mark.parametrize("first", [True, False])
def test_a_backbone_that_is_released_is_pruned_with_the_rest(first: bool) -> None:
    pruner, module = pruning(schedule=PolynomialSchedule(2, 3)), Backbone()
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)
    pair = (tuning, pruner) if first else (pruner, tuning)
    trainer(*pair, max_epochs=5).fit(module, loader())
    require_pruned(pruner, module)
    assert set(pruner.masks.parameters) == {
        "net.0.weight",
        "net.5.weight",
        "net.7.weight",
    }
    assert all(count > 0 for count in pruner.masks.zeros().values())


def test_a_backbone_that_is_still_frozen_is_named() -> None:
    pruner, module = pruning(schedule=PolynomialSchedule(1, 3)), Backbone()
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, train_bn=False)
    with pytest.raises(PruningError, match=r"frozen .*: net\.0\.weight; prune before"):
        trainer(tuning, pruner, max_epochs=5).fit(module, loader())
    assert pruner.masks.sparsity() == 0
    head = pruning(
        schedule=PolynomialSchedule(1, 3),
        selection=SelectionConfig(exclude=[r"^net\.0"]),
    )
    module = Backbone()
    trainer(tuning, head, max_epochs=5).fit(module, loader())
    require_pruned(head, module)


class Adapted(nn.Module):
    """A frozen layer beside which a product of two small ones is trained."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.up(self.down(inputs))


def test_adapters_are_pruned_and_their_frozen_base_is_not() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), Adapted(nn.Linear(64, CLASSES)))

    seed_all(1)
    pruner, module = pruning(), Classifier(build=build)
    base = module.net[1].base.weight.clone()
    trainer(pruner).fit(module, loader())
    require_pruned(pruner, module)
    assert list(pruner.masks.parameters) == ["net.1.down.weight", "net.1.up.weight"]
    assert torch.equal(module.net[1].base.weight, base)
    asked = pruning(selection=SelectionConfig(only=[r"base\.weight"]))
    with pytest.raises(ConfigurationError, match="matches no trainable weight"):
        trainer(asked).fit(Classifier(build=build), loader())


@pytest.mark.parametrize("schedule", [PolynomialSchedule(0, 1), ConstantSchedule()])
def test_an_adapter_that_starts_at_zero_lives(schedule: Any) -> None:
    def build() -> nn.Module:
        adapted = Adapted(nn.Linear(64, CLASSES))
        nn.init.zeros_(adapted.up.weight)
        return nn.Sequential(nn.Flatten(), adapted)

    seed_all(1)
    by_layer = SelectionConfig(scope="layer")
    pruner = pruning(schedule=schedule, selection=by_layer)
    module = Classifier(build=build)
    constant = isinstance(schedule, ConstantSchedule)
    told = "only zeros in" if constant else r"not pruned in this step.*net\.1\.up"
    with pytest.warns(UserWarning, match=told):
        trainer(pruner).fit(module, loader())
    up = module.net[1].up.weight
    assert int((up != 0).sum()) >= up.numel() // 4
    if constant:
        assert pruner.masks.sparsity() == 0
    else:
        assert pruner.reports[0].layers[1].zeros_after == 0
        require_pruned(pruner, module)


def test_a_single_step_that_leaves_an_adapter_dense_ends_with_a_warning() -> None:
    def build() -> nn.Module:
        adapted = Adapted(nn.Linear(64, CLASSES))
        nn.init.zeros_(adapted.up.weight)
        return nn.Sequential(nn.Flatten(), adapted)

    seed_all(1)
    pruner = pruning(schedule=OneShotSchedule(epoch=0))
    told = r"because the last step could not prune net\.1\.up\.weight"
    with (
        pytest.warns(UserWarning, match="not pruned in this step"),
        pytest.warns(UserWarning, match=told),
    ):
        trainer(pruner).fit(Classifier(build=build), loader())


# ---------------------------------------------------------------- layers


class Sequences(nn.Module):
    """Reads the rows of an image one after the other.

    Args:
        layer: an LSTM or attention; the first of its results is a sequence.
        width: of that sequence.
    """

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = pixels.squeeze(1)
        attends = isinstance(self.layer, nn.MultiheadAttention)
        result = self.layer(rows, rows, rows) if attends else self.layer(rows)
        return self.head(result[0].mean(dim=1))


class Words(nn.Module):
    """Takes the signs of pixels for words.

    Args:
        sparse: whether the gradient of the embedding is a sparse tensor.
    """

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 3, sparse=sparse)
        self.head = nn.Linear(192, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        places = torch.arange(64, device=pixels.device) * 2
        words = (pixels.flatten(1) > 0).long() + places
        return self.head(self.embed(words).flatten(1))


class Tied(nn.Module):
    """An autoencoder that uses one matrix in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.second(self.first(pixels.flatten(1)).relu()))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, groups=2),
        nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def materialised() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(9), nn.Linear(9, CLASSES))
    network(torch.zeros(1, 1, 8, 8))
    return network


def normalised(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), wrap(nn.Linear(64, 9)), nn.Linear(9, CLASSES))


def descent(parameters: Any) -> torch.optim.Optimizer:
    """Give an optimizer that takes sparse gradients."""
    return torch.optim.SGD(parameters, lr=0.1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "grouped and transposed convolutions": (
        grouped,
        [],
        [f"{i}.weight" for i in (0, 1, 3, 4, 7)],
    ),
    "LSTM": (
        lambda: Sequences(nn.LSTM(8, 6, batch_first=True), 6),
        [],
        ["layer.weight_ih_l0", "layer.weight_hh_l0", "head.weight"],
    ),
    "MultiheadAttention": (
        lambda: Sequences(nn.MultiheadAttention(8, 2, batch_first=True), 8),
        [],
        ["layer.in_proj_weight", "layer.out_proj.weight", "head.weight"],
    ),
    "Embedding by default": (Words, [], ["head.weight"]),
    "Embedding": (Words, ["torch.nn.Embedding"], ["embed.weight"]),
    "sparse Embedding": (
        lambda: Words(sparse=True),
        ["torch.nn.Embedding", "Linear"],
        ["embed.weight", "head.weight"],
    ),
    "tied weights": (Tied, [], ["first.weight", "head.weight"]),
    "lazy, materialised": (materialised, [], ["1.weight", "2.weight"]),
    "beside weight_norm": (lambda: normalised(weight_norm), [], ["2.weight"]),
    "beside spectral_norm": (lambda: normalised(spectral_norm), [], ["2.weight"]),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_kind_of_layer(name: str) -> None:
    build, include, expected = NETWORKS[name]
    seed_all(1)
    pruner = pruning(
        schedule=PolynomialSchedule(0, 1),
        selection=SelectionConfig(scope="layer", only=include),
    )
    sparse = name == "sparse Embedding"
    module = Classifier(descent if sparse else adamw, build)
    keys = list(module.state_dict())
    trainer(pruner).fit(module, loader())
    assert list(module.state_dict()) == keys
    zeros = pruner.masks.zeros()
    assert list(zeros) == [f"net.{one}" for one in expected]
    for key, count in zeros.items():
        assert count == round(0.75 * module.get_parameter(key).numel())
    assert all(report.predicted_increase > 0 for report in pruner.reports)
    masks = pruner.masks
    for key in zeros:
        gone = module.get_parameter(key).detach()[~masks.kept(key)]
        assert bool((gone == 0).all())
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm])
def test_what_a_parametrization_computes_from_is_refused(wrap: Any) -> None:
    module = Counting(build=lambda: normalised(wrap))
    chosen = SelectionConfig(only=[r"original"])
    with pytest.raises(ConfigurationError, match="remove_parametrizations"):
        trainer(pruning(selection=chosen)).fit(module, loader())
    assert module.steps == 0


@pytest.mark.parametrize("where", ["in place", "network"])
def test_a_compiled_module(where: str) -> None:
    torch._dynamo.reset()
    seed_all(1)
    pruner, module = pruning(schedule=PolynomialSchedule(0, 1)), Classifier()
    if where == "in place":
        module.compile(backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    trainer(pruner).fit(module, loader())
    require_pruned(pruner, module)
    assert sum(p.numel() for p in pruner.masks.parameters.values()) == WEIGHTS


# ---------------------------------------------------------------- several processes


def prune_synchronised() -> list[dict[str, Any]]:
    """Job: with BatchNorm, and with the same layer made SyncBatchNorm."""
    states = []
    for converts in (False, True):
        seed_all(5)
        network: nn.Module = convolutional()
        if converts:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        fisher = FisherConfig(
            num_gradients=5, gradient_batch_size=4, block_size=16, model_mode="train"
        )
        prune(
            network,
            images(),
            lambda net, batch: cross_entropy(net(batch[0]), batch[1]),
            target_sparsity=0.6,
            fisher=fisher,
        )
        assert "forward" not in vars(network[1])
        states.append(copied(network.state_dict()))
    return states


def test_synchronised_batchnorm_is_left_alone_by_the_other_ranks(
    ranks: RankPool,
) -> None:
    """Five gradients on two ranks: a layer that waits for the other rank hangs."""
    (alone, _), *_ = ranks.run(1, prune_synchronised)
    for states in ranks.run(2, prune_synchronised):
        for state in states:
            assert differences(state, alone) == []
            assert int((state["5.weight"] == 0).sum()) > 0


# ---------------------------------------------------------------- other ways to train


def prune_with_loader(world_size: int) -> dict[str, torch.Tensor]:
    """Prune with a loader that Fabric has given to one of several ranks."""
    seed_all(1)
    strategy = "ddp" if world_size > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy)
    fabric.launch()
    network = convolutional()
    prune(
        network,
        fabric.setup_dataloaders(loader()),
        lambda net, batch: cross_entropy(net(batch[0]), batch[1]),
        target_sparsity=0.75,
        fisher=FisherConfig(num_gradients=6, gradient_batch_size=2, block_size=16),
    )
    return copied(network.state_dict())


def test_a_loader_of_fabric_gives_the_same_network_on_two_ranks(
    ranks: RankPool,
) -> None:
    (alone,) = ranks.run(1, prune_with_loader, 1, launch="trainer")
    for state in ranks.run(2, prune_with_loader, 2, launch="trainer"):
        assert differences(state, alone) == []


def test_prune_in_a_loop_of_fabric() -> None:
    seed_all(1)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    network = convolutional()
    plain = copied(network.state_dict())
    model, optimizer = fabric.setup(network, adamw(network.parameters()))
    data = fabric.setup_dataloaders(loader())
    report = prune(
        model,
        images(),
        lambda net, batch: cross_entropy(net(batch[0]), batch[1]),
        target_sparsity=0.75,
        fisher=FisherConfig(num_gradients=6, gradient_batch_size=2, block_size=16),
    )
    assert report.zeros == round(0.75 * WEIGHTS)
    weights = [network[0].weight, network[5].weight, network[7].weight]
    assert sum(int((w == 0).sum()) for w in weights) == report.zeros
    assert list(network.state_dict()) == list(plain)
    for pixels, labels in data:
        optimizer.zero_grad()
        fabric.backward(cross_entropy(model(pixels), labels))
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_pruning_callback_of_lightning_is_refused() -> None:
    module, other = Counting(), ModelPruning("l1_unstructured", amount=0.3)
    with pytest.raises(ConfigurationError, match="Lightning's ModelPruning"):
        trainer(pruning(), other).fit(module, loader())
    assert module.steps == 0
