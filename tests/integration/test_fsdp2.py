"""Parameters sharded by ``fully_shard`` (FSDP2), in real gloo processes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conv1d import Conv1D
from fits import (
    Classifier,
    Reseed,
    convolutional,
    copied,
    differences,
    final_state,
    images,
    loader,
    pruning,
    seed_all,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from rank_pool import RankPool
from step_options import in_step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PolynomialSchedule,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.callbacks.training_step import TrainingStepLoss
from lightning_woodfisher.data.losses import FunctionLoss, compute_losses
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import (
    local_sizes,
    reshard,
    take_local,
)
from lightning_woodfisher.gradients.sharded import collect_sharded_gradients
from lightning_woodfisher.gradients.task import GradientTask
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.weights.layers import count_zeros, prunable_parameters
from lightning_woodfisher.weights.masks import Masks

pytestmark = [
    # The resumed runs do not save; Lightning misses the ModelCheckpoint.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def linear() -> nn.Sequential:
    """Give a network whose shards are multiples of 16 weights on two ranks."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 4)
    )


def dropping() -> nn.Sequential:
    """Give a network without BatchNorm, whose statistics are saved of rank 0 only."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(108, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


def shard(net: nn.Module, mesh: Any) -> nn.Module:
    """Shard every layer that has weights, and the last one with the root.

    FSDP leaves the parameters of the root gathered after a forward pass.
    """
    for layer in list(net.children())[:-1]:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def everyone(world_size: int) -> Any:
    return init_device_mesh("cpu", (world_size,))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def whole(value: Any) -> Any:
    """Gather every DTensor of nested containers."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [whole(item) for item in value]
    return value


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather the shards, also after a forward pass."""
    reshard(model)
    return dict(whole(dict(model.named_parameters())))


# ---------------------------------------------------------------- one step

STEPS: dict[str, dict[str, Any]] = {
    "equal batches": {"fisher": FisherConfig(8, 3, 16, collection="loop")},
    "split batches": {"fisher": FisherConfig(8, 2, 16, collection="loop")},
    "primal": {
        "fisher": FisherConfig(20, 1, 16, collection="loop"),
        "update": "independent",
    },
    "by layer": {
        "fisher": FisherConfig(8, 3, 16, collection="loop"),
        "selection": SelectionConfig("layer"),
    },
    "magnitude": {
        "fisher": FisherConfig(8, 3, 16, collection="loop"),
        "criterion": "magnitude",
    },
    "diagonal Fisher": {
        "fisher": FisherConfig(8, 3, 16, collection="loop"),
        "criterion": "diagonal_fisher",
    },
    "whole Fisher": {"fisher": FisherConfig(8, 3, None, collection="loop")},
    "training mode": {
        "fisher": FisherConfig(8, 2, 16, model_mode="train", collection="loop")
    },
    "parts of single weights": {
        "fisher": FisherConfig(8, 3, 1, collection="loop"),
        "recompute_steps": 2,
    },
    "centred": {
        "fisher": FisherConfig(8, 3, 16, collection="loop", centered=True),
    },
    "sampled labels": {
        "fisher": FisherConfig(8, 3, 16, collection="loop", sample_labels=True),
    },
    "sampled labels, split batches": {
        "fisher": FisherConfig(8, 2, 16, collection="loop", sample_labels=True),
    },
    "repeated samples": {
        "fisher": FisherConfig(20, 3, 16, collection="loop", repeat_samples=True),
    },
    "same gradients": {
        "fisher": FisherConfig(8, 3, 16, collection="loop"),
        "recompute_steps": 3,
        "reuse_gradients": True,
    },
}
# Those in which no sum is taken in another order; one process computes gradients one by
# one, too.
SAME_BITS = (
    "equal batches",
    "primal",
    "by layer",
    "magnitude",
    "diagonal Fisher",
    "training mode",
    "parts of single weights",
    "centred",
    "sampled labels",
    "repeated samples",
    "same gradients",
)


def recalibrated(world_size: int) -> dict[str, Tensor]:
    """Job: BatchNorm statistics of a sharded network, estimated anew."""
    seed_all(5)
    net = convolutional() if world_size == 1 else None
    if net is None:
        net = shard(convolutional(), everyone(world_size))
    options: dict[str, Any] = {
        # Blocks end with a shard, but magnitudes know no blocks.
        "criterion": "magnitude",
        "fisher": FisherConfig(8, 3, 16),
        "batchnorm_recalibration_batches": 3,
    }
    report = prune(
        net,
        images(),
        loss,
        target_sparsity=0.6,
        **in_step(**{"seed": 3, **options}),
    )
    assert report.batchnorm_layers == 1
    return {
        name: value.clone() for name, value in whole(dict(net.named_buffers())).items()
    }


def test_batchnorm_of_a_sharded_network_is_recalibrated(ranks: RankPool) -> None:
    expected = recalibrated(1)
    for found in ranks.run(2, recalibrated, 2):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert not torch.equal(expected["1.running_mean"], torch.zeros(3))


def one_step(name: str, net: nn.Module) -> dict[str, Any]:
    """Prune and give what came of it."""
    report = prune(
        net,
        images(),
        loss,
        target_sparsity=0.6,
        **in_step(**{"seed": 3, **STEPS[name]}),
    )
    return {
        "weights": whole(dict(net.named_parameters())),
        "zeros": [layer.zeros_after for layer in report.layers],
        "shapes": [layer.shape for layer in report.layers],
        "losses": [report.loss_before, report.loss_after],
        "thresholds": [layer.threshold for layer in report.layers],
        "predicted": report.predicted_increase,
        "sent": report.bytes_exchanged,
    }


def sharded_steps(world_size: int) -> dict[str, Any]:
    """Job: every kind of step."""
    results = {}
    for name in STEPS:
        seed_all(5)
        net = shard(linear(), everyone(world_size))
        pointers = [p.to_local().data_ptr() for p in net.parameters()]
        kept = [(n, id(p)) for n, p in net.named_parameters()]
        results[name] = one_step(name, net)
        assert pointers == [p.to_local().data_ptr() for p in net.parameters()]
        assert kept == [(n, id(p)) for n, p in net.named_parameters()]
    return results


def test_a_sharded_step_is_that_of_one_process(ranks: RankPool) -> None:
    first, second = ranks.run(2, sharded_steps, 2)
    assert differences(first, second) == []
    for name, found in first.items():
        seed_all(5)
        expected = one_step(name, linear())
        # Shards are exchanged by nobody.
        assert found["sent"] == 0, name
        if name in SAME_BITS:
            assert differences(found["weights"], expected["weights"]) == [], name
            assert found["losses"] == expected["losses"], name
            assert found["thresholds"] == expected["thresholds"], name
        for key, value in expected["weights"].items():
            torch.testing.assert_close(
                found["weights"][key], value, rtol=1e-5, atol=1e-6
            )
            assert torch.equal(found["weights"][key] == 0, value == 0), name
        assert found["zeros"] == expected["zeros"], name
        assert sum(found["zeros"]) == round(0.6 * (64 * 32 + 32 * 8 + 8 * 4))
        assert found["shapes"] == expected["shapes"], name
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
        assert found["losses"][0] != found["losses"][1], name
        if name == "magnitude":
            assert found["predicted"] is expected["predicted"] is None
        else:
            assert found["predicted"] == pytest.approx(expected["predicted"], rel=1e-4)


# ---------------------------------------------------------------- uneven shards


def biases(net: nn.Module) -> list[Any]:
    return [p for name, p in net.named_parameters() if name.endswith("bias")]


def uneven(world_size: int) -> tuple[list[int], dict[str, Tensor], list[list[int]]]:
    """Job: masks of shards of which some are short or empty, there and back."""
    seed_all(6)
    net = shard(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1)), everyone(world_size))
    parameters = prunable_parameters(net)
    masks = Masks(parameters)
    wanted = {
        n: torch.arange(p.numel()).view(p.shape) % 3 == 0 for n, p in parameters.items()
    }
    masks.load_state_dict({name: ~gone for name, gone in wanted.items()})
    masks.apply()
    masks.verify()
    for name, parameter in parameters.items():
        part = take_local(wanted[name], parameter)
        assert part.shape == parameter.to_local().shape
        assert torch.equal(masks.local(name) == 0, part)
    # All parameters of the model, biases included, over all ranks.
    zeros, number = count_zeros(net, Communicator(torch.device("cpu")))
    assert zeros == 9 + sum(int((p.full_tensor() == 0).sum()) for p in biases(net))
    assert number == 20 + 5 + 5 + 1
    again = Masks(parameters)
    again.prune_zeros()
    assert again.zeros() == masks.zeros()
    sizes = [local_sizes(p) for p in parameters.values()]
    return list(again.zeros().values()), again.state_dict(), sizes


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_masks_of_uneven_shards(ranks: RankPool, world_size: int) -> None:
    for zeros, state, sizes in ranks.run(world_size, uneven, world_size):
        assert zeros == [7, 2]
        assert torch.equal(~state["0.weight"], torch.arange(20).view(5, 4) % 3 == 0)
        assert torch.equal(~state["1.weight"], torch.arange(5).view(1, 5) % 3 == 0)
        rows = {1: [[20], [5]], 2: [[12, 8], [5, 0]], 3: [[8, 8, 4], [5, 0, 0]]}
        assert sizes == rows[world_size]


# ---------------------------------------------------------------- loss scale


def scaled_rows() -> list[Tensor]:
    """Job: gradients under a scale of the loss that overflows, and without."""
    rows = []
    for scale in (1.0, 2.0**127):
        seed_all(8)
        net = linear()
        # The rows of the first layer that rank 1 holds have far larger gradients.
        with torch.no_grad():
            net[3].weight[:, :16] *= 1e-4
            net[3].weight[:, 16:] *= 30
        source = FunctionLoss(shard(net, everyone(2)), images(), loss)
        comm = Communicator("cpu")
        source.loss_scale = scale
        parameters = {"1.weight": net[1].weight}
        active = {"1.weight": torch.arange(16 * 64)}
        with source.session("eval"):
            task = GradientTask(source, parameters, active, 4, 1, comm)
            found = collect_sharded_gradients(task, 2)
            rows.append(torch.cat(list(found)))
    return rows


def test_an_overflowing_loss_scale_is_lowered_by_all(ranks: RankPool) -> None:
    # Gradients of rank 0 do not overflow, but it must not go on alone.
    for plain, scaled in ranks.run(2, scaled_rows):
        assert plain.shape == (4, 64 * 16)
        # A power of two changes no bit of the result.
        assert torch.equal(plain, scaled)


def twins() -> list[str]:
    """Job: the selection in a model with two layers of one shape."""
    net = shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), everyone(2))
    return list(prunable_parameters(net))


def test_equal_shapes_are_not_one_storage(ranks: RankPool) -> None:
    assert ranks.run(2, twins) == [["0.weight", "1.weight"]] * 2


# ---------------------------------------------------------------- failures


def broken_step(kind: str) -> list[str]:
    """Job: a step that fails on rank 1 only, or at its end; nothing may be left of it."""
    import torch.distributed as dist

    seed_all(7)
    net = shard(linear(), everyone(2))
    loss(net, images()[0:8]).backward()
    before = copied({n: (p, p.grad) for n, p in net.named_parameters()})
    gradients = [p.grad for p in net.parameters()]
    masks = Masks(prunable_parameters(net))
    calls = [0]

    def failing(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        value = loss(model, batch)
        if kind == "loss" and calls[0] == 3 and dist.get_rank() == 1:
            return value * float("nan")
        if kind == "graph":
            return value.detach()
        # After the step: its weights have been written already.
        if kind == "measure" and masks.sparsity() > 0:
            raise ArithmeticError("no")
        return value

    message = ""
    try:
        Pruner(
            masks,
            PruningConfig(
                fisher=FisherConfig(8, 2, 16), step=StepConfig(line_search=False)
            ),
            Communicator(),
        ).step(FunctionLoss(net, images(), failing), 0.5)
    except (PruningError, ArithmeticError) as error:
        message = str(error)
    assert all(a is b.grad for a, b in zip(gradients, net.parameters(), strict=True))
    if message:
        assert sum(masks.zeros().values()) == 0
        assert masks.state_dict() == {}
        assert all(bool(masks.kept(name).all()) for name in masks.parameters)
    after = {n: (p, p.grad) for n, p in net.named_parameters()}
    return [message, *differences(whole(after), whole(before))]


def test_a_failed_step_leaves_nothing(ranks: RankPool) -> None:
    first, second = ranks.run(2, broken_step, "loss")
    assert len(first) == len(second) == 1
    assert first[0].startswith(
        "rank 1 failed in phase 'collect': PruningError: the loss of gradient 5"
    )
    assert second[0].endswith("is nan")
    for (message,) in ranks.run(2, broken_step, "graph"):
        assert "has no graph" in message
    for (message,) in ranks.run(2, broken_step, "measure"):
        assert message == "no"
    for message, *_ in ranks.run(2, broken_step, "none"):
        assert message == ""


# ---------------------------------------------------------------- refusals


def refused() -> dict[str, str]:
    """Job: layouts that cannot be pruned."""
    messages = {}

    def attempt(name: str, net: nn.Module, **options: Any) -> None:
        messages[name] = ""
        options = {"fisher": FisherConfig(8, 2), **options}
        try:
            prune(
                net,
                images(),
                loss,
                target_sparsity=0.5,
                **in_step(**options),
            )
        except ConfigurationError as error:
            messages[name] = str(error)

    mesh = everyone(2)
    net = linear()
    fully_shard(net[1], mesh=mesh)
    attempt("plain", net)
    net = linear()
    fully_shard(net, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    attempt("columns", net)
    plane = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    attempt("plane", shard(linear(), plane))
    attempt("part", shard(linear(), plane["replicate"]))
    for criterion in ("kfac", "hessian_diagonal"):
        attempt(criterion, shard(linear(), mesh), criterion=criterion)
    offload = CPUOffloadPolicy(pin_memory=False)
    net = fully_shard(linear(), mesh=mesh, offload_policy=offload)
    attempt("offloaded on CPUs", net)
    # As on GPUs: shards on the CPU, and a mesh of GPUs.
    mesh = DeviceMesh("cuda", [0, 1], _init_backend=False)
    for parameter in net.parameters():
        parameter._spec = dataclasses.replace(parameter._spec, mesh=mesh)
    attempt("offloaded", net)
    first = nn.Sequential(nn.Flatten(), Conv1D(4, 36))
    attempt(
        "inputs", shard(first, everyone(2)), selection=SelectionConfig(pattern="2:4")
    )
    return messages


def test_other_layouts_are_refused_by_name(ranks: RankPool) -> None:
    for found in ranks.run(2, refused):
        assert "'3.weight' is not sharded" in found["plain"]
        assert "'1.weight' has placements (Shard(dim=1),)" in found["columns"]
        assert "mesh of 2 dimension(s)" in found["plane"]
        assert "'1.weight' is sharded over the ranks" in found["part"]
        assert found["offloaded on CPUs"] == ""
        assert (
            "kept on cpu and computed on cuda (CPUOffloadPolicy)" in found["offloaded"]
        )
        assert "1.weight (its inputs are sharded over the ranks)" in found["inputs"]
        for criterion in ("kfac", "hessian_diagonal"):
            assert f"'{criterion}' needs whole parameters" in found[criterion]


# ---------------------------------------------------------------- fits


class Sharded(Classifier):
    """Shards itself where Lightning wants it."""

    def configure_model(self) -> None:
        if not any(isinstance(p, DTensor) for p in self.net.parameters()):
            shard(self.net, self.device_mesh["data_parallel"])


def strategy(world_size: int = 2, single_file: bool = False) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=world_size,
        tensor_parallel_size=1,
        save_distributed_checkpoint=not single_file,
    )


class AfterStep(pl.Callback):
    """Notes the whole weights before the first batch of each epoch."""

    def __init__(self) -> None:
        self.weights: list[Any] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.weights.append(whole_weights(module))


class Restless(torch.optim.AdamW):
    """Moves every weight in each step, whatever its gradient and its state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1e-3)
        return result


