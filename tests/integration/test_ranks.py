"""The same pruning step on 1, 2 and 3 real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PruningError,
    PruningReport,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.criteria.woodfisher import WoodFisher
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.exact_sum import ExactSum
from lightning_woodfisher.distributed.smallest import (
    select_smallest,
)
from lightning_woodfisher.fisher.inverse import FullInverseFisher
from lightning_woodfisher.pruning import pruner as pruner_module
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks

WORLD_SIZES = (1, 2, 3)
# Three ranks have uneven shares, which two do not.
SEVERAL = [pytest.param(2, marks=pytest.mark.slow), 3]

# Results of a case on every rank of a job with a given number of ranks.
Pruned = Callable[[int], list[dict[str, Any]]]


# ---------------------------------------------------------------- models and data


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(5 * 36, 17),
        nn.ReLU(),
        nn.Linear(17, 4),
    )


def convolution() -> nn.Module:
    """A network whose layers have so many outputs that a loop is faster."""
    return nn.Sequential(
        nn.Conv2d(1, 160, 3, padding=1),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(160, 4),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 23), nn.Tanh(), nn.Linear(23, 4))


def wide() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 150), nn.Tanh(), nn.Linear(150, 4))


def make(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(7)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model


def images(dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(160, 1, 8, 8, generator=generator).to(dtype)
    return TensorDataset(pixels, torch.randint(0, 4, (160,), generator=generator))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


# ---------------------------------------------------------------- equal on any number


class Shuffled:
    """Shuffles with the global generator, which differs between ranks, when opened."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        torch.manual_seed(200 + int(os.environ["RANK"]))

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i] for i in torch.randperm(len(self.batches)))


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of prune()."""

    build: Callable[[], nn.Module] = perceptron
    num_gradients: int = 13
    gradient_batch_size: int = 3
    block_size: int | None = 16
    model_mode: Any = "eval"
    scope: Any = "global"
    criterion: str = "woodfisher"
    update: Any = "joint"
    recompute_steps: int = 1
    targets: tuple[float, ...] = (0.7,)
    damping: float = 1e-4
    double: bool = False
    stream: Literal["", "list", "iterator", "shuffled", "loader"] = ""
    collection: Any = "auto"
    row_dtype: Any = "float32"
    first_order_samples: int | None = None
    line_search: bool = False
    fisher: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def prune(self) -> tuple[nn.Module, list[PruningReport]]:
        dtype = torch.float64 if self.double else torch.float32
        model, dataset = make(self.build).to(dtype), images(dtype)
        data: Any = dataset
        if self.stream:
            data = [dataset[i : i + 4] for i in range(0, 160, 4)]
        if self.stream == "iterator":
            data = iter(data)
        if self.stream == "shuffled":
            data = Shuffled(data)
        if self.stream == "loader":
            # Ranks are in different states when they open it.
            torch.manual_seed(100 + int(os.environ["RANK"]))
            data = DataLoader(dataset, batch_size=5, shuffle=True)
        fisher = FisherConfig(
            num_gradients=self.num_gradients,
            gradient_batch_size=self.gradient_batch_size,
            block_size=self.block_size,
            damping=self.damping,
            model_mode=self.model_mode,
            collection=self.collection,
            row_dtype=self.row_dtype,
            first_order_samples=self.first_order_samples,
            **self.fisher,
        )
        reports = [
            prune(
                model,
                data,
                cross_entropy,
                target_sparsity=target,
                fisher=fisher,
                selection=SelectionConfig(scope=self.scope),
                criterion=self.criterion,
                **in_step(
                    update=self.update,
                    recompute_steps=self.recompute_steps,
                    seed=5,
                    line_search=self.line_search,
                    **self.options,
                ),
            )
            for target in self.targets
        ]
        return model, reports


CASES = {
    "primal": Case(num_gradients=24, block_size=8),
    "dual": Case(num_gradients=9, block_size=50),
    "full": Case(block_size=None),
    "full, independent": Case(block_size=None, update="independent"),
    "full, layer": Case(block_size=None, scope="layer"),
    "independent": Case(update="independent"),
    "no update": Case(update="none"),
    "layer": Case(scope="layer"),
    "recomputed": Case(recompute_steps=2),
    "full, recomputed": Case(block_size=None, recompute_steps=2),
    "magnitude": Case(criterion="magnitude"),
    "magnitude, layer": Case(criterion="magnitude", scope="layer"),
    "kfac": Case(build=convolutional, criterion="kfac", num_gradients=50),
    "kfac, independent": Case(criterion="kfac", update="independent"),
    "kfac, layer, recomputed": Case(
        build=convolutional, criterion="kfac", scope="layer", recompute_steps=2
    ),
    "kfac, stream of batches": Case(criterion="kfac", stream="list"),
    "kfac, step by step": Case(criterion="kfac", targets=(0.4, 0.9), double=True),
    "layerwise": Case(criterion="layerwise", num_gradients=50),
    "layerwise, more ranks than batches": Case(criterion="layerwise"),
    "layerwise, layer, recomputed": Case(
        build=convolutional, criterion="layerwise", scope="layer", recompute_steps=2
    ),
    "layerwise, step by step, on a stream": Case(
        build=convolutional, criterion="layerwise", targets=(0.4, 0.9), stream="list"
    ),
    "layerwise, rows on several ranks": Case(
        build=wide, criterion="layerwise", num_gradients=50
    ),
    "layerwise, sampled labels": Case(
        criterion="layerwise", num_gradients=50, fisher={"sample_labels": True}
    ),
    "diagonal Fisher": Case(criterion="diagonal_fisher", num_gradients=50),
    "diagonal Fisher, one by one": Case(
        build=convolutional, criterion="diagonal_fisher", collection="loop"
    ),
    "Hessian diagonal": Case(build=convolutional, criterion="hessian_diagonal"),
    "Hessian diagonal, recomputed": Case(
        criterion="hessian_diagonal", recompute_steps=2, double=True
    ),
    "Hessian diagonal in training mode": Case(
        build=convolutional, criterion="hessian_diagonal", model_mode="train"
    ),
    "kfac in training mode": Case(
        build=convolutional, criterion="kfac", model_mode="train"
    ),
    "batchnorm": Case(build=convolutional),
    "batchnorm and dropout in training mode": Case(
        build=convolutional, model_mode="train"
    ),
    "several chunks of rows": Case(num_gradients=70, gradient_batch_size=1),
    "step by step": Case(targets=(0.4, 0.6, 0.9)),
    "raised damping": Case(damping=1e-20),
    "float64": Case(double=True),
    "stream of batches": Case(stream="list"),
    "iterator": Case(stream="iterator", recompute_steps=2),
    "stream that shuffles": Case(stream="shuffled", recompute_steps=2),
    "loader that shuffles": Case(stream="loader"),
    "one by one": Case(collection="loop"),
    "one by one, because it is faster": Case(
        build=convolution, num_gradients=9, gradient_batch_size=16
    ),
    "rows of bfloat16": Case(row_dtype="bfloat16"),
    "bfloat16, full": Case(row_dtype="bfloat16", block_size=None),
    "searched": Case(block_size=None, line_search=True, recompute_steps=2),
    "searched, two updates": Case(
        num_gradients=40,
        block_size=50,
        targets=(0.95,),
        line_search=True,
        recompute_steps=2,
    ),
    "searched, iterator": Case(stream="iterator", line_search=True),
    "WoodTaylor": Case(criterion="woodtaylor", update="independent"),
    "WoodTaylor, searched": Case(
        build=convolutional,
        criterion="woodtaylor",
        line_search=True,
        recompute_steps=2,
        first_order_samples=120,
    ),
    "WoodTaylor, training mode": Case(
        build=convolutional,
        criterion="woodtaylor",
        block_size=None,
        model_mode="train",
        line_search=True,
        first_order_samples=159,
    ),
    "many micro-batches": Case(
        build=convolutional, num_gradients=50, gradient_batch_size=2
    ),
    "centred, primal": Case(num_gradients=40, block_size=8, fisher={"centered": True}),
    "centred, dual": Case(num_gradients=9, block_size=50, fisher={"centered": True}),
    "centred, full": Case(block_size=None, fisher={"centered": True}),
    "sampled labels": Case(num_gradients=30, fisher={"sample_labels": True}),
    "sampled labels in training mode": Case(
        build=convolutional, model_mode="train", fisher={"sample_labels": True}
    ),
    "sampled labels of a stream": Case(stream="list", fisher={"sample_labels": True}),
    "repeated samples": Case(num_gradients=90, fisher={"repeat_samples": True}),
    "repeated stream": Case(
        num_gradients=50, stream="list", fisher={"repeat_samples": True}
    ),
    "repeated stream that shuffles": Case(
        num_gradients=50, stream="shuffled", fisher={"repeat_samples": True}
    ),
    **{
        f"same gradients, {name}": Case(
            num_gradients=number,
            block_size=size,
            recompute_steps=3,
            options={"reuse_gradients": True},
        )
        for name, number, size in (
            ("primal", 24, 8),
            ("dual", 9, 50),
            ("full", 13, None),
        )
    },
    "same gradients, layer": Case(
        scope="layer",
        recompute_steps=3,
        fisher={"centered": True},
        options={"reuse_gradients": True, "recompute_spacing": "polynomial"},
    ),
    "linear spacing without trust": Case(
        recompute_steps=4, options={"recompute_spacing": "linear", "trust_ratio": 1e-6}
    ),
    "batchnorm recalibrated": Case(
        build=convolutional, options={"batchnorm_recalibration_batches": 5}
    ),
    "batchnorm recalibrated on a stream": Case(
        build=convolutional,
        stream="iterator",
        options={"batchnorm_recalibration_batches": 2},
    ),
}


def prune_all() -> dict[str, Any]:
    """Job: every case; what came out, in plain types."""
    results = {}
    for name, case in CASES.items():
        model, reports = case.prune()
        results[name] = (
            {key: value.clone() for key, value in model.state_dict().items()},
            [report.to_dict() for report in reports],
        )
    return results


def comparable(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what depends on the clock or on the number of ranks."""
    varies = {"seconds", "bytes_exchanged", "fisher_bytes", "world_size"}
    return [{k: v for k, v in r.items() if k not in varies} for r in reports]


