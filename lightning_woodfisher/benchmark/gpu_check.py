"""The self-check ``lightning-woodfisher gpu-check``: does pruning work on this GPU?

Ten parts of several cases each. A case that checks results has a verdict, the others only
measure. All figures are written to a file before and after each case, so that a time limit
loses nothing.
"""

from __future__ import annotations

__all__ = ["CheckRow", "make_parser", "run_gpu_check"]

import argparse
import contextlib
import copy
import functools
import gc
import itertools
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import one_shot
from lightning_woodfisher.base.errors import MissingPackageError
from lightning_woodfisher.benchmark import (
    collection,
    command,
    fits,
    inverse,
    masks,
    networks,
    output,
    scaling,
    structures,
    timing,
)
from lightning_woodfisher.benchmark.cases import custom_case, preset_cases, slice_case
from lightning_woodfisher.benchmark.networks import cross_entropy, random_images
from lightning_woodfisher.criteria import CRITERIA
from lightning_woodfisher.export import semi_structured
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.config import SelectionConfig, StepConfig
from lightning_woodfisher.resources.estimate import estimate
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.pruner import prune_structures
from lightning_woodfisher.weights.layers import prunable_parameters

Figures = dict[str, Any]

# No case starts later.
_SECONDS = 480.0
# GPUs of data centers have more.
_LARGE_MEMORY = 32e9
# What precision="auto" promises.
_LARGEST_INVERSE_ERROR = 1e-3
# Smallest share of equal decisions and largest relative change of the weights. A GPU adds in
# another order than a CPU, so that ties may be decided otherwise; TF32 keeps 10 bits.
_ROUNDED, _COARSE = (0.999, 1e-3), (0.98, 3e-2)
_INTERFACES = ["allow_tf32", "fp32_precision"]
_SMALL_FISHER = FisherConfig(num_gradients=32, gradient_batch_size=2, block_size=24)


@dataclass(frozen=True)
class CheckRow:
    """One case.

    Attributes:
        case: its name.
        verdict: ``"passed"`` or ``"failed"``; ``"measured"`` without a check of results;
            ``"skipped: <reason>"``; ``"running"`` where the command was stopped.
        seconds: of the whole case.
        figures: what was measured, by name.
        error: of a case that raised, in one line.
    """

    case: str
    verdict: str = "running"
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    error: str | None = None

    def __str__(self) -> str:
        figures = [f"{k} {output.format_value(k, v)}" for k, v in self.figures.items()]
        text = self.error or ", ".join(figures)
        return f"{self.case:<28} {self.verdict:<9} {self.seconds:6.1f} s  {text}"


class _SkipError(Exception):
    """A case cannot run here; the reason."""


