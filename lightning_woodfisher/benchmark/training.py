"""Collection of gradients, a whole pruning step, and training under masks."""

from __future__ import annotations

__all__ = [
    "CollectionRow",
    "MaskRow",
    "StepRow",
    "measure_collection",
    "measure_masks",
    "measure_step",
]

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.benchmark.networks import (
    RandomImages,
    ResNet20,
    Transformer,
    cross_entropy,
)
from lightning_woodfisher.benchmark.recursion import (
    BlockRun,
    Plan,
    block_runs,
    choose_plan,
    recursion_diagonal,
    recursion_inverse,
)
from lightning_woodfisher.benchmark.timing import Tick, measure_alternately, wait_for
from lightning_woodfisher.criteria.obs import Update, saliency
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.smallest import (
    select_smallest,
)
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.gradients.collect import collect_gradients
from lightning_woodfisher.gradients.task import GradientTask
from lightning_woodfisher.one_shot import prune
from lightning_woodfisher.pruning.config import StepConfig
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.partition import make_partition

_BATCH = 128
_VMAP_CHUNK = 32
_SPARSITY = 0.5
_MASKED_SHARE = 0.9
_ROWS_TRIED = 8
WARM_UP_STEPS = 3


_BASELINE = "loop + recursion"
_PUBLISHED = "loop + published recursion"


@dataclass(frozen=True)
class CollectionRow:
    """One way to get per-sample gradients of ResNet-20.

    Attributes:
        way: ``"batched"`` (no per-sample gradients: the unit), ``"loop"``, ``"vmap"`` or
            ``"collect_gradients"``.
        samples: their number; one gradient each.
        seconds: median.
        runs: seconds of every repetition.
        cores: processor seconds per second.
        ratio: seconds over those of ``"batched"``.
    """

    way: str
    samples: int
    seconds: float
    runs: tuple[float, ...]
    cores: float
    ratio: float


@dataclass(frozen=True)
class StepRow:
    """A whole pruning step of ResNet-20.

    Attributes:
        way: ``"ours, independent"``, ``"ours, joint"`` or ``"loop + recursion"`` (with
            the independent update, as published).
        num_gradients: N; one sample each.
        block_size: B.
        seconds: median.
        runs: seconds of every repetition.
        cores: processor seconds per second.
        ratio: seconds of ``"loop + recursion"`` over ``seconds``.
        equal_mask: share of weights that are kept or pruned as by ``"loop + recursion"``.
    """

    way: str
    num_gradients: int
    block_size: int
    seconds: float
    runs: tuple[float, ...]
    cores: float
    ratio: float
    equal_mask: float


@dataclass(frozen=True)
class MaskRow:
    """A training step with masks and without.

    Attributes:
        network: its name.
        masked: number of tensors with a mask.
        steps: measured steps of each kind; they alternate.
        plain_seconds: median step without masks.
        masked_seconds: median step with masks.
        ratio: ``masked_seconds / plain_seconds``.
        mask_seconds: median of the two mask passes alone, within the masked step; on a
            GPU only the time to launch them.
    """

    network: str
    masked: int
    steps: int
    plain_seconds: float
    masked_seconds: float
    ratio: float
    mask_seconds: float


def measure_collection(
    samples: int = 256,
    *,
    repeats: int = 3,
    device: torch.device | str = "cpu",
    width: int = 16,
    image_size: int = 32,
    tick: Tick = lambda _: None,
) -> list[CollectionRow]:
    """Measure ways to get the gradients of single samples of ResNet-20.

    All take gradients of the prunable weights in evaluation mode; rows are discarded.

    Args:
        samples: their number.
        repeats: repetitions, after one that is not counted.
        device: where.
        width: of the network.
        image_size: of the images.
        tick: called after every repetition of every way.

    Returns:
        A row for each way.
    """
    device = torch.device(device)
    model = _make_network(width, device)
    data = RandomImages(samples, image_size)
    ways: dict[str, Callable[[], object]] = {
        "batched": lambda: _run_batched(model, data),
        "loop": lambda: _run_loop(model, data, samples, None),
        "vmap": lambda: _run_vmap(model, data),
        "collect_gradients": lambda: _run_collection(model, data, samples),
    }
    for action in ways.values():
        action()
    timings = measure_alternately(ways, repeats, device, tick)
    unit = timings["batched"].seconds
    return [
        CollectionRow(way, samples, t.seconds, t.runs, t.cores, t.seconds / unit)
        for way, t in timings.items()
    ]