@pytest.fixture(scope="module")
def pruned(ranks: RankPool) -> Pruned:
    """Prune all cases on a number of ranks, once for each number."""
    return functools.cache(lambda world_size: ranks.run(world_size, prune_all))


@pytest.mark.parametrize("world_size", SEVERAL)
@pytest.mark.parametrize("case", list(CASES))
def test_world_size_does_not_change_the_result(
    pruned: Pruned, case: str, world_size: int
) -> None:
    expected, expected_reports = pruned(1)[0][case]
    for result in pruned(world_size):
        state, reports = result[case]
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert torch.equal(value, expected[name]), name
        assert comparable(reports) == comparable(expected_reports)
        assert all(report["world_size"] == world_size for report in reports)


def test_the_search_has_taken_one_update_and_the_other(pruned: Pruned) -> None:
    (report,) = pruned(3)[0]["searched, two updates"][1]
    assert report["updates"] == ["joint", "independent"]


@pytest.mark.parametrize("world_size", SEVERAL)
def test_every_rank_gives_the_same_report(pruned: Pruned, world_size: int) -> None:
    for case in CASES:
        first, *others = [result[case][1] for result in pruned(world_size)]
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                assert {**mine, "seconds": {}} == {**theirs, "seconds": {}}


@pytest.mark.parametrize("case", list(CASES))
def test_the_cases_prune_what_they_were_asked_for(pruned: Pruned, case: str) -> None:
    state, reports = pruned(1)[0][case]
    names = [layer["name"] for layer in reports[-1]["layers"]]
    weights = sum(state[name].numel() for name in names)
    zeros = {name: int((state[name] == 0).sum()) for name in names}
    target = CASES[case].targets[-1]
    if CASES[case].scope == "layer":
        assert all(zeros[n] == round(target * state[n].numel()) for n in names)
    else:
        assert sum(zeros.values()) == round(target * weights)
    assert [layer["zeros_after"] for layer in reports[-1]["layers"]] == [
        *zeros.values()
    ]
    assert bool(reports[-1]["raised_damping"]) == (case == "raised damping")
    one_by_one: dict[str, str] = {
        **dict.fromkeys(
            [
                name
                for name, chosen in CASES.items()
                if chosen.stream not in {"", "loader"}
            ],
            "loop: the data comes in batches",
        ),
        "one by one": "loop: requested",
        "one by one, because it is faster": "loop: faster for mini-batches of this size",
        "diagonal Fisher, one by one": "loop: requested",
        **dict.fromkeys(
            [name for name, chosen in CASES.items() if chosen.model_mode == "train"],
            "loop: in training mode samples of a batch may influence each other",
        ),
    }
    expected = one_by_one.get(case, "per-sample")
    by_criterion = {
        "magnitude": None,
        "kfac": "factors of layers",
        "hessian_diagonal": "loop: Hessian products",
        "layerwise": f"{len(names)} layers, 0 of them with residual targets",
    }
    expected = by_criterion.get(CASES[case].criterion, expected)
    assert reports[-1]["collection"] == expected
    # BatchNorm's statistics are as before, unless they were to be estimated anew.
    for name, buffer in make(CASES[case].build).named_buffers():
        anew = "recalibrated" in case and "running" in name
        assert torch.equal(state[name], buffer) != anew, name
    if case == "linear spacing without trust":
        assert reports[-1]["stages"] > 4


