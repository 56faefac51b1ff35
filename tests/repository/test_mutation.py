"""The table of mutants stays true, and the script tells a survivor from a kill."""

from __future__ import annotations

from pathlib import Path

import mutation
import pytest
from mutation import MUTANTS, PACKAGE, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.old[:30]}")
def test_the_line_is_still_there_once_and_so_are_its_tests(mutant: Mutant) -> None:
    assert (ROOT / PACKAGE / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert all((ROOT / "tests" / name).is_file() for name in mutant.tests)


def test_there_are_25_or_more_in_all_parts_of_the_core() -> None:
    assert len(set(MUTANTS)) == len(MUTANTS) >= 25
    files = {mutant.file.partition("/")[0] for mutant in MUTANTS}
    assert files >= {
        "callbacks", "criteria", "data", "distributed", "fisher", "gradients", "pruning",
        "weights",
    }  # fmt: skip


def test_a_line_is_broken_while_its_tests_run_and_mended_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / PACKAGE / "answer.py"
    path.parent.mkdir()
    path.write_text("answer = 42  # sure\n")
    seen = []

    def look(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
        """A run of tests that fails unless the answer is 42."""
        seen.append(((folder / PACKAGE / "answer.py").read_text(), tests))
        space: dict[str, int] = {}
        try:
            exec(seen[-1][0], space)
        except SyntaxError:
            return 2, ""
        return int(space["answer"] != 42), ""

    monkeypatch.setattr(mutation, "run_tests", look)

    def outcome(old: str, new: str) -> str:
        mutant = Mutant("answer.py", old, new, ("test_answer.py",))
        return mutation.attempt(mutant, tmp_path)[0]

    assert outcome("42", "41") == "killed"
    assert outcome("sure", "quite sure") == "SURVIVED"
    assert outcome("42", "(") == "ERROR 2"
    assert outcome("absent", "there") == "STALE"
    assert seen[0] == ("answer = 41  # sure\n", ("test_answer.py",))
    assert len(seen) == 3
    assert path.read_text() == "answer = 42  # sure\n"