def measure_step(
    num_gradients: int = 1000,
    block_size: int = 288,
    *,
    repeats: int = 3,
    device: torch.device | str = "cpu",
    width: int = 16,
    image_size: int = 32,
    as_published: bool = False,
    tick: Tick = lambda _: None,
) -> list[StepRow]:
    """Measure a pruning step of ResNet-20 to 50 %, gradients included.

    The baseline takes gradients one sample at a time, inverts by the recursion, and
    selects and updates as published; the same samples, λ and global selection for all.
    How the recursion runs best is found out before, and not counted.

    Args:
        num_gradients: N, of one sample each.
        block_size: B.
        repeats: repetitions.
        device: where.
        width: of the network.
        image_size: of the images.
        as_published: also with the recursion as batched products over all blocks.
        tick: called after every repetition of every way.

    Returns:
        A row for each way.
    """
    device = torch.device(device)
    model = _make_network(width, device)
    data = RandomImages(num_gradients, image_size)
    fisher = FisherConfig(num_gradients, 1, block_size, damping=1e-5)
    sizes = [p.numel() for p in prunable_parameters(model).values()]
    runs = block_runs(make_partition(sizes, block_size, 1))
    some = torch.randn(_ROWS_TRIED, sum(sizes), device=device) * 1e-3
    plan = choose_plan(some, runs, fisher.damping)
    masks: dict[str, Tensor] = {}

    def remember(way: str, pruned: nn.Module) -> None:
        weights = prunable_parameters(pruned).values()
        masks[way] = torch.cat([w.detach().reshape(-1) == 0 for w in weights])

    def ours(update: Update) -> None:
        pruned = copy.deepcopy(model)
        prune(
            pruned,
            data,
            cross_entropy,
            target_sparsity=_SPARSITY,
            fisher=fisher,
            step=StepConfig(update=update, measure_loss=False),
        )
        remember(f"ours, {update}", pruned)

    def baseline(way: str = _BASELINE, plan: Plan = plan) -> None:
        pruned = copy.deepcopy(model)
        _prune_as_published(pruned, data, fisher, runs, plan)
        remember(way, pruned)

    published = Plan("products", max(run.count for run in runs))
    ways: dict[str, Callable[[], object]] = {
        _BASELINE: baseline,
        **(
            {_PUBLISHED: lambda: baseline(_PUBLISHED, published)}
            if as_published
            else {}
        ),
        "ours, independent": lambda: ours("independent"),
        "ours, joint": lambda: ours("joint"),
    }
    timings = measure_alternately(ways, repeats, device, tick)
    return [
        StepRow(
            way=way,
            num_gradients=num_gradients,
            block_size=block_size,
            seconds=timing.seconds,
            runs=timing.runs,
            cores=timing.cores,
            ratio=timings[_BASELINE].seconds / timing.seconds,
            equal_mask=float((masks[way] == masks[_BASELINE]).double().mean()),
        )
        for way, timing in timings.items()
    ]


def measure_masks(
    steps: int = 40,
    *,
    device: torch.device | str = "cpu",
    batch: int = 32,
    networks: Mapping[str, tuple[nn.Module, Tensor]] | None = None,
    tick: Tick = lambda _: None,
) -> list[MaskRow]:
    """Measure what masks add to a training step with AdamW, at 90 % zeros.

    With masks, a step does what the callback adds to it: gradients are masked before
    and weights after the optimizer.

    Args:
        steps: of each kind; they alternate.
        device: where.
        batch: samples in a step, of the default networks.
        networks: models and inputs by name; None for ResNet-20 and a transformer of four
            layers of width 256 on sequences of 64.
        tick: called after every pair of steps.

    Returns:
        A row for each network.
    """
    device = torch.device(device)
    if networks is None:
        torch.manual_seed(0)
        networks = {
            "resnet20": (ResNet20(), torch.randn(batch, 3, 32, 32)),
            "transformer": (Transformer(), torch.randn(batch, 64, 256)),
        }
    return [
        _measure_masked_training(
            name, model.to(device).train(), inputs.to(device), steps, tick
        )
        for name, (model, inputs) in networks.items()
    ]


def _make_network(width: int, device: torch.device) -> ResNet20:
    torch.manual_seed(0)
    return ResNet20(width).to(device).eval()


def _run_batched(model: nn.Module, data: RandomImages) -> None:
    parameters = list(prunable_parameters(model).values())
    device = parameters[0].device
    for batch in zip(
        torch.split(data.images, _BATCH), torch.split(data.labels, _BATCH), strict=True
    ):
        loss = cross_entropy(model, (batch[0].to(device), batch[1].to(device)))
        torch.autograd.grad(loss, parameters)


def _run_loop(
    model: nn.Module, data: RandomImages, samples: int, rows: Tensor | None
) -> None:
    """One backward pass for each sample; gradients go to ``rows`` when it is given."""
    source = FunctionLoss(model, data, cross_entropy)
    batches = source.batches(samples, 1, derive_seed(0, 0, 0))
    parameters = list(prunable_parameters(model).values())
    for index in range(samples):
        loss = source.loss(batches.fetch(index), index)
        gradients = torch.autograd.grad(loss, parameters)
        if rows is not None:
            torch.cat([g.reshape(-1) for g in gradients], out=rows[index])