def losses_with_own_statistics() -> list[tuple[float | None, float | None]]:
    """Job: losses of steps whose ranks have BatchNorm statistics of their own."""
    found = []
    for criterion in ("magnitude", "layerwise", "kfac", "woodfisher"):
        model = make(convolutional)
        model[1].running_mean.add_(0.3 * Communicator().rank)
        settings = {"criterion": criterion, "fisher": FisherConfig(70, 2, 16)}
        report = prune(model, images(), cross_entropy, target_sparsity=0.5, **settings)
        found.append((report.loss_before, report.loss_after))
    return found


def test_losses_are_those_with_the_statistics_of_the_first_rank(
    ranks: RankPool,
) -> None:
    # These are what a checkpoint has, so that a resumed fit reports the same.
    (alone,) = ranks.run(1, losses_with_own_statistics)
    assert ranks.run(2, losses_with_own_statistics) == [alone, alone]


@pytest.mark.parametrize("world_size", [1, *SEVERAL])
def test_bytes_exchanged_are_counted(pruned: Pruned, world_size: int) -> None:
    weights = 64 * 23 + 23 * 4
    (report,) = pruned(world_size)[0]["primal"][1]
    # A float32 for the share (R-1)/R of every row, and the gathered weights, padded.
    rows = 24 * weights * 4 * (world_size - 1) / world_size
    gathered = weights * (4 + 1) * (world_size - 1)
    sent = report["bytes_exchanged"]
    if world_size == 1:
        assert sent == 0
    else:
        assert sent == pytest.approx(rows + gathered, rel=0.1)


