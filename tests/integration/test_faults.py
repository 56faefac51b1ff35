"""A pruning step is whole or absent, whatever strikes in the middle of it.

The fit is started again from the last checkpoint and must end with the bits of a fit that
was never interrupted.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
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
    strike_and_go_on,
    strike_once,
    train_on,
)
from fits import differences
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rank_pool import RankPool

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
    if done == fault.epoch == 1:
        # Nothing of the step is left, not even weights half of which were written.
        left, before = (
            torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
            for name in ("left", "epoch=0")
        )
        assert differences(left, before) == []
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


@pytest.mark.spawns
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


# ---------------------------------------------------------------- several ranks

# What the ranks can tell each other about.
SHARED = [
    # Few gradients are computed in one pass, which is that of rank 0.
    Fault("training_step", "error", rank=0),
    Fault("solve", "out of memory", rank=1),
    Fault("write", "error", rank=1),
    Fault("log", "error", rank=0),
    Fault("one weight", "deviate", rank=1),
    Fault("one mask", "deviate", rank=1),
]
PHASE = {"training_step": "collect", "solve": "factorize"}


def test_a_fault_on_one_rank_stops_all_and_training_goes_on(
    ranks: RankPool, tmp_path: Path
) -> None:
    results = ranks.run(2, strike_and_go_on, str(tmp_path), 2, SHARED, launch="trainer")
    for rank, outcomes in enumerate(results):
        assert outcomes[0] == (PLANNED[-1], 0)
        for fault, outcome in zip(SHARED, outcomes[1:], strict=True):
            name, text, (removed, reports, logged), wrong = outcome
            assert wrong == [], fault
            late = fault.place in LATE
            assert removed == (PLANNED[late], 0), fault
            assert reports == 1 + late
            # The first step only: nothing of the struck one.
            assert logged == (rank == 0)
            if fault.kind == "deviate":
                kind = "the weights" if fault.place == "one weight" else "the masks"
                assert f"{kind} of 'net.3.weight' (rank 1 differs from rank 0)" in text
                assert text.endswith("on one rank only.")
                assert "after the step" in text
            elif rank == fault.rank:
                assert name == ERRORS[fault.kind].__name__
            else:
                phase = PHASE.get(fault.place, fault.place)
                assert name == "PruningError"
                assert text.startswith(f"rank {fault.rank} failed in phase '{phase}': ")
                assert ERRORS[fault.kind].__name__ in text


@pytest.fixture
def doomed() -> Iterator[RankPool]:
    """Processes that may die; they are not needed afterwards."""
    pool = RankPool(3)
    yield pool
    pool.close()


# What a rank cannot tell the others: how many ranks there are, and what happens.
LOST = {
    "killed while collecting": (2, Fault("training_step", "kill", rank=0)),
    "killed while writing": (2, Fault("write", "kill", rank=1)),
    "killed while logging, of three": (3, Fault("log", "kill", rank=0)),
    "killed while solving, of three": (3, Fault("solve", "kill", rank=2)),
    "out of memory in the exchange": (2, Fault("send", "out of memory", rank=1)),
    "does not answer": (2, Fault("select", "wait", rank=1)),
}


@pytest.mark.parametrize("case", list(LOST))
def test_a_lost_rank_ends_the_others_and_training_goes_on(
    ranks: RankPool, doomed: RankPool, tmp_path: Path, case: str
) -> None:
    world_size, fault = LOST[case]
    # The timeout of the process group only matters to the rank that does not answer.
    seconds = 2.0 if fault.kind == "wait" else 120.0
    job = strike_once, str(tmp_path), world_size, fault, seconds
    with pytest.raises(RuntimeError, match="the process has died"):
        doomed.run(world_size, *job, launch="trainer")
    for rank in set(range(world_size)) - {fault.rank}:
        left, error = (tmp_path / f"rank {rank}.txt").read_text().split("\n", 1)
        assert left == str((PLANNED[fault.place == "log"], 0))
        assert error.startswith(
            f"PruningError: rank {rank} has lost the other ranks in"
        )
        assert "See the output of the other ranks for the cause." in error
    found = ranks.run(world_size, train_on, str(tmp_path), world_size, launch="trainer")
    assert found == [[]] * world_size