def restless(parameters: Any) -> Restless:
    return Restless(parameters, lr=1e-2, weight_decay=1e-2)


def fit_and_look() -> dict[str, Any]:
    """Job: a fit with everything in it, looked at from inside."""
    seed_all(1)
    module = Sharded(optimizer=restless, build=convolutional)
    pruner, after = pruning(schedule=PolynomialSchedule(0, 2)), AfterStep()
    fitted = trainer(
        pruner,
        after,
        devices=2,
        strategy=strategy(),
        max_epochs=4,
        gradient_clip_val=1.0,
    )
    fitted.fit(module, loader(), loader(16, shuffle=False))
    masks = pruner.masks.state_dict()
    weights = whole_weights(module)
    moments = whole(
        {
            n: fitted.optimizers[0].state[p]["exp_avg"]
            for n, p in module.named_parameters()
        }
    )
    return {
        "sparsity": pruner.masks.sparsity(),
        "zeros": sum(int((weights[name] == 0).sum()) for name in masks),
        "revived": sum(
            int((weights[n][~kept] != 0).sum()) for n, kept in masks.items()
        ),
        "momentum": sum(int((moments[n][~k] != 0).sum()) for n, k in masks.items()),
        "moved": sum(
            int((weights[n] != after.weights[-1][n]).sum().item()) for n in masks
        ),
        "weights": sum(kept.numel() for kept in masks.values()),
        "kinds": {type(p.data).__name__ for p in module.parameters()},
        "reports": [{**r.to_dict(), "seconds": {}} for r in pruner.reports],
    }