# ---------------------------------------------------------------- memory is shared


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 100),
        nn.Linear(100, 4),
    )


def fisher_bytes() -> dict[str, list[int]]:
    """Job: bytes of Fisher state by rank, for each engine."""
    settings = {
        "primal": FisherConfig(16, 1, 16, precision="float32"),
        "dual": FisherConfig(8, 1, 64),
        "full": FisherConfig(8, 1, None),
    }
    return {
        name: list(
            prune(
                make(wide),
                images(),
                cross_entropy,
                target_sparsity=0.5,
                fisher=fisher,
                step=StepConfig(measure_loss=False),
            ).fisher_bytes
        )
        for name, fisher in settings.items()
    }


def test_every_rank_holds_its_share_of_the_fisher(ranks: RankPool) -> None:
    results = {size: ranks.run(size, fisher_bytes)[0] for size in WORLD_SIZES}
    weights = 64 * 256 + 256 * 100 + 100 * 4
    assert results[1]["primal"] == [weights * 16 * 4]
    assert results[1]["dual"] == [weights * 8 * 4]
    for engine in ("primal", "dual", "full"):
        (whole,) = results[1][engine]
        for size in (2, 3):
            assert sum(results[size][engine]) == whole
            for share in results[size][engine]:
                assert share == pytest.approx(whole / size, rel=0.1), engine


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))


