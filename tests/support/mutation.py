"""Break lines of the core one at a time and check that the tests fail.

Run it with ``make mutants``, or with ``python tests/support/mutation.py [word ...]`` to try
only the mutants whose file or line contains one of the words. All changes are made in a
temporary copy of the repository. The exit status is 0 if every mutant is killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lightning_woodfisher"
_SECONDS = 400


@dataclass(frozen=True)
class Mutant:
    """A line of the package and a wrong version of it.

    Attributes:
        file: path in the package.
        old: text that occurs exactly once in the file.
        new: text that replaces it.
        tests: smallest set of files in ``tests`` in which a test must fail. The tests must
            not be marked ``slow``.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "criteria/obs.py",
        "return weights.square() / (2.0 * inverse_diagonal)",
        "return weights.square() / inverse_diagonal",
        ("criteria/test_obs.py",),
    ),
    Mutant(
        "criteria/obs.py",
        "-inverse_fisher.matvec(scaled))",
        "inverse_fisher.matvec(scaled))",
        ("criteria/test_obs.py",),
    ),
    Mutant(
        "fisher/linalg.py",
        "product[:, :low, low:high] = product[:, low:high, :low].mT",
        "product[:, :low, low:high] = 0.0",
        ("fisher/test_inverse.py",),
    ),
    Mutant(
        "fisher/linalg.py",
        "return largest_sum * (math.sqrt(size) / (num_gradients * damping))",
        "return largest_sum / (size * num_gradients * damping)",
        ("fisher/test_inverse.py",),
    ),
    Mutant(
        "fisher/base.py",
        "self._dampings[index].mul_(torch.where(singular, 10.0, 1.0))",
        "self._dampings[index].mul_(10.0)",
        ("pruning/test_numerics.py",),
    ),
    Mutant(
        "fisher/base.py",
        "self.num_gradients = self._observed",
        "pass",
        ("pruning/test_numerics.py",),
    ),
    Mutant(
        "fisher/primal.py",
        "bad | ~(share > _SMALLEST_PIVOT)",
        "bad | ~(share > 0.0)",
        ("fisher/test_inverse.py", "pruning/test_numerics.py"),
    ),
    Mutant(
        "fisher/dual.py",
        "ridge = (self.num_gradients * damping).unsqueeze(-1)",
        "ridge = damping.unsqueeze(-1)",
        ("criteria/test_obs.py",),
    ),
    Mutant(
        "fisher/full.py",
        "kept = ~removed if self._kept is None else ~removed & self._kept",
        "kept = removed if self._kept is None else ~removed & self._kept",
        ("criteria/test_obs.py",),
    ),
    Mutant(
        "distributed/smallest.py",
        "marked = keys < threshold",
        "marked = keys <= threshold",
        ("distributed/test_smallest.py",),
    ),
    Mutant(
        "distributed/smallest.py",
        "room = (left - before).unbind()",
        "room = left.unbind()",
        ("integration/test_ranks.py",),
    ),
    Mutant(
        "weights/masks.py",
        "kept[name] = left & kept[name] if",
        "kept[name] = left | kept[name] if",
        ("weights/test_masks.py",),
    ),
    Mutant(
        "weights/masks.py",
        "torch._foreach_mul_(bits, [",
        "torch._foreach_mul_([values for values, _ in pairs], [",
        ("weights/test_masks.py",),
    ),
    Mutant(
        "pruning/schedule.py",
        "* (1 - (position - start + self.every) / span) ** self.degree,",
        "* (1 - (position - start) / span) ** self.degree,",
        ("pruning/test_schedule.py",),
    ),
    Mutant(
        "weights/partition.py",
        "index = bisect.bisect_left(ends, wanted)",
        "index = 0",
        ("weights/test_partition.py",),
    ),
    Mutant(
        "gradients/row_computer.py",
        "target.div_(scale)",
        "pass",
        ("gradients/test_collect.py",),
    ),
    Mutant(
        "gradients/lockstep.py",
        "self._require_same(self._calls[place].inputs[self._loss], inputs)",
        "pass",
        ("gradients/test_lockstep.py",),
    ),
    Mutant(
        "gradients/collect.py",
        "return rows if kept is None else rows[kept]",
        "return rows",
        ("pruning/test_numerics.py",),
    ),
    Mutant(
        "data/losses.py",
        "scale = max(scale / _LOSS_SCALE_STEP, _SMALLEST_LOSS_SCALE)",
        "return None",
        ("gradients/test_collect.py",),
    ),
    Mutant(
        "callbacks/mask_guard.py",
        "lambda *_: self._get_masks().apply()",
        "lambda *_: None",
        ("integration/test_masks_in_fit.py",),
    ),
    Mutant(
        "criteria/woodtaylor.py",
        "newton = -self.descent()",
        "newton = self.descent()",
        ("criteria/test_woodtaylor.py",),
    ),
    Mutant(
        "criteria/diagonal_fisher.py",
        "return self._total / max(1, self._rows) + self.fisher.damping",
        "return self._total + self.fisher.damping",
        ("criteria/test_criteria.py",),
    ),
    Mutant(
        "distributed/exact_sum.py",
        "integers = scaled.round_().to(torch.int64)",
        "integers = (scaled / 2**30).round_().mul_(2**30).to(torch.int64)",
        (
            "fisher/test_inverse.py",
            "pruning/test_pruner.py",
            "integration/test_ranks.py",
        ),
    ),
    Mutant(
        "gradients/nonfinite.py",
        "self.indices.extend(first + place for place in skipped)",
        "self.indices.extend(skipped)",
        ("pruning/test_numerics.py",),
    ),
    Mutant(
        "pruning/quotas.py",
        "missing -= max(wanted, layers.zeros[layer])",
        "missing -= wanted",
        ("pruning/test_quotas.py",),
    ),
    Mutant(
        "pruning/flops.py",
        "flops * gone / weights",
        "flops * gone / (gone + weights)",
        ("pruning/test_flops.py",),
    ),
)