def test_masks_hold_in_a_sharded_fit(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, in_folder, str(tmp_path), "look", launch="trainer")
    assert differences(first, second) == []
    total = 3 * 9 + 108 * 12 + 12 * 4
    assert first["weights"] == total
    assert first["zeros"] == round(0.75 * total)
    assert first["sparsity"] == first["zeros"] / total
    assert first["revived"] == first["momentum"] == 0
    # Nothing but the kept weights has been trained on.
    assert first["moved"] == total - first["zeros"]
    assert first["kinds"] == {"DTensor"}
    assert len(first["reports"]) == 3
    assert all(r["measured_increase"] is not None for r in first["reports"])


def first_step(net: str) -> dict[str, Any]:
    """Give the weights right after the step at the start of a fit."""
    seed_all(1)
    pruner, after = (
        pruning(fisher=FisherConfig(6, 3, 16, collection="loop")),
        AfterStep(),
    )
    options: dict[str, Any] = {"devices": 2, "strategy": strategy()}
    kind = Sharded if net == "sharded" else Classifier
    fitted = trainer(
        pruner, after, max_epochs=1, **(options if net == "sharded" else {})
    )
    fitted.fit(kind(build=linear), loader())
    return dict(after.weights[0])


def test_the_step_of_a_sharded_fit_is_that_of_one_device(
    ranks: RankPool, tmp_path: Path
) -> None:
    found = ranks.run(2, in_folder, str(tmp_path), "first", launch="trainer")
    expected = first_step("plain")
    assert sum(int((v == 0).sum()) for v in expected.values()) == round(0.75 * 2336)
    assert [differences(f, expected) for f in found] == [[], []]