def prune_one_unit() -> tuple[Tensor, dict[str, Any]]:
    """Job: fewer units than ranks."""
    model = make(tiny)
    with torch.no_grad():
        model[1].weight[:, 2:] = 0.0  # 8 weights are left, which is one block
    report = prune(
        model,
        images(),
        cross_entropy,
        target_sparsity=1 - 3 / 256,
        fisher=FisherConfig(6, 2, 8),
    )
    return model[1].weight.detach(), report.to_dict()


def test_more_ranks_than_blocks(ranks: RankPool) -> None:
    ((expected, report),) = ranks.run(1, prune_one_unit)
    assert int((expected != 0).sum()) == 3
    for size in (2, 3):
        for weight, other in ranks.run(size, prune_one_unit):
            assert torch.equal(weight, expected)
            assert comparable([other]) == comparable([report])
            assert sorted(other["fisher_bytes"])[:-1] == [0] * (size - 1)


# ---------------------------------------------------------------- failures


class Stumbling:
    """A loss that fails on one rank: at a call, or only without or with gradients."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.calls = 0
        self.rank = dist.get_rank()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        loss = cross_entropy(model, batch)
        if self.rank != 1:
            return loss
        if self.kind == "raises" and self.calls == 3:
            raise LookupError("a book is missing")
        if self.kind == "raises at once":
            raise LookupError("a book is missing")
        if self.kind == "raises while measuring" and not torch.is_grad_enabled():
            raise LookupError("a book is missing")
        if self.kind == "infinite loss" and self.calls == 2:
            return loss / 0.0
        if self.kind == "infinite gradient" and self.calls == 2:
            zero = (model[1].weight * 0.0).square().sum()
            return loss + zero.sqrt()  # d sqrt(x) at 0 is not finite
        if self.kind == "no graph":
            return loss.detach()
        return loss


class Torn(Dataset[Any]):
    """Cannot be read on rank 1, or has fewer samples there."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 5 if self.kind == "short data" and dist.get_rank() == 1 else 160

    def __getitem__(self, index: int) -> Any:
        if dist.get_rank() == 1:
            raise OSError("the disk is gone")
        return images()[index]


# Where memory runs out on rank 1: in which call of what, and in which of its calls. The
# methods of the full Fisher stand between its own collectives.
PLACES: dict[str, tuple[Any, str, int]] = {
    "layout": (WoodFisher, "layout", 1),
    "begin": (WoodFisher, "begin", 1),
    "observe": (WoodFisher, "observe", 1),
    "score": (WoodFisher, "score", 1),
    "compensate": (WoodFisher, "compensate", 1),
    "predict": (WoodFisher, "predicted_increase", 1),
    "start of the sum": (ExactSum, "__init__", 2),
    "end of the sum": (ExactSum, "result", 1),
    "diagonal": (FullInverseFisher, "_solve_diagonal", 1),
    "factor": (FullInverseFisher, "_factorize_gram", 2),
    "projection": (FullInverseFisher, "_project", 1),
    "combination": (FullInverseFisher, "_combine", 1),
    "description": (ActiveWeights, "name_blocks", 1),
    "report": (pruner_module, "summarize", 1),
    "masks": (Masks, "prune", 1),
    **{f"rows of unit {n}": (FullInverseFisher, "_unit_rows", n) for n in (1, 9, 40)},
    "largest norm": (torch.linalg, "vector_norm", 1),
}