def copy_repository(target: Path) -> None:
    """Copy the files that the tests need; the originals are never changed."""
    for name in (
        "pyproject.toml",
        "README.md",
        "Makefile",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    ):
        shutil.copy(ROOT / name, target)
    ignored = shutil.ignore_patterns("__pycache__", ".*", "runs", "_build")
    for name in (PACKAGE, "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run test files in a copy and return pytest's status and its last line."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header"]
    command += ["-p", "no:cacheprovider", "--durations=0", "--tb=line"]
    command += [f"tests/{name}" for name in tests]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"not done after {_SECONDS} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode, (lines or done.stdout.splitlines()[-1:] or [""])[0]


def attempt(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """Break one line, run its tests and restore it; return the verdict and a line."""
    path = folder / PACKAGE / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return "STALE", f"the old text occurs {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        status, line = run_tests(folder, mutant.tests)
    finally:
        path.write_text(text)
    # 0: all passed. 1: some failed. Anything else is no verdict.
    kind = {0: "SURVIVED", 1: "killed"}.get(status, f"ERROR {status}")
    return kind, line


def main(words: list[str]) -> int:
    """Try all mutants, or those whose file or line contains one of the words."""
    chosen = [
        mutant
        for mutant in MUTANTS
        if not words or any(word in mutant.file + mutant.old for word in words)
    ]
    killed = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name).resolve()
        copy_repository(folder)
        where = subprocess.run(
            [sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if not Path(where).resolve().is_relative_to(folder):
            print(f"the copy is not what is imported, but {where}")
            return 1
        for mutant in chosen:
            begun = time.perf_counter()
            kind, line = attempt(mutant, folder)
            killed += kind == "killed"
            seconds = time.perf_counter() - begun
            print(f"{kind:9} {seconds:5.0f} s  {mutant.file}: {mutant.old}", flush=True)
            print(f"{'':19}{line[:150]}", flush=True)
    print(f"killed {killed} of {len(chosen)}")
    return 0 if chosen and killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