class _Check:
    """The device, sizes that suit it, and what was found so far."""

    def __init__(self, device: torch.device, quick: bool, path: Path) -> None:
        self.device, self.quick, self._path = device, quick, path
        self.cuda = device.type == "cuda"
        memory = torch.cuda.mem_get_info(device)[1] if self.cuda else 0
        self.large = memory > _LARGE_MEMORY and not quick
        self.pixels = 8 if quick else 32
        # The last two are of torchvision, with images of 224×224.
        self.networks = ["resnet20", "resnet50", "vit_b_16"][: 3 if self.large else 2]
        self.networks = self.networks if self.cuda and not quick else ["resnet20"]
        self.machine = output.describe_machine(device, None, None)
        self.tables: dict[str, list[CheckRow]] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[Figures]:
        """Record what a case measures; ``passed`` is its verdict."""
        start, figures, error = time.perf_counter(), Figures(), None
        rows = next(reversed(self.tables.values()))
        index, late = len(rows), start - self._start > _SECONDS
        rows.append(CheckRow(name, "skipped: no time left" if late else "running"))
        self._write()
        if late:
            raise _SkipError("no time left")
        _set_tf32(False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield figures
            passed = figures.pop("passed", None)
            verdict = {None: "measured", True: "passed", False: "failed"}[passed]
        except _SkipError as reason:
            verdict = f"skipped: {reason}"
        except MissingPackageError as missing:
            verdict = f"skipped: {missing}"
        except Exception as raised:
            place = traceback.extract_tb(raised.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            text = " ".join(str(raised).split())
            # The error of a process ends with what was raised there.
            text = text if len(text) < 500 else f"{text[:250]} … {text[-250:]}"
            verdict, error = "failed", f"{type(raised).__name__}: {text} ({where})"
        gc.collect()
        torch.cuda.empty_cache()
        seconds = time.perf_counter() - start
        rows[index] = CheckRow(name, verdict, seconds, figures, error)
        self._write()
        sys.stderr.write(f"{rows[index]}\n")

    def require_cuda(self) -> None:
        if not self.cuda:
            raise _SkipError("needs CUDA")

    def load(self, name: str = "resnet20") -> tuple[nn.Module, TensorDataset]:
        if name == "resnet20":
            small = networks.make_resnet20(self.device, 2 if self.quick else 16)
            return small, random_images(16 if self.quick else 256, self.pixels)
        model = structures.load_torchvision_network(name).to(self.device)
        return model, random_images(64 if self.large else 16, 224)

    def _write(self) -> None:
        # Atomic: a command that is stopped here leaves the old file or the new one.
        beside = self._path.with_name(f"{self._path.name}.part")
        beside.write_text(output.to_json(self.machine, self.tables))
        beside.replace(self._path)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand.

    Returns:
        The parser.
    """
    parts = ", ".join(f"{number} {name}" for number, name in enumerate(_PARTS, start=1))
    parser = argparse.ArgumentParser(
        prog="lightning-woodfisher gpu-check",
        description="Check in at most about 8 minutes that pruning works on a GPU, and "
        f"measure it: {parts}. The exit status is 1 if a case fails.",
    )
    add = parser.add_argument
    add(
        "--parts",
        type=_read_parts,
        default=[*_PARTS],
        help="parts to run, such as 1,4 (default: all)",
    )
    add(
        "--quick",
        action="store_true",
        help="use tiny sizes, to see that everything runs",
    )
    add("--device", default="cuda", help="torch device (default: cuda)")
    path = "gpu-check.json"
    add(
        "--json",
        metavar="PATH",
        default=path,
        help=f"file for all figures (default: {path})",
    )
    return parser


def _read_parts(text: str) -> list[str]:
    numbered = {str(number): name for number, name in enumerate(_PARTS, start=1)}
    if not set(text.split(",")) <= set(numbered):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of parts, as 1,4")
    return [numbered[number] for number in text.split(",")]


def run_gpu_check(options: argparse.Namespace) -> int:
    """Run the self-check.

    Args:
        options: parsed by :func:`make_parser`.

    Returns:
        Exit status: 1 if a case has failed.
    """
    device = timing.require_device(options.device)
    output.require_folder("--json", options.json)
    # Deterministic products need it, from before the first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    check = _Check(device, options.quick, Path(options.json))
    # Garbage is collected before each measurement; skip what was there before them.
    gc.freeze()
    try:
        for name in options.parts:
            check.tables[name] = []
            # Also catches what fails between the cases.
            with contextlib.suppress(_SkipError), check.case("whole part"):
                _PARTS[name](check)
    finally:
        gc.unfreeze()
        lines = [f"{check.machine.device}, torch {check.machine.torch}"]
        for name, rows in check.tables.items():
            lines += ["", f"[{name}]", *map(str, rows)]
        sys.stdout.write("\n".join(lines) + "\n")
    every = itertools.chain(*check.tables.values())
    return int(any(row.verdict == "failed" for row in every))


def _set_tf32(allowed: bool, interface: str = "allow_tf32") -> None:
    backends: Any = torch.backends
    newer = interface == "fp32_precision"
    # This also resets what the newer interface has set.
    older = allowed and not newer
    torch.set_float32_matmul_precision("high" if older else "highest")
    backends.cudnn.allow_tf32 = older
    if newer and not hasattr(backends, interface):
        raise _SkipError("needs torch 2.9")
    if newer:
        for operation in (backends.cuda.matmul, backends.cudnn.conv):
            operation.fp32_precision = "tf32" if allowed else "ieee"


def _read_tf32(interface: str) -> list[Any]:
    backends: Any = torch.backends
    newer = interface == "fp32_precision"
    owners = backends.cuda.matmul, backends.cudnn.conv if newer else backends.cudnn
    return [getattr(owner, interface) for owner in owners]


def _prune(model: nn.Module, data: TensorDataset, **settings: Any) -> Any:
    settings = {"target_sparsity": 0.5, "fisher": _SMALL_FISHER, **settings}
    return one_shot.prune(model, data, cross_entropy, **settings)


def _prune_small(device: str | torch.device, **settings: Any) -> Tensor:
    """Prune a small network, and return its weights."""
    model = networks.make_resnet20(torch.device(device), 4)
    # Between equal losses a line search would decide by rounding.
    step = StepConfig(line_search=False)
    _prune(model, random_images(64, 8), step=step, **settings)
    weights = prunable_parameters(model).values()
    return torch.cat([w.detach().reshape(-1).cpu() for w in weights])


def _compare(expected: Tensor, found: Tensor, coarse: bool = False) -> Figures:
    equal = float(((expected == 0) == (found == 0)).double().mean())
    error = float((found - expected).norm() / expected.norm())
    share, largest = _COARSE if coarse else _ROUNDED
    passed = equal >= share and error <= largest
    return {"equal_mask": equal, "error": error, "passed": passed}


def _columns(rows: Sequence[Any], *names: str) -> Figures:
    """Name the columns of a table by what was measured."""
    figures = Figures()
    for row in map(output.flatten, rows):
        label = row.get("method") or row.get("engine") or row["network"]
        figures |= {f"{label} {name}": row[name] for name in names}
    return figures


def _correctness(check: _Check) -> None:
    """Compare steps on the device with steps on the CPU."""
    fisher = functools.partial(replace, _SMALL_FISHER)
    cases: dict[str, Figures] = {name: {"criterion": name} for name in CRITERIA}
    cases |= {f"block {b}": {"fisher": fisher(block_size=b)} for b in (24, 96, None)}
    cases["loop"] = {"fisher": fisher(collection="loop")}
    cases["offloaded"] = {"fisher": fisher(block_size=96, offload_rows=True)}
    for pattern in ("2:4", "block4", "rows"):
        # The first convolution has three inputs.
        selection = SelectionConfig(pattern=pattern, exclude=["^conv1"])
        cases[pattern] = {"selection": selection}
    for name, settings in cases.items():
        with check.case(name) as figures:
            expected = _prune_small(timing.CPU, **settings)
            figures.update(_compare(expected, _prune_small(check.device, **settings)))
    expected = _prune_small(timing.CPU)
    for interface, allowed in itertools.product(_INTERFACES, (False, True)):
        with check.case(f"step, {interface} {allowed}") as figures:
            _set_tf32(allowed, interface)
            before = _read_tf32(interface)
            found = _prune_small(check.device)
            figures.update(_compare(expected, found, coarse=allowed))
            figures["restored"] = _read_tf32(interface) == before
            figures["passed"] &= figures["restored"]
        with check.case(f"inverse, {interface} {allowed}") as figures:
            _set_tf32(allowed, interface)
            rows = []
            for block in (16, 64, None):
                case = custom_case(32, block, 640)
                rows += inverse.measure_case(case, repeats=1, device=check.device)
            errors = [row.error for row in rows if row.engine != "recursion"]
            passed = max(errors) <= _LARGEST_INVERSE_ERROR
            figures.update(**_columns(rows, "error"), passed=passed)


def _trainer(check: _Check) -> None:
    """Fit to the end in many ways."""
    for name, options in fits.list_fits(check.device).items():
        with check.case(name) as figures:
            figures.update(fits.run_fit(check.device, **options))


def _collection(check: _Check) -> None:
    """Compare ways to collect gradients, with TF32 and without."""
    for name, allowed in itertools.product(check.networks, (False, True)):
        with check.case(f"{name}, TF32 {allowed}") as figures:
            _set_tf32(allowed)
            model, data = check.load(name)
            few = TensorDataset(*data[:8])
            count = sum(p.numel() for p in prunable_parameters(model).values())
            together, alone = torch.empty(2, len(few), count, device=check.device)
            way = collection.collect_as_in_step(model, few, together)
            collection.collect_by_loop(model, few, alone)
            mismatch = (together - alone).norm(dim=1) / alone.norm(dim=1)
            rows = collection.measure_collection(model, data, repeats=1)
            figures.update(collection=way, mismatch=float(mismatch.max()))
            figures.update(_columns(rows, "seconds"))
            # Some layers of Vision Transformers need the loop.
            figures["passed"] = way == "per-sample" or name.startswith("vit")


def _undisturbed(check: _Check) -> None:
    """Train with a step that removes nothing and without; all bits must be equal."""

    def train(visit: Callable[..., object]) -> list[Tensor]:
        network, data = check.load()
        model = nn.Sequential(network, nn.Dropout(0.3)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        for batch in networks.split_batches(data, len(data) // 4, check.device):
            visit(model, data)
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(model, batch))
            optimizer.step()
        states = [torch.get_rng_state()]
        states += [torch.cuda.get_rng_state(check.device)] if check.cuda else []
        return [tensor.cpu() for tensor in (*model.state_dict().values(), *states)]

    with check.case("deterministic") as figures:
        fisher = replace(_SMALL_FISHER, num_gradients=8)
        step = StepConfig(batchnorm_recalibration_batches=0)
        visit = functools.partial(_prune, target_sparsity=0.0, fisher=fisher, step=step)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            pairs = zip(train(visit), train(lambda *_: None), strict=True)
        finally:
            torch.use_deterministic_algorithms(before)
        changed = sum(not torch.equal(*pair) for pair in pairs)
        figures.update(changed=changed, passed=changed == 0)


def _engines(check: _Check) -> None:
    """Measure the engines against the recursion and the GEMM floor."""
    size = 128 if check.quick else None
    measure_rate = functools.partial(inverse.measure_gemm_rate, check.device, size)
    with check.case("GEMM") as figures:
        single, double = measure_rate() / 1e9, measure_rate(dtype=torch.float64) / 1e9
        figures.update({"float32 GFLOP/s": single, "float64 GFLOP/s": double})
    small = [custom_case(64, 32, 2000), custom_case(32, None, 2000)]
    cases = preset_cases("headline") + preset_cases("resnet50")
    for case in small if check.quick else cases:
        with check.case(f"{case.name}, N={case.num_gradients}") as figures:
            case = slice_case(case, command.choose_max_weights(check.device, case))
            measure = functools.partial(
                inverse.measure_case, case, repeats=1, device=check.device
            )
            measure()
            rate = measure_rate()
            rows = [inverse.add_floor(row, rate) for row in measure()]
            columns = "seconds", "peak_bytes", "error", "ratio", "floor_share"
            figures.update(weights=case.weights, **_columns(rows, *columns))
            single = measure(precision="float32")[-1].timing.seconds
            figures["float64 share"] = 1.0 - single / rows[-1].timing.seconds
            figures["passed"] = rows[-1].error <= _LARGEST_INVERSE_ERROR


def _make_step(check: _Check, **changes: Any) -> Any:
    """Return a pruning step of ResNet-20, its settings and its samples."""
    few = {"num_gradients": 8, "gradient_batch_size": 2} if check.quick else {}
    fisher = FisherConfig(**{**few, **changes})
    samples = fisher.num_gradients * fisher.gradient_batch_size
    data = random_images(samples, check.pixels)
    return lambda: _prune(check.load()[0], data, fisher=fisher), fisher, data


def _memory(check: _Check) -> None:
    """Compare the peak of memory with the estimate."""
    full: Figures = {"block_size": None}
    offloaded = {**full, "offload_rows": True}
    cases = {"defaults": {}, "full": full, "full, offloaded": offloaded}
    for name, changes in cases.items():
        with check.case(name) as figures:
            step, fisher, _ = _make_step(check, **changes)
            spent = timing.measure_alternately({"": step}, 2, check.device, warm_up=1)
            peak = spent[""].peak_bytes or 0
            estimated = estimate(check.load()[0], fisher=fisher).peak_bytes
            figures.update(seconds=spent[""].seconds, peak_bytes=peak)
            figures.update(estimated_bytes=estimated, ratio=peak / estimated)


def _whole_step(check: _Check) -> None:
    """Measure a step against the passes over its samples."""
    step, _, data = _make_step(check)
    model = check.load()[0]
    weights = list(prunable_parameters(model).values())
    with check.case("step") as figures:
        actions: dict[str, Callable[[], object]] = {
            "passes": lambda: collection.run_batches(model, data, 128, weights),
            "step": step,
        }
        spent = timing.measure_alternately(actions, 3, check.device, warm_up=1)
        figures.update({name: each.seconds for name, each in spent.items()})
        figures["ratio"] = spent["step"].seconds / spent["passes"].seconds
        figures.update(step().seconds)
    with check.case("synchronizations") as figures:
        check.require_cuda()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [each for each in seen if "called a synchronizing" in str(each.message)]
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)
        figures.update(count=len(found), most=places.most_common(8))


def _masks(check: _Check) -> None:
    """Measure masks in training, and products with 2:4 weights."""
    with check.case("training") as figures:
        width, steps = (32, 2) if check.quick else (256, 40)
        images = torch.randn(32, 3, check.pixels, check.pixels)
        transformer = networks.Transformer(width), torch.randn(32, 64, width)
        trained: dict[str, tuple[nn.Module, Tensor]] = {
            "resnet20": (check.load()[0].train(), images),
            "transformer": transformer,
        }
        rows = masks.measure_masks(trained, steps, device=check.device)
        figures.update(_columns(rows, "plain_seconds", "ratio"))
    with check.case("2:4") as figures:
        check.require_cuda()
        width = 128 if check.quick else 4096
        dense = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        selection, step = SelectionConfig(pattern="2:4"), StepConfig(measure_loss=False)
        options = {"criterion": "magnitude", "selection": selection, "step": step}
        _prune(dense.to(check.device), random_images(1, 1), **options)
        sparse = copy.deepcopy(dense.half())
        semi_structured.to_semi_structured(sparse)
        inputs = torch.randn(width, width, device=check.device).half()
        with torch.no_grad():
            expected, found = dense(inputs).float(), sparse(inputs).float()
        error = float((found - expected).norm() / expected.norm())
        speed = semi_structured.compare_speed(dense, sparse, [inputs])
        figures.update(speedup=speed.speedup, error=error, passed=error < 1e-2)


def _ranks(check: _Check) -> None:
    """Compare steps on several ranks with one without a process group."""
    expected, work = _prune_small(check.device), _prune_on_rank
    for count, backend in ((1, "nccl"), (2, "gloo")):
        with check.case(f"{count} over {backend}") as figures:
            if backend == "nccl":
                check.require_cuda()
            device = str(check.device)
            found = scaling.run_on_ranks(count, work, device, backend=backend)
            figures.update(_compare(expected, found))


def _prune_on_rank(device: str) -> Tensor:
    _set_tf32(False)
    return _prune_small(device)


def _structures(check: _Check) -> None:
    """Compare the removed channels with those on the CPU, and measure scores."""
    data = random_images(16, 8)

    def choose(device: torch.device, method: Any) -> set[Any]:
        model, inputs = networks.make_resnet20(device, 4), data[:1][0].to(device)
        config = StructureConfig(method, num_samples=16, labels="true", probes=4)
        options = {"target": 0.3, "config": config, "example_inputs": inputs}
        report, _ = prune_structures(model, data, cross_entropy, **options)
        return {(name, i) for name, removed in report.removed.items() for i in removed}

    for method in ("sosp_i", "sosp_h", "hap"):
        with check.case(method) as figures:
            expected, found = choose(timing.CPU, method), choose(check.device, method)
            equal = len(expected & found) / len(expected | found)
            # The probes of HAP are random numbers of the device.
            figures.update(equal=equal, passed=method == "hap" or equal >= 0.9)
    name = check.networks[:2][-1]
    with check.case(f"scores of {name}") as figures:
        model, images = check.load(name)
        few, hap = TensorDataset(*images[:16]), StructureConfig(method="hap", probes=8)
        methods = {**structures.METHODS, "HAP, 8 probes": hap}
        rows = structures.measure_structures(model, few, repeats=1, methods=methods)
        figures.update(_columns(rows, "seconds", "ratio", "peak_bytes"))


_PARTS: dict[str, Callable[[_Check], None]] = {
    "correctness": _correctness,
    "Trainer": _trainer,
    "collection": _collection,
    "undisturbed training": _undisturbed,
    "engines": _engines,
    "memory": _memory,
    "whole step": _whole_step,
    "masks": _masks,
    "ranks": _ranks,
    "SOSP and HAP": _structures,
}