@contextlib.contextmanager
def exhausted(kind: str) -> Iterator[None]:
    """Let memory run out on rank 1."""
    if kind not in PLACES or dist.get_rank() != 1:
        yield
        return
    owner, name, when = PLACES[kind]
    original, calls = getattr(owner, name), itertools.count(1)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == when:
            raise MemoryError("no room left")
        return original(*args, **kwargs)

    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


FAILURES = {
    **dict.fromkeys(PLACES, ("MemoryError", "no room left")),
    "short data": ("TooFewSamplesError", "7 times gradient_batch_size"),
    "raises": ("LookupError", "a book is missing"),
    "raises at once": ("LookupError", "a book is missing"),
    "raises while measuring": ("LookupError", "a book is missing"),
    "infinite loss": ("PruningError", "(samples "),
    "infinite gradient": ("PruningError", "is not finite in 1.weight"),
    "no graph": ("PruningError", "has no graph"),
    "unreadable data": ("OSError", "the disk is gone"),
}


def fail_everywhere() -> dict[str, Any]:
    """Job: what each failure looks like on this rank, and what it leaves behind."""
    outcomes = {}
    for kind in FAILURES:
        model = make(perceptron)
        with torch.no_grad():
            model[1].weight[0] = 0.0
        masks = Masks(prunable_parameters(model))
        masks.prune_zeros()
        before, kept = (
            {n: p.clone() for n, p in model.named_parameters()},
            masks.state_dict(),
        )
        # In training mode every rank measures, and not in one batch on the first.
        block_size = None if kind in PLACES else 16
        config = PruningConfig(
            fisher=FisherConfig(7, 2, block_size, model_mode="train")
        )
        data = Torn(kind) if kind.endswith("data") else images()
        pruner = Pruner(masks, config, Communicator())
        try:
            with exhausted(kind):
                pruner.step(FunctionLoss(model, data, Stumbling(kind)), 0.6)
            outcome = ("nothing", "")
        except Exception as error:
            outcome = (type(error).__name__, str(error))
        same = all(torch.equal(before[n], p) for n, p in model.named_parameters())
        after = masks.state_dict()
        same_masks = after.keys() == kept.keys() and all(
            torch.equal(after[n], kept[n]) for n in kept
        )
        untouched = all(p.grad is None for p in model.parameters()) and model.training
        outcomes[kind] = (*outcome, same, same_masks, untouched)
    # The ranks are in step again: a whole step works after all that.
    _, (report,) = Case(targets=(0.5,)).prune()
    outcomes["afterwards"] = report.zeros
    return outcomes


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_failing_rank_stops_all_and_changes_nothing(
    ranks: RankPool, world_size: int
) -> None:
    results = ranks.run(world_size, fail_everywhere, timeout=60)
    for kind, (error, text) in FAILURES.items():
        for rank, result in enumerate(results):
            name, message, same_weights, same_masks, untouched = result[kind]
            if rank == 1:
                assert name == error
                assert text in message
            else:
                assert name == "PruningError"
                assert re.match(rf"rank 1 failed( in phase '\w+')?: {error}: ", message)
                assert text in message
            assert same_weights, kind
            assert same_masks, kind
            assert untouched, kind
    assert {result["afterwards"] for result in results} == {round((64 + 4) * 23 / 2)}


def prune_different_models() -> list[tuple[str, bool]]:
    """Job: rank 1 starts from other weights, or from another number of zeros."""
    outcomes = []
    for change in (1e-3, None):
        model = make(perceptron)
        if dist.get_rank() == 1:
            with torch.no_grad():
                if change is None:
                    model[1].weight[0] = 0.0
                else:
                    model[3].weight[0, 0] += change
        before = model[1].weight.clone()
        config = FisherConfig(6, 2, 16)
        try:
            prune(model, images(), cross_entropy, target_sparsity=0.5, fisher=config)
            outcomes.append(("nothing", False))
        except PruningError as error:
            outcomes.append((str(error), torch.equal(before, model[1].weight)))
    return outcomes


