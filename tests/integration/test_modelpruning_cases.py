"""What a pruning callback of Lightning is expected to do, and known failures of others.

Each test names the failure that it guards against, as users of ``ModelPruning`` and of
other pruning tools have met it.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from fits import (
    WEIGHTS,
    Classifier,
    MemoryLogger,
    differences,
    loader,
    pruning,
    seed_all,
    trainer,
)
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner
from rank_pool import RankPool
from torch import Tensor

from lightning_woodfisher import (
    OneShotSchedule,
    PolynomialSchedule,
)

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
TARGET = round(0.75 * WEIGHTS)


def zeros_in(state: dict[str, Tensor]) -> int:
    return sum(int((value == 0).sum()) for value in state.values() if value.dim() > 1)


def saving(*callbacks: pl.Callback, epochs: int = 2) -> tuple[Classifier, str]:
    """Fit and give the module and its checkpoint."""
    module = Classifier()
    store = ModelCheckpoint(Path.cwd(), "run", enable_version_counter=False)
    options = {"enable_checkpointing": True, "max_epochs": epochs}
    trainer(*callbacks, store, **options).fit(module, loader())
    return module, store.best_model_path


def test_a_resumed_run_stays_sparse() -> None:
    # ModelPruning with make_pruning_permanent: 50 % before, 0 % after resuming, silently.
    module, path = saving(pruning())
    assert zeros_in(module.state_dict()) == TARGET
    pruner, resumed = pruning(), Classifier()
    trainer(pruner, max_epochs=5).fit(resumed, loader(), ckpt_path=path)
    assert zeros_in(resumed.state_dict()) == TARGET
    # It has been trained, and has not only kept what it was given.
    assert not torch.equal(resumed.net[5].weight, module.net[5].weight)


def test_names_of_parameters_stay_those_of_the_dense_model() -> None:
    # ModelPruning without make_pruning_permanent: "Missing key(s): net.0.weight".
    module, path = saving(pruning())
    dense = Classifier()
    assert list(module.state_dict()) == list(dense.state_dict())
    checkpoint = torch.load(path, weights_only=True)
    dense.load_state_dict(checkpoint["state_dict"], strict=True)
    assert zeros_in(dense.state_dict()) == TARGET
    # And test() after fit, which failed after a search for the learning rate (#6575).
    searching = Classifier(lambda p: torch.optim.SGD(p, lr=1e-2))
    searching.lr = 1e-2
    fitted = trainer(pruning())
    Tuner(fitted).lr_find(
        searching, loader(), loader(8), num_training=4, update_attr=False
    )
    fitted.fit(searching, loader())
    fitted.validate(searching, loader(8, shuffle=False), verbose=False)
    assert zeros_in(searching.state_dict()) == TARGET


@pytest.mark.parametrize("first", [True, False])
def test_an_exponential_average_beside_it(first: bool) -> None:
    # ModelPruning reorders the parameters, which the average pairs by position: a crash.
    pair = [EMAWeightAveraging(decay=0.5), pruning(schedule=OneShotSchedule(1))]
    module, path = saving(*(pair if first else pair[::-1]), epochs=3)
    assert zeros_in(module.state_dict()) == TARGET
    assert zeros_in(torch.load(path, weights_only=True)["state_dict"]) == TARGET


def unseeded(world_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Job: two fits of one callback where every rank has drawn other random numbers."""
    pruner = pruning(schedule=PolynomialSchedule(0, 1))
    for _ in range(2):
        seed_all(int(os.environ["RANK"]))
        module = Classifier()
        fitted = trainer(pruner, devices=world_size, strategy="ddp")
        fitted.fit(module, loader())
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    return pruner.masks.state_dict(), weights


