"""The self-check for GPUs, run on the CPU: verdicts, exit status, and the file it writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.benchmark import gpu_check
from lightning_woodfisher.cli.main import main

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _unchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Undo what the command sets for its process, and keep its file out of the way."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.chdir(tmp_path)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield None
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def run(*arguments: str) -> int:
    return main(["gpu-check", "--device", "cpu", "--quick", *arguments])


def read(path: str = "gpu-check.json") -> dict[str, list[Row]]:
    tables: dict[str, list[Row]] = json.loads(Path(path).read_text())["tables"]
    return tables


def replace(monkeypatch: pytest.MonkeyPatch, **parts: Callable[[Any], object]) -> None:
    """Let the command have no other parts than these."""
    monkeypatch.setattr(gpu_check, "_PARTS", parts)


def good(check: Any) -> None:
    with check.case("good") as figures:
        figures.update(share=0.5, passed=True)
    with check.case("measurement") as figures:
        figures.update(seconds=2.0)


def wrong(check: Any) -> None:
    with check.case("wrong") as figures:
        figures.update(share=0.25, passed=False)


def broken(check: Any) -> None:
    with check.case("first") as figures:
        figures.update(seconds=1.0)
        raise ValueError("two\nlines")
    with check.case("second") as figures:
        figures.update(passed=True)
    raise KeyError("between cases")


def verdicts(rows: list[Row]) -> dict[str, str]:
    return {row["case"]: row["verdict"] for row in rows}


class TestCommand:
    def test_figures_and_verdicts_are_written_and_printed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        replace(monkeypatch, good=good)
        assert run("--json", "other.json") == 0
        _, checked, measured = read("other.json")["good"]
        assert (checked["verdict"], checked["figures"]) == ("passed", {"share": 0.5})
        assert (measured["verdict"], measured["error"]) == ("measured", None)
        shown = capsys.readouterr().out
        assert "[good]" in shown
        assert "passed" in shown
        assert "share 0.5" in shown
        assert not Path("gpu-check.json").exists()

    def test_a_wrong_result_fails_and_the_next_part_runs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace(monkeypatch, wrong=wrong, good=good)
        assert run() == 1
        assert verdicts(read()["wrong"])["wrong"] == "failed"
        assert read()["wrong"][1]["figures"] == {"share": 0.25}
        assert verdicts(read()["good"])["good"] == "passed"

    def test_an_error_is_recorded_in_one_line_and_the_others_go_on(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        replace(monkeypatch, broken=broken, good=good)
        assert run() == 1
        whole, first, second = read()["broken"]
        assert first["error"].startswith("ValueError: two lines (test_gpu_check.py:")
        assert first["figures"] == {"seconds": 1.0}
        assert second["verdict"] == "passed"
        assert whole["error"].startswith("KeyError: 'between cases' (test_gpu_check")
        assert verdicts(read()["good"])["good"] == "passed"
        assert "ValueError: two lines" in capsys.readouterr().out

    def test_a_package_that_is_not_installed_is_no_failure(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def channels(check: Any) -> None:
            monkeypatch.setitem(sys.modules, "torch_pruning", None)
            with check.case("scores"):
                import_optional("torch_pruning", "tracing channels")

        replace(monkeypatch, channels=channels)
        assert run() == 0
        verdict = verdicts(read()["channels"])["scores"]
        assert verdict.startswith("skipped: tracing channels needs torch_pruning")

    def test_an_interruption_keeps_what_was_found(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        seen: list[dict[str, list[Row]]] = []

        def stopped(check: Any) -> None:
            with check.case("stopped"):
                seen.append(read())
                raise KeyboardInterrupt

        replace(monkeypatch, good=good, stopped=stopped, wrong=wrong)
        with pytest.raises(KeyboardInterrupt):
            run()
        # What was on the disk in the middle of the case is all there is afterwards.
        assert read() == seen[0]
        assert verdicts(read()["good"])["good"] == "passed"
        assert verdicts(read()["stopped"])["stopped"] == "running"
        assert "wrong" not in read()
        assert not list(Path.cwd().glob("*.part"))
        assert "share 0.5" in capsys.readouterr().out

    def test_no_case_starts_after_the_time_is_over(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def slow(check: Any) -> None:
            monkeypatch.setattr(gpu_check, "_SECONDS", -1.0)
            good(check)

        replace(monkeypatch, slow=slow, wrong=wrong)
        assert run() == 0
        late = "skipped: no time left"
        assert verdicts(read()["slow"]) == {"whole part": late, "good": late}
        assert verdicts(read()["wrong"]) == {"whole part": late}

    def test_parts_are_chosen_by_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replace(monkeypatch, good=good, wrong=wrong, broken=broken)
        assert run("--parts", "1") == 0
        assert run("--parts", "3,1") == 1
        assert list(read()) == ["broken", "good"]

    @pytest.mark.parametrize("parts", ["0", "11", "1;2", "one", ""])
    def test_unknown_parts_are_refused(
        self, parts: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            run("--parts", parts)
        assert "numbers of parts" in capsys.readouterr().err

    def test_a_missing_device_or_folder_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["gpu-check"]) == 2
        assert "no CUDA device" in capsys.readouterr().err
        assert run("--json", "no/such/file.json") == 2
        assert "no such folder" in capsys.readouterr().err


class TestComparison:
    def test_equal_weights_pass_and_other_masks_or_weights_fail(self) -> None:
        weights = torch.ones(2000)
        weights[:1000] = 0.0
        assert gpu_check._compare(weights, weights)["passed"]
        one = weights.clone()
        one[0] = 1e-6
        assert gpu_check._compare(weights, one)["passed"]
        ten = weights.clone()
        ten[:10] = 1e-6
        assert not gpu_check._compare(weights, ten)["passed"]
        assert not gpu_check._compare(weights, weights * 1.01)["passed"]
        assert gpu_check._compare(weights, weights * 1.01, coarse=True)["passed"]

    def test_a_step_that_disturbs_training_is_noticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_check, "_prune", lambda *_, **__: torch.rand(1))
        assert run("--parts", "4") == 1
        assert verdicts(read()["undisturbed training"])["deterministic"] == "failed"

    def test_a_setting_of_tf32_that_is_lost_is_noticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lose(*_: object, **__: object) -> torch.Tensor:
            torch.set_float32_matmul_precision("highest")
            return torch.ones(4)

        monkeypatch.setattr(gpu_check, "CRITERIA", ())
        monkeypatch.setattr(gpu_check, "_prune_small", lose)
        assert run("--parts", "1") == 1
        found = verdicts(read()["correctness"])
        assert found["step, allow_tf32 False"] == "passed"
        assert found["step, allow_tf32 True"] == "failed"


# What needs a GPU, by part.
SKIPPED = {7: {"synchronizations"}, 8: {"2:4"}, 9: {"1 over nccl"}}


@pytest.mark.parametrize(
    "part",
    [
        *(pytest.param(n) for n in (3, 4, 7)),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 5, 6, 8, 10)),
        pytest.param(9, marks=[pytest.mark.slow, pytest.mark.spawns]),
    ],
)
def test_each_part_runs_on_the_cpu(part: int) -> None:
    if part in {2, 10}:
        pytest.importorskip("torch_pruning")
    assert run("--parts", str(part)) == 0
    (rows,) = read().values()
    assert len(rows) > 1
    skipped = {r["case"] for r in rows if r["verdict"] == "skipped: needs CUDA"}
    assert skipped == SKIPPED.get(part, set())
    others = [row for row in rows if row["case"] not in skipped]
    assert {row["verdict"] for row in others} <= {"passed", "measured"}
    assert all(row["figures"] for row in others[1:])
