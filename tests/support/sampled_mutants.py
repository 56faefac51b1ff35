"""Break sampled places of the core and check that the tests of the same folder fail.

Run it with ``make mutants-sampled``. cosmic-ray makes the mutants: other operators, numbers
one more or less, loops that do nothing. A line is drawn first, then one of its mutants, so
that a long expression counts no more than a short one. The draw depends on the text of
lines, not on their numbers: a commit changes only the mutants of the lines that it changes.

The tests that run a line are tried, the quickest first; ``ALSO`` adds those that mirror a
file from another folder. Never drawn are places where a mutant cannot be wrong:

- annotations, which are never evaluated;
- stars between parameters, which cosmic-ray takes for products, and what is no Python;
- ``is`` in place of ``==`` and the reverse, which compare constants alike;
- ``strict=`` of ``zip``, which only guards against errors of the code itself;
- whole numbers of constants of a module: sizes of pieces and limits, chosen by measuring.

Survivors that behave like the original are in ``equal_mutants.py`` with the reason.

All changes are made in a temporary copy of the repository. Results are appended to
``--results``, and what is there is not tried again. The exit status is 0 if enough of the
mutants that are not equal are killed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cosmic_ray.plugins
import coverage
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from equal_mutants import EQUAL
from mutation import PACKAGE, copy_repository

FOLDERS = (
    "criteria", "distributed", "fisher", "gradients", "pruning", "structured", "weights",
)  # fmt: skip
# Tests that mirror a folder or file of the package, but lie elsewhere: collectives and shards
# need ranks, and curvatures and patterns are compared with dense matrices through the
# criteria that use them.
ALSO = {
    "criteria/woodfisher.py": ("weights/test_patterns.py",),
    "distributed": (
        "integration/test_ranks.py",
        "integration/test_quantiles_over_ranks.py",
        "integration/test_fsdp2.py",
    ),
    "gradients/hessian_rows.py": ("criteria",),
    "gradients/kronecker_factors.py": ("criteria",),
    "gradients/sharded.py": ("integration/test_fsdp2.py",),
    "weights/active.py": ("integration/test_ranks.py",),
}

_SAME = ("Eq_Is", "Eq_IsNot", "NotEq_Is", "NotEq_IsNot", "Is_Eq", "IsNot_NotEq")
_OPTIONS = (
    "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "--durations=0",
    "-p", "no:unraisableexception",  # It collects garbage for a second.
    # Modules that this process has imported already.
    "-W", "ignore::pytest.PytestAssertRewriteWarning",
)  # fmt: skip

Position = tuple[int, int]  # line, column


@dataclass(frozen=True)
class Place:
    """One change of one file: what cosmic-ray needs to make it.

    Attributes:
        file: path in the package.
        text: the line that is changed, and which of the equal lines of the file it is.
        operator: name of the operator of cosmic-ray.
        occurrence: number of the place among all of the file where the operator applies.
        where: column where the place begins, and number of the change at this place.
        lines: lines whose tests are tried; None if it is run by an import.
    """

    file: str
    text: tuple[str, int]
    operator: str
    occurrence: int
    where: tuple[int, int]
    lines: range | None

    def key(self) -> str:
        """Return the name in the file of results."""
        (text, number), (column, variant) = self.text, self.where
        return f"{self.file}: {text} [{number}] {self.operator} {column}.{variant}"


def lines_to_test(tree: ast.Module) -> dict[int, range | None]:
    """Return, for each line with code, the lines whose tests are tried."""
    found: dict[int, range | None] = {}

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.stmt | ast.excepthandler):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            head = range(node.lineno, max(last, node.lineno) + 1)
            is_function = isinstance(node, ast.FunctionDef)
            tested: range | None = head if in_function else None
            if body and is_function:
                # Its defaults count when it is called.
                tested = range(body[0].lineno, (node.end_lineno or 0) + 1)
            found.update(dict.fromkeys(head, tested))
            in_function |= is_function
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(tree, False)
    return found


def left_out(tree: ast.Module) -> Iterator[tuple[Position, Position]]:
    """Yield where annotations, ``strict=`` and whole constants begin and end."""
    parts: list[ast.AST] = []
    for node in ast.walk(tree):
        parts += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.keyword) and node.arg == "strict":
            parts.append(node.value)
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
            inner = list(ast.walk(statement.value))
            if all(
                isinstance(part.value, int)
                for part in inner
                if isinstance(part, ast.Constant)
            ) and not any(isinstance(part, ast.Name | ast.Call) for part in inner):
                parts.append(statement.value)
    for part in parts:
        if isinstance(part, ast.expr | ast.keyword):
            end = (part.end_lineno or 0, part.end_col_offset or 0)
            yield (part.lineno, part.col_offset), end


def places_of(path: Path, root: Path) -> Iterator[Place]:
    """Yield the mutants of a file that may be drawn."""
    code = path.read_text()
    tree = ast.parse(code)
    parsed, tested, spans = get_ast(code), lines_to_test(tree), list(left_out(tree))
    file = str(path.relative_to(root / PACKAGE))
    seen: Counter[str] = Counter()
    texts = {}
    for number, line in enumerate(code.splitlines(), 1):
        texts[number] = (line.strip(), seen[line.strip()])
        seen[line.strip()] += 1
    for name in sorted(cosmic_ray.plugins.operator_names()):
        operator_class = cosmic_ray.plugins.get_operator(name)
        if operator_class.arguments() or name.endswith(_SAME):
            continue
        operator = operator_class()
        positions = (
            position
            for node in ast_nodes(parsed)
            for position in operator.mutation_positions(node)
        )
        changes: Counter[Position] = Counter()
        for occurrence, (begin, end) in enumerate(positions):
            line, column = begin
            where = (column, changes[begin])
            changes[begin] += 1
            if line in tested and not any(a <= begin and end <= b for a, b in spans):
                yield Place(file, texts[line], name, occurrence, where, tested[line])


def change(place: Place, root: Path) -> tuple[str, str, str] | None:
    """Return the mutated file, what its lines were and are; None if it is no Python."""
    code = (root / PACKAGE / place.file).read_text()
    operator = cosmic_ray.plugins.get_operator(place.operator)()
    mutated = mutate_code(code, operator, place.occurrence)
    try:
        compile(mutated, place.file, "exec")
    except SyntaxError:
        return None
    if ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(code)):
        return None
    parts: dict[str, list[str]] = {"-": [], "+": []}
    both = code.splitlines(), mutated.splitlines()
    for line in list(difflib.unified_diff(*both, n=0, lineterm=""))[2:]:
        if line[0] in parts:
            parts[line[0]].append(" ".join(line[1:].split()))
    old, new = ("\n".join(parts[sign]) for sign in "-+")
    return None if {old, new} == {"*,", "/,"} else (mutated, old, new)


def sample(root: Path, count: int, seed: int) -> list[Place]:
    """Draw mutants, one per line and as many of each folder as it has lines."""

    def order(*what: object) -> str:
        return hashlib.sha256(repr((seed, *what)).encode()).hexdigest()

    by_line: dict[str, list[Place]] = defaultdict(list)
    for folder in FOLDERS:
        for path in sorted((root / PACKAGE / folder).rglob("*.py")):
            for place in places_of(path, root):
                by_line[order(place.file, place.text)].append(place)
    drawn: list[Place] = []
    for line in sorted(by_line):
        places = sorted(by_line[line], key=lambda place: order(place.key()))
        valid = (place for place in places if change(place, root))
        drawn += itertools.islice(valid, 1)
        if len(drawn) == count:
            break
    return drawn


def in_a_child(work: Callable[[], int], seconds: float, output: Path) -> int | None:
    """Run a function in a fork of this process.

    Args:
        work: what to run; it returns the exit status.
        seconds: time limit.
        output: file for everything that is printed.

    Returns:
        The exit status, or None after the time limit.
    """
    child = os.fork()
    if not child:
        os.setsid()
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 70
        try:
            status = int(work())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline, status = time.monotonic() + seconds, None
    try:
        while status is None and time.monotonic() < deadline:
            done, ended = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(ended) if done else None
            time.sleep(0.02)
    finally:
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return status


class _Recorder:
    """Plugin of pytest that tells coverage which test runs, and notes its time."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self._measured = measured
        self.seconds: dict[str, float] = defaultdict(float)
        self.with_ranks: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if "ranks" in getattr(item, "fixturenames", ()):
                self.with_ranks.append(item.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._measured.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration


class _Chosen:
    """Plugin of pytest that leaves only some tests, in their order."""

    def __init__(self, tests: Collection[str]) -> None:
        self._order = {test: number for number, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._order]
        items.sort(key=lambda item: self._order[item.nodeid])


def _record(tests: str, data: Path) -> int:
    """Run tests and write which of them runs which line."""
    sys.dont_write_bytecode = False
    measured = coverage.Coverage(
        data_file=str(data), source_pkgs=[PACKAGE], config_file=False
    )
    recorder = _Recorder(measured)
    measured.start()
    status = pytest.main([*_OPTIONS, f"tests/{tests}"], plugins=[recorder])
    measured.stop()
    measured.save()
    noted = {
        "seconds": recorder.seconds,
        "with_ranks": recorder.with_ranks,
        "modules": [
            name
            for name, module in sys.modules.items()
            if "site-packages" in str(getattr(module, "__file__", ""))
        ],
    }
    data.with_suffix(".json").write_text(json.dumps(noted))
    return status


class Selection:
    """Which tests of a folder or file run a line, and how long they take."""

    def __init__(self, tests: str, root: Path) -> None:
        """Run the tests once, without a mutant."""
        data, output = root / f"{tests.replace('/', '-')}.coverage", root / "output.txt"
        if in_a_child(lambda: _record(tests, data), 3600, output):
            raise RuntimeError(output.read_text()[-3000:])
        self._root = root
        self._data = coverage.CoverageData(str(data))
        self._data.read()
        noted = json.loads(data.with_suffix(".json").read_text())
        self.seconds: dict[str, float] = noted["seconds"]
        self._with_ranks: list[str] = noted["with_ranks"]
        for name in noted["modules"]:
            # Every child would import them again.
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def tests(self, place: Place) -> set[str]:
        """Return the tests to try for a mutant.

        What other processes run is not recorded: tests on several ranks are always tried.
        """
        if place.lines is None:
            return set(self.seconds)
        contexts = self._data.contexts_by_lineno(str(self._root / PACKAGE / place.file))
        found = {test for line in place.lines for test in contexts.get(line, ())}
        return {*found, *self._with_ranks} & set(self.seconds)


class Trials:
    """The results so far, and the tests of each folder.

    Args:
        root: copy of the repository.
        results: file that every result is appended to.
        retry: whether to try again what survived.
    """

    def __init__(self, root: Path, results: Path, *, retry: bool) -> None:
        self._root, self._path = root, results
        self._selections: dict[str, Selection] = {}
        self._known: dict[str, dict[str, Any]] = {}
        if results.exists():
            for row in map(json.loads, results.read_text().splitlines()):
                self._known[row["key"]] = row
        if retry:
            killed = [row for row in self._known.values() if row["outcome"] == "killed"]
            self._known = {row["key"]: row for row in killed}

    def result(self, place: Place) -> dict[str, Any]:
        """Return what is known of a mutant; try it if nothing is."""
        if place.key() not in self._known:
            row = self._try(place)
            self._known[place.key()] = row
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['outcome']:9} {row['seconds']:6} s  {row['key']}", flush=True)
        return self._known[place.key()]

    def _try(self, place: Place) -> dict[str, Any]:
        """Make one change, run the tests, and undo it."""
        changed = change(place, self._root)
        assert changed is not None
        mutated, old, new = changed
        seconds: dict[str, float] = {}
        folder = place.file.partition("/")[0]
        for source in (folder, *ALSO.get(folder, ()), *ALSO.get(place.file, ())):
            if source not in self._selections:
                self._selections[source] = Selection(source, self._root)
            selection = self._selections[source]
            chosen = selection.tests(place)
            seconds |= {test: selection.seconds[test] for test in chosen}
        tests = sorted(seconds, key=lambda test: (seconds[test], test))
        files = sorted({test.partition("::")[0] for test in tests})

        def run() -> int:
            # A compiled file would be used again if time and size were the same.
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            return pytest.main([*_OPTIONS, "-x", *files], plugins=[_Chosen(tests)])

        path = self._root / PACKAGE / place.file
        code, stat = path.read_text(), path.stat()
        begun = time.perf_counter()
        path.write_text(mutated)
        try:
            limit = 60 + 5 * sum(seconds.values())
            output = self._root / "output.txt"
            status = in_a_child(run, limit, output) if tests else 0
        finally:
            path.write_text(code)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        # 4, 5 and 70: no test was run, which is no verdict. None: it ran for too long.
        outcomes = {0: "survived", 4: "error", 5: "error", 70: "error"}
        return {
            "key": place.key(),
            "outcome": "killed" if status is None else outcomes.get(status, "killed"),
            "tests": len(tests),
            "seconds": round(time.perf_counter() - begun, 1),
            "file": place.file,
            "old": old,
            "new": new,
        }


