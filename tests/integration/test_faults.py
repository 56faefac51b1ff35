"""A pruning step is whole or absent, whatever strikes in the middle of it.

The fit is started again from the last checkpoint and must end with the bits of a fit that
was never interrupted.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import (
    PLANNED,
    Fault,
    die,
    faulty_checkpoints,
    removed_in,
    report_zeros,
    run,
)
from fits import differences
from lightning.pytorch.utilities.exceptions import SIGTERMException

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ckpt_path=.last.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]

ERRORS: dict[str, type[BaseException]] = {
    "error": LookupError,
    "out of memory": torch.OutOfMemoryError,
    "interrupt": SystemExit,
    "terminate": SIGTERMException,
}

# What strikes in the process itself. Where a step has been carried out on paper, but not
# yet logged, it stays; before that it is taken back.
STRIKES = [
    *(Fault(place, "error") for place in ("training_step", "dataset", "collate")),
    *(Fault(place, "error") for place in ("log", "report file")),
    Fault("training_step", "error", epoch=0),
    Fault("write", "error", epoch=0),
    *(
        Fault(place, "out of memory")
        for place in ("training_step", "exchange", "solve", "update", "select")
    ),
    *(
        Fault(place, "out of memory")
        for place in ("write", "masks", "verify", "optimizer", "log")
    ),
    *(Fault(place, "interrupt") for place in ("training_step", "write", "log")),
    *(
        Fault(place, "terminate")
        for place in ("training_step", "exchange", "solve", "select", "write", "log")
    ),
]
LATE = {"optimizer", "log", "report file"}
KILLS = [
    Fault(place, "kill")
    for place in ("training_step", "exchange", "solve", "select", "write", "log")
]


def name_of(fault: Fault) -> str:
    return f"{fault.kind} in {fault.place}, epoch {fault.epoch}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    whole = run(folder)
    assert removed_in(whole) == (PLANNED[-1], 0)
    assert faulty_checkpoints(folder) == []
    assert len(list(folder.rglob("*.ckpt"))) == len(PLANNED) + 1
    return whole.result


@pytest.mark.parametrize("fault", STRIKES, ids=name_of)
def test_a_fit_that_was_struck_ends_as_if_it_had_not_been(
    undisturbed: dict[str, Any], tmp_path: Path, fault: Fault
) -> None:
    broken = run(tmp_path, fault)
    assert type(broken.error) is ERRORS[fault.kind]
    done = fault.epoch + (fault.place in LATE or fault.kind == "terminate")
    assert removed_in(broken) == ([0, *PLANNED][done], 0)
    assert len(broken.pruner.reports) == done
    assert not any(o._optimizer_step_post_hooks for o in broken.trainer.optimizers)
    # Two of the epochs, "last", and the one saved of what the exception has left.
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1 + 2 * fault.epoch
    assert faulty_checkpoints(tmp_path) == []
    again = run(tmp_path)
    assert differences(again.result, undisturbed) == []
    assert faulty_checkpoints(tmp_path) == []


@pytest.mark.parametrize("place", ["training_step", "write", "log", "optimizer"])
def test_training_goes_on_from_what_an_exception_leaves(
    tmp_path: Path, place: str
) -> None:
    # Not with the same bits: Lightning begins such an epoch with its last batch.
    assert run(tmp_path, Fault(place, "error")).error is not None
    again = run(tmp_path, resume=str(tmp_path / "left.ckpt"))
    assert removed_in(again) == (PLANNED[-1], 0)
    assert [report_zeros(r.to_dict()) for r in again.pruner.reports] == list(PLANNED)
    assert [report.epoch for report in again.pruner.reports] == [0, 1, 2]


def test_a_fit_that_was_killed_ends_as_if_it_had_not_been(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_woodfisher"])
    killed = []
    for fault in KILLS:
        folder = tmp_path / fault.place
        folder.mkdir()
        killed.append((context.Process(target=die, args=(str(folder), fault)), folder))
    for process, _ in killed:
        process.start()
    for process, folder in killed:
        process.join(120)
        assert process.exitcode == -9, folder
        assert len(list(folder.rglob("*.ckpt"))) == 2
        assert faulty_checkpoints(folder) == []
        assert differences(run(folder).result, undisturbed) == [], folder
        assert faulty_checkpoints(folder) == []
