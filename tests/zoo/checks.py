"""What is checked of a network of the zoo, in short fits with the callbacks."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_woodfisher import (
    FisherConfig,
    OneShotSchedule,
    SOSPPruningCallback,
    StepConfig,
    StructureConfig,
    WoodFisherPruningCallback,
    load_shrunk,
    prune_structures,
)
from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.data.losses import (
    FunctionLoss,
    choose_evaluation,
    map_tensors,
)
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.structured.graph.inputs import tensors_in
from lightning_woodfisher.structured.report import StructureReport
from lightning_woodfisher.structured.shrink.removal import plan_removal
from tests.support.macs import count_macs
from tests.zoo.catalogue import Network
from tests.zoo.tasks import Task, settle

STEPS = 3
SPARSITY = 0.6
# Share of the multiply-accumulates to remove; networks with few groups lose no half.
MACS = 0.2
# Between masked and smaller network in float64, of the largest output.
GAP = 1e-9


class Module(pl.LightningModule):
    """Trains a network for its task."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.net = network
        self.task = task

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.task.loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)


class Watch(pl.Callback):
    """Compare the zeros of the weights with the masks after each optimizer step."""

    def __init__(self, pruning: Any) -> None:
        self.pruning = pruning
        self.steps = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        for name, parameter in self.pruning.masks.parameters.items():
            kept = self.pruning.masks.kept(name)
            assert not bool(parameter.detach()[~kept].any()), f"{name}: lost its mask"
        self.steps += 1


def make_module(network: Network) -> Module:
    """Build a network as if it had been trained, with the same weights every time."""
    torch.manual_seed(0)
    made = network.build()
    settle(made, network.task)
    return Module(made, network.task)


def fit(module: Module, callback: Any, samples: int = 8, batch_size: int = 2) -> None:
    """Prune at the start, and train for some steps."""
    watch = Watch(callback)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        callbacks=[callback, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, module.task.loader(samples, batch_size))
    assert watch.steps == STEPS


@torch.no_grad()
def outputs(network: nn.Module, task: Task, dtype: torch.dtype) -> list[Tensor]:
    """Compute the outputs in evaluation mode."""
    batch = map_tensors(
        lambda t: t.to(dtype) if t.is_floating_point() else t,
        next(iter(task.loader(2, 2))),
    )
    torch.manual_seed(0)
    return list(tensors_in(task.outputs(network.to(dtype).eval(), batch)))


def check_unstructured(
    network: Network, criterion: str = "woodfisher"
) -> dict[str, Any]:
    """Prune single weights."""
    module = make_module(network)
    callback = WoodFisherPruningCallback(
        SPARSITY,
        schedule=OneShotSchedule(0),
        criterion=criterion,
        fisher=FisherConfig(
            num_gradients=4, gradient_batch_size=2, model_mode=network.task.mode
        ),
        step=StepConfig(batchnorm_recalibration_batches=2),
    )
    unchanged(module, lambda: fit(module, callback))
    report = callback.reports[-1]
    parameters = dict(module.named_parameters())
    # Auxiliary classifiers, for example, which evaluation mode does not reach.
    dense = report.left_dense
    chosen = [parameters[one.name] for one in report.layers if one.name not in dense]
    weights = sum(p.numel() for p in chosen)
    zeros = sum(int((p == 0).sum()) for p in chosen)
    assert zeros == round(SPARSITY * weights), f"{zeros} of {weights} are zero"
    assert report.zeros == zeros
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert PruningReport.from_dict(plain) == report
    assert report.to_table()
    assert all(
        t.isfinite().all()
        for t in outputs(module.net, module.task, torch.float32)
        if t.is_floating_point()
    )
    return {"weights": report.weights, "left_dense": len(dense)}


def unchanged(module: nn.Module, run: Callable[[], None]) -> None:
    """Run something that leaves the module as it was if it refuses."""
    before = copy.deepcopy(module.state_dict())
    try:
        run()
    except (ConfigurationError, PruningError):
        after = module.state_dict()
        same = [torch.equal(before[n], after[n]) for n in before]
        assert all(same), "the network has changed before it was refused"
        raise


def check_sosp(network: Network) -> dict[str, Any]:
    """Remove channels by SOSP in a fit, and compare with the exported network."""
    module = make_module(network)
    with tempfile.TemporaryDirectory() as folder:
        callback = SOSPPruningCallback(
            MACS,
            config=StructureConfig(
                num_samples=4, batch_size=2, labels=network.task.labels
            ),
            schedule=OneShotSchedule(0),
            export_path=folder,
        )
        unchanged(module, lambda: fit(module, callback))
        shrunk = callback.shrunk_model(module)
        loaded = load_shrunk(folder, network.build())
    require_equal_bits(shrunk, loaded)
    report = callback.reports[-1]
    return require_removed(module, shrunk, report)


def check_hap(network: Network) -> dict[str, Any]:
    """Remove channels by HAP, without a Trainer."""
    module = make_module(network)
    task = network.task
    config = StructureConfig(method="hap", num_samples=2, batch_size=2, probes=2)
    found: list[Any] = []

    def run() -> None:
        loader = task.loader(4, 2)
        inputs = task.inputs(next(iter(task.loader(1, 1))))
        found.extend(
            prune_structures(
                module.net,
                loader,
                task.loss,
                target=MACS,
                config=config,
                example_inputs=inputs,
            )
        )

    unchanged(module, run)
    report, groups = found
    plan = plan_removal(module.net, groups, report.removed)
    shrunk = plan.apply_to_copy(module.net)
    return require_removed(module, shrunk, report)


def require_removed(
    module: Module, shrunk: nn.Module, report: StructureReport
) -> dict[str, Any]:
    """Compare the masked network and the report with the smaller network."""
    assert report.macs <= (1 - MACS) * report.macs_dense
    assert report.parameters == sum(p.numel() for p in shrunk.parameters())
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert StructureReport.from_dict(plain) == report
    counted = count_work(shrunk, module.task)
    assert report.macs == round(counted), f"MACs: {report.macs}, but {counted} counted"
    masked = outputs(module.net, module.task, torch.float64)
    small = outputs(shrunk, module.task, torch.float64)
    gap = 0.0
    for one, other in zip(masked, small, strict=True):
        assert one.shape == other.shape
        assert one.isfinite().all()
        largest = max(float(one.abs().max()), 1e-30) if one.numel() else 1.0
        gap = max(gap, float((one - other).abs().max()) / largest if one.numel() else 0)
    assert gap <= GAP, f"the smaller network differs by {gap:.1e}"
    layers = {layer for group in report.groups for layer in group.layers}
    return {
        "weights": report.parameters_dense,
        "groups": len(report.groups),
        "layers": len(layers),
        "macs": report.macs / report.macs_dense,
        "gap": gap,
    }


def count_work(shrunk: nn.Module, task: Task) -> float:
    """Count multiply-accumulates of one sample by torch."""
    source = FunctionLoss(shrunk, task.loader(1, 1), task.loss)
    choose_evaluation(source, 0)
    batch = next(iter(task.loader(1, 1)))
    with source.session("eval"):
        torch.manual_seed(0)
        return count_macs(lambda: task.loss(shrunk, batch))


def require_equal_bits(one: nn.Module, other: nn.Module) -> None:
    """Compare the state of two networks."""
    state, found = one.state_dict(), other.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], found[name]) for name in state)


CHECKS: Mapping[str, Callable[[Network], dict[str, Any]]] = {
    "unstructured": check_unstructured,
    "layerwise": lambda network: check_unstructured(network, "layerwise"),
    "sosp": check_sosp,
    "hap": check_hap,
}