def test_ranks_that_start_from_different_weights_are_refused(ranks: RankPool) -> None:
    for result in ranks.run(2, prune_different_models):
        names = ("'3.weight'", "'1.weight'")
        for name, (message, unchanged) in zip(names, result, strict=True):
            assert f"the weights of {name} (rank 1 differs from rank 0)" in message
            assert "before the step" in message
            assert unchanged


def test_too_little_data_is_refused_on_every_rank(ranks: RankPool) -> None:
    assert ranks.run(2, prune_too_much) == ["70 times 3 needs 210, has 160"] * 2


def prune_too_much() -> str:
    """Job: more samples than there are."""
    try:
        Case(num_gradients=70).prune()
    except ConfigurationError as error:
        wanted = ("num_gradients=70", "gradient_batch_size=3", "210 samples", "has 160")
        if all(text in str(error) for text in wanted):
            return "70 times 3 needs 210, has 160"
        return str(error)
    return "nothing"


# ---------------------------------------------------------------- collectives


def numbers_of(rank: int, length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32) + 100.0 * (rank + 1)


def collectives() -> None:
    """Job: every collective, with uneven and empty shares."""
    comm = Communicator()
    size, rank = comm.world_size, comm.rank
    assert size == 3

    # Rows: rank 1 owns nothing; ranks have as many rows, fewer, or none.
    sizes = [2, 0, 3]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for counts in (
            [1, 1, 1],
            [1, 1, 0],
            [1, 0, 0],
            [3, 3, 3],
            [2, 2, 1],
            [0, 0, 4],
        ):
            rows = numbers_of(rank, counts[rank] * 5).view(-1, 5).to(dtype)
            before = comm.bytes_sent
            received = comm.exchange(rows, sizes, counts).wait()
            start = sum(sizes[:rank])
            expected = torch.cat(
                [numbers_of(s, n * 5).view(-1, 5) for s, n in enumerate(counts)]
            ).to(dtype)[:, start : start + sizes[rank]]
            assert received.dtype == dtype
            assert torch.equal(received, expected)
            sent = counts[rank] * (5 - sizes[rank]) * dtype.itemsize
            assert comm.bytes_sent - before == sent

    assert comm.broadcast_text(f"rank {rank}") == "rank 0"

    # Two exchanges on their way at once keep apart.
    row = numbers_of(rank, 3).view(1, 3)
    first = comm.exchange(row, [1, 1, 1], [1, 1, 1])
    second = comm.exchange(-row, [1, 1, 1], [1, 1, 1])
    assert torch.equal(second.wait(), -first.wait())

    for dtype in (torch.float32, torch.float64, torch.uint8, torch.int64):
        shard = torch.full((sizes[rank],), rank, dtype=dtype)
        whole = comm.gather_shards(shard, sizes)
        assert whole.tolist() == [0, 0, 2, 2, 2]
        assert whole.dtype == dtype
    assert comm.gather_numbers([rank, rank / 3]) == [[r, r / 3] for r in range(3)]
    assert comm.sum_integers(torch.tensor([rank, 1])).tolist() == [3, 3]
    assert comm.maximum(torch.tensor([rank, -rank])).tolist() == [2, 0]

    tensors = [
        torch.full((2,), float(rank)),
        torch.tensor(rank),
        torch.tensor([rank > 0]),
    ]
    comm.broadcast(tensors)
    assert [t.tolist() for t in tensors] == [[0.0, 0.0], 0, [False]]

    comm.require_equal(torch.tensor(-5), "the number")
    for odd in range(3):
        # Also at the ends of int64.
        for usual, other in ((1, 2), (-(2**63), 2**63 - 1), (0, -1)):
            with pytest.raises(PruningError, match="disagree about the number"):
                comm.require_equal(
                    torch.tensor(other if rank == odd else usual), "the number"
                )

    comm.raise_together()
    for failing in ([0], [2], [1, 2]):
        own = KeyError(f"of {rank}") if rank in failing else None
        expected_error = KeyError if rank in failing else PruningError
        text = (
            f"of {rank}" if rank in failing else f"rank {failing[0]} failed: KeyError"
        )
        with pytest.raises(expected_error, match=text):
            comm.raise_together(own)