def _run_vmap(model: nn.Module, data: RandomImages) -> None:
    selected = prunable_parameters(model)
    device = next(iter(selected.values())).device

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        def call(inputs: Tensor) -> Any:
            return torch.func.functional_call(model, weights, (inputs,))

        return cross_entropy(call, (image.unsqueeze(0), label.unsqueeze(0)))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    weights = {name: p.detach() for name, p in selected.items()}
    for images, labels in zip(
        torch.split(data.images, _VMAP_CHUNK),
        torch.split(data.labels, _VMAP_CHUNK),
        strict=True,
    ):
        per_sample(weights, images.to(device), labels.to(device))


def _run_collection(model: nn.Module, data: RandomImages, samples: int) -> None:
    parameters = prunable_parameters(model)
    device = next(iter(parameters.values())).device
    active = {n: torch.arange(p.numel(), device=device) for n, p in parameters.items()}
    source = FunctionLoss(model, data, cross_entropy)
    seed = derive_seed(0, 0, 0)
    task = GradientTask(source, parameters, active, samples, seed, Communicator(device))
    width = sum(len(positions) for positions in active.values())
    with source.session("eval"):
        for _ in collect_gradients(task, source.batches(samples, 1, seed), [width]):
            pass


@torch.no_grad()
def _prune_as_published(
    model: nn.Module,
    data: RandomImages,
    fisher: FisherConfig,
    runs: list[BlockRun],
    plan: Plan,
) -> None:
    """Single-sample loop, recursion, global selection, independent update."""
    parameters = prunable_parameters(model)
    device = next(iter(parameters.values())).device
    sizes = [p.numel() for p in parameters.values()]
    rows = torch.empty(fisher.num_gradients, sum(sizes), device=device)
    with torch.enable_grad():
        _run_loop(model, data, fisher.num_gradients, rows)
    inverses = recursion_inverse(rows, runs, fisher.damping, plan)
    diagonal = recursion_diagonal(inverses)
    weights = torch.cat([p.reshape(-1) for p in parameters.values()])
    count = round(_SPARSITY * len(weights))
    scores = saliency(weights, diagonal).double()
    removed = select_smallest(scores, None, [count], Communicator(device))
    weights += _independent_update(weights, removed, diagonal, runs, inverses)
    for parameter, new in zip(
        parameters.values(),
        torch.split(weights.masked_fill_(removed, 0.0), sizes),
        strict=True,
    ):
        parameter.copy_(new.view_as(parameter))


def _independent_update(
    weights: Tensor,
    removed: Tensor,
    diagonal: Tensor,
    runs: list[BlockRun],
    inverses: list[Tensor],
) -> Tensor:
    scaled = torch.where(removed, weights / diagonal, 0.0)
    change = torch.empty_like(weights)
    for run, inverse in zip(runs, inverses, strict=True):
        blocks = scaled[run.start : run.stop].view(run.count, run.size, 1)
        change[run.start : run.stop] = -torch.bmm(inverse, blocks).view(-1)
    return change


def _measure_masked_training(
    name: str, model: nn.Module, inputs: Tensor, steps: int, tick: Tick
) -> MaskRow:
    parameters = prunable_parameters(model)
    masks = Masks(parameters)
    masks.prune({n: torch.rand_like(p) < _MASKED_SHARE for n, p in parameters.items()})
    optimizer = torch.optim.AdamW(model.parameters())
    labels = torch.arange(len(inputs), device=inputs.device) % 10
    seconds: dict[bool, list[float]] = {False: [], True: []}
    passes: list[float] = []

    def masked(apply: Callable[[], None]) -> float:
        start = time.perf_counter()
        apply()
        return time.perf_counter() - start

    for step in range(WARM_UP_STEPS + steps):
        for with_masks in (True, False) if step % 2 else (False, True):
            wait_for(inputs.device)
            start, spent = time.perf_counter(), 0.0
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(model, (inputs, labels)))
            if with_masks:
                spent += masked(masks.apply_to_gradients)
            optimizer.step()
            if with_masks:
                spent += masked(masks.apply)
            wait_for(inputs.device)
            if step >= WARM_UP_STEPS:
                seconds[with_masks].append(time.perf_counter() - start)
                passes += [spent] * with_masks
        tick(name)
    plain, both = (statistics.median(seconds[kind]) for kind in (False, True))
    return MaskRow(
        network=name,
        masked=len(parameters),
        steps=steps,
        plain_seconds=plain,
        masked_seconds=both,
        ratio=both / plain,
        mask_seconds=statistics.median(passes),
    )