def report(rows: list[dict[str, Any]]) -> float:
    """Print survivors and a table; return the share of mutants that were killed.

    Equal mutants are left out of the share.
    """
    reasons = {(e.file, e.old, e.new): e.reason for e in EQUAL}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        change, outcome = (row["file"], row["old"], row["new"]), row["outcome"]
        if change in reasons:
            outcome = "WRONG" if outcome == "killed" else "equal"
        for name in (row["file"].partition("/")[0], "all"):
            counts[name][outcome] += 1
        if outcome != "killed":
            print(f"{outcome}: {row['file']}", row["old"], row["new"], sep="\n    ")
            if change in reasons:
                print(f"  {reasons[change]}")
    columns = (
        "killed",
        "equal",
        "survived",
        *sorted(counts["all"].keys() & {"error", "WRONG"}),
    )
    print(
        f"| folder | sampled | {' | '.join(columns)} |",
        "|---" * (2 + len(columns)) + "|",
        sep="\n",
    )
    for name in sorted(counts, key=lambda name: (name == "all", name)):
        numbers = [counts[name][column] for column in columns]
        print(f"| {name} | {' | '.join(map(str, [sum(numbers), *numbers]))} |")
    total = counts["all"]
    share = total["killed"] / max(1, total.total() - total["equal"])
    print(f"killed: {share:.1%} of those that are not equal")
    return share


def main() -> int:
    """Try the sampled mutants and print what survived."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0, help="draws other mutants")
    parser.add_argument("--results", type=Path, default=Path("runs/mutants.jsonl"))
    parser.add_argument("--retry", action="store_true", help="try survivors again")
    parser.add_argument("--least", type=float, default=0.9, help="share to be killed")
    arguments = parser.parse_args()
    results = arguments.results.resolve()
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        root = Path(name).resolve()
        copy_repository(root)
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)
        sys.path.insert(0, str(root))
        trials = Trials(root, results, retry=arguments.retry)
        places = sample(root, arguments.count, arguments.seed)
        rows = [trials.result(place) for place in places]
    return int(report(rows) < arguments.least)


if __name__ == "__main__":
    sys.exit(main())