def test_collectives(ranks: RankPool) -> None:
    ranks.run(3, collectives)


def summands() -> list[Tensor]:
    """Numbers of very different size and sign: float addition depends on their order."""
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-12, 4, (12, 40), generator=generator)
    values = torch.randn(12, 40, generator=generator, dtype=torch.float64) * scale
    return list(values)


def sum_exactly(comm: Communicator, summands: list[Tensor], bound: Tensor) -> Tensor:
    total = ExactSum(comm, bound, (40,))
    for summand in summands:
        total.add(summand)
    return total.result()


def sum_shares(orders: list[list[int]]) -> list[Tensor]:
    """Job: the same sum with the summands dealt out in several ways."""
    comm, parts = Communicator(), summands()
    bound = torch.stack(parts).abs().sum(dim=0).max()
    totals = []
    for order in orders:
        mine = [parts[i] for i in order[comm.rank :: comm.world_size]]
        totals.append(sum_exactly(comm, mine, bound))
    # Everything with one rank; the bound of one rank counts for all.
    everything = parts if comm.rank == 0 else []
    own = bound if comm.rank == 0 else torch.zeros(())
    totals.append(sum_exactly(comm, everything, own))
    return totals


def test_sums_over_ranks_are_exact_and_know_no_order(ranks: RankPool) -> None:
    generator = torch.Generator().manual_seed(1)
    orders = [list(range(12)), list(range(11, -1, -1))]
    orders += [torch.randperm(12, generator=generator).tolist() for _ in range(3)]
    results = [
        total
        for size in WORLD_SIZES
        for totals in ranks.run(size, sum_shares, orders)
        for total in totals
    ]
    assert len(results) == 6 * 6
    assert all(torch.equal(results[0], other) for other in results[1:])
    parts = torch.stack(summands())
    exact = [float(sum(map(Fraction, column))) for column in parts.T.tolist()]
    bound = float(parts.abs().sum(dim=0).max())
    error = (results[0] - torch.tensor(exact, dtype=torch.float64)).abs().max()
    # Twelve roundings to half a unit of bound * 2**-60, and one of the result.
    assert float(error) <= 7 * bound * 2.0**-60 + 2.0**-53 * bound
    plain = [torch.stack([summands()[i] for i in order]).sum(dim=0) for order in orders]
    assert not all(torch.equal(plain[0], other) for other in plain[1:])


def tied_scores() -> tuple[Tensor, Tensor, Tensor]:
    """Scores of three values, their groups, and their sizes."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(0, n, (240,), generator=generator) for n in (3, 2, 4)]
    return draw[0].double(), draw[1], draw[2] + 1


def select_shares(counts: list[int], sized: bool) -> list[bool]:
    """Job: the choice among a rank's run of the scores."""
    comm = Communicator()
    cuts = [240 * rank // comm.world_size for rank in range(comm.world_size + 1)]
    scores, groups, sizes = (
        tensor[cuts[comm.rank] : cuts[comm.rank + 1]] for tensor in tied_scores()
    )
    chosen = select_smallest(scores, groups, counts, comm, sizes if sized else None)
    return chosen.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("sized", [False, True])
def test_ties_go_to_the_lowest_index_of_all_ranks(ranks: RankPool, sized: bool) -> None:
    counts = [50, 90]
    scores, groups, sizes = tied_scores()
    expected = torch.zeros(240, dtype=torch.bool)
    for group, room in enumerate(counts):
        order = sorted(
            torch.nonzero(groups == group).flatten().tolist(),
            key=lambda index: (float(scores[index]), index),
        )
        for index in order:
            room -= int(sizes[index]) if sized else 1
            if room < 0:
                break
            expected[index] = True
    for size in WORLD_SIZES:
        shares = ranks.run(size, select_shares, counts, sized)
        assert sum(shares, []) == expected.tolist()