# ---------------------------------------------------------------- undisturbed


class Collect(pl.Callback):
    """Does what a step does before it writes, also between accumulated gradients."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        source, comm = TrainingStepLoss(trainer, module), Communicator("cpu")
        with source.session("train"):
            parameters = prunable_parameters(module)
            active = {
                n: torch.arange(local_sizes(p)[comm.rank])
                for n, p in parameters.items()
            }
            losses: list[float] = []
            task = GradientTask(source, parameters, active, 3, 1, comm, losses)
            for row in collect_sharded_gradients(task, self.size):
                self.seen += float(row.abs().sum())
            batches = source.batches(3, self.size, seed=1)
            again = compute_losses(source, batches, range(3), comm, 1)
        assert losses == pytest.approx(again) or self.size % 2 == 0


def trained(*callbacks: pl.Callback) -> dict[str, Any]:
    seed_all(2)
    fitted = trainer(
        *callbacks, devices=2, strategy=strategy(), accumulate_grad_batches=2
    )
    fitted.fit(Sharded(build=convolutional), loader(), loader(16, shuffle=False))
    return dict(whole(final_state(fitted)))


def undisturbed_fits() -> list[str]:
    """Job: fits with and without collection passes."""
    expected = trained()
    found = []
    for size in (2, 3):
        collect = Collect(size)
        found += differences(trained(collect), expected)
        assert collect.seen > 0
    return found


def test_a_sharded_collection_leaves_no_trace(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(2, in_folder, str(tmp_path), "undisturbed", launch="trainer")
    assert found == [[], []]


# ---------------------------------------------------------------- resume


def run(single_file: bool, folder: Path, path: str | None = None) -> dict[str, Any]:
    """Fit, saving or resuming, and give what was made, gathered."""
    seed_all(1 if path is None else 99)
    pruner = pruning(schedule=PolynomialSchedule(0, 3))
    callbacks: list[pl.Callback] = [Reseed(), pruner]
    options: dict[str, Any] = {}
    if path is None:
        callbacks.append(
            ModelCheckpoint(
                folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
            )
        )
        options["enable_checkpointing"] = True
    world_size = int(os.environ["WORLD_SIZE"])
    fitted = trainer(
        *callbacks,
        devices=world_size,
        strategy=strategy(world_size, single_file),
        max_epochs=4,
        **options,
    )
    module = Sharded(build=dropping)
    fitted.fit(module, loader(), loader(16, shuffle=False), ckpt_path=path)
    return {
        "weights": whole_weights(module),
        "moments": whole([o.state_dict()["state"] for o in fitted.optimizers]),
        "masks": pruner.masks.state_dict(),
        "reports": [{**r.to_dict(), "seconds": {}} for r in pruner.reports],
    }


def resumed(single_file: bool) -> list[str]:
    """Job: a run, and the same run resumed from every one of its first epochs."""
    folder = Path.cwd() / f"saved-{single_file}"
    uninterrupted = run(single_file, folder)
    found = []
    for epoch in (0, 1):
        path = folder / f"epoch={epoch}.ckpt"
        assert path.is_file() if single_file else path.is_dir()
        found += differences(run(single_file, folder, str(path)), uninterrupted)
    return found


def masks_resumed_elsewhere() -> list[Any]:
    """Job: the sparsity after resuming what another number of ranks has saved."""
    found = []
    for kind in (False, True):
        path = Path.cwd() / f"saved-{kind}" / "epoch=1.ckpt"
        made = run(kind, Path.cwd(), str(path))
        zeros = sum(int((made["weights"][n] == 0).sum()) for n in made["masks"])
        held = sum(int((~kept).sum()) for kept in made["masks"].values())
        found.append([zeros, held, len(made["reports"])])
    return found


def test_resumed_equals_uninterrupted(ranks: RankPool, tmp_path: Path) -> None:
    for job in ("resume distributed", "resume single file"):
        found = ranks.run(2, in_folder, str(tmp_path), job, launch="trainer")
        assert found == [[], []], job
    # Any number of ranks can load the masks, which are whole in the checkpoint.
    wanted = round(0.75 * (3 * 9 + 108 * 12 + 12 * 4))
    elsewhere = ranks.run(3, in_folder, str(tmp_path), "elsewhere", launch="trainer")
    assert elsewhere == [[[wanted, wanted, 4]] * 2] * 3
    saved = torch.load(tmp_path / "saved-True" / "epoch=2.ckpt", weights_only=True)
    (state,) = [v for k, v in saved["callbacks"].items() if "WoodFisher" in k]
    for name, kept in state["masks"].items():
        assert bool((saved["state_dict"][name][~kept] == 0).all())


JOBS: dict[str, Any] = {
    "look": fit_and_look,
    "first": lambda: first_step("sharded"),
    "undisturbed": undisturbed_fits,
    "resume distributed": lambda: resumed(False),
    "resume single file": lambda: resumed(True),
    "elsewhere": masks_resumed_elsewhere,
}


def in_folder(folder: str, job: str) -> Any:
    """Job: run another one in a folder."""
    os.chdir(folder)
    return JOBS[job]()