def test_masks_are_the_same_on_all_ranks_without_seeds(ranks: RankPool) -> None:
    # ModelPruning at random: 47.5 % of the mask entries differed between two ranks.
    one, two = ranks.run(2, unseeded, 2, launch="trainer")
    assert differences(one, two) == []
    masks, weights = one
    assert sum(int((~mask).sum()) for mask in masks.values()) == TARGET
    assert zeros_in(weights) == TARGET


class Plain(Classifier):
    """Without arguments, for the command line."""

    def __init__(self) -> None:
        super().__init__()


def test_layers_are_named_in_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    # ModelPruning wants (module, name) pairs, which no YAML file can give.
    settings = {
        "target_sparsity": 0.5,
        "schedule": {
            "class_path": "lightning_woodfisher.OneShotSchedule",
            "init_args": {"epoch": 0},
        },
        "fisher": {"num_gradients": 4, "gradient_batch_size": 2},
        "selection": {"only": [r"net\.5"], "scope": "layer"},
    }
    path = "lightning_woodfisher.WoodFisherPruningCallback"
    callbacks = [{"class_path": path, "init_args": settings}]
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False}
    quiet = dict.fromkeys(["enable_checkpointing", "enable_progress_bar"], False)
    config = {"trainer": {**options, **quiet, "callbacks": callbacks}}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr("sys.argv", ["run", "--config", "run.yaml"])
    cli = LightningCLI(Plain, run=False, seed_everything_default=1)
    cli.trainer.fit(cli.model, loader())
    module = cli.model
    (pruner,) = (c for c in cli.trainer.callbacks if "WoodFisher" in type(c).__name__)
    assert pruner.masks.zeros() == {"net.5.weight": 108 * 12 // 2}
    assert int((module.net[5].weight == 0).sum()) == 108 * 12 // 2


def test_several_fits_leave_nothing_behind() -> None:
    # ModelPruning kept deep copies of every model it has seen (#8542).
    pruner, gone = pruning(), []
    for _ in range(3):
        module = Classifier()
        gone.append(weakref.ref(module))
        trainer(pruner).fit(module, loader())
        assert len(pruner.reports) == 1
        assert zeros_in(module.state_dict()) == TARGET
        del module
    trainer(pruner, max_epochs=1).fit(Classifier(), loader())
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_the_module_can_be_copied_in_the_middle_of_training() -> None:
    # "Only Tensors created explicitly by the user support the deepcopy protocol" (#7505).
    copies = []

    class Copy(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            copies.append(copy.deepcopy(module))
            pickle.loads(pickle.dumps(module.state_dict()))

    trainer(pruning(), Copy()).fit(Classifier(), loader())
    assert [zeros_in(one.state_dict()) for one in copies] == [TARGET] * 2
    assert all(p.is_leaf and p.requires_grad for p in copies[-1].parameters())


def test_the_callback_can_be_copied_and_printed() -> None:
    # Hooks and closures in a callback break pickle, as multiprocess launchers need it.
    seen = []

    class Pickle(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            seen.append(pickle.loads(pickle.dumps(pruner)).masks.sparsity())

    pruner = pruning(schedule=OneShotSchedule(1))
    trainer(pruner, Pickle()).fit(Classifier(), loader())
    assert seen == [0.0, TARGET / WEIGHTS]
    text = repr(pruner)
    assert text.startswith("WoodFisherPruningCallback(target_sparsity=0.75")
    assert "object at 0x" not in text


def test_the_sparsity_that_is_logged_is_that_of_the_weights() -> None:
    # ModelPruning logged a wrong sparsity for years (#13595).
    logger, module = MemoryLogger(), Classifier()
    trainer(pruning(), logger=logger).fit(module, loader())
    logged = [m for _, m in logger.history if "pruning/sparsity" in m]
    assert [m["pruning/sparsity"] for m in logged] == [
        zeros_in(module.state_dict()) / WEIGHTS
    ]
    weight = module.net[5].weight
    share = float((weight == 0).double().mean())
    assert logged[0]["pruning/sparsity/net.5.weight"] == pytest.approx(share)
