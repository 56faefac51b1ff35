"""Fits on two real processes, one of which gets a signal at a random time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fault_runs import (
    PLANNED,
    PLANNED_CHANNELS,
    faulty_checkpoints,
    masked_channels,
    run,
    several,
)
from fits import differences
from rank_pool import RankPool, rank_environment

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP")
# A rank that has stopped is given up by the other one after this time.
SECONDS_OF_SILENCE = 5.0
# After this time a rank hangs; an idle machine needs a tenth of it.
SECONDS_TO_END = 120.0
# What a rank says at its end: nothing was wrong; Lightning after a signal, on this rank or
# another; the package; gloo, in the collectives of DDP.
ENDINGS = re.compile(
    r"finished|KeyboardInterrupt: |SystemExit: 1|SIGTERMException: "
    r"|PruningError: rank \d (has lost the other ranks|failed in phase ')"
    r"|(RuntimeError|Dist\w+Error): .*(gloo|[Cc]onnection|[Tt]imed? ?out|Broken pipe)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Blow:
    """A signal, the ranks that get it, and when.

    Attributes:
        name: name of the signal.
        ranks: who gets it.
        seconds: time after the start of the fit.
        channels: whether the fit prunes channels.
    """

    name: str
    ranks: tuple[int, ...]
    seconds: float
    channels: bool


def fit_and_note(folder: str, channels: bool) -> None:
    """Run as a rank: fit, and write how it has ended."""
    torch.set_num_threads(1)
    os.chdir(folder)
    rank = os.environ["RANK"]
    Path(f"started {rank}").touch()
    options = {"keep_what_is_left": False, "channels": channels}
    try:
        run(Path(folder), **options, **several(2, SECONDS_OF_SILENCE))
        text = "finished"
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    Path(f"ended {rank}").write_text(text)


def _serve(environment: dict[str, str], folder: str, channels: bool) -> None:
    os.environ.update(environment)
    # A shell that starts jobs in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    fit_and_note(folder, channels)


@contextlib.contextmanager
def two_ranks(folder: Path, channels: bool) -> Iterator[list[Any]]:
    """Start a fit on two ranks, and wait until both have begun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_woodfisher"])
    environments = rank_environment(2)
    processes = [
        context.Process(target=_serve, args=(e, str(folder), channels))
        for e in environments
    ]
    for old in [*folder.glob("started *"), *folder.glob("ended *")]:
        old.unlink()
    for process in processes:
        process.start()
    try:
        end = time.monotonic() + SECONDS_TO_END
        while len(list(folder.glob("started *"))) < 2 and time.monotonic() < end:
            time.sleep(0.005)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def join(processes: list[Any]) -> bool:
    """Wait for processes, and return whether all have ended in time."""
    end = time.monotonic() + SECONDS_TO_END
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return not any(process.is_alive() for process in processes)


def strike(folder: Path, blow: Blow) -> tuple[list[str], float] | None:
    """Run a fit that gets a blow, and require that its ranks end.

    Returns:
        How each rank has ended that was not killed, and the seconds after the blow; None if
        the fit was over before.
    """
    with two_ranks(folder, blow.channels) as processes:
        time.sleep(blow.seconds)
        struck = [processes[rank] for rank in blow.ranks]
        if not all(process.is_alive() for process in processes):
            return None
        start = time.monotonic()
        for process in struck:
            os.kill(process.pid, getattr(signal, blow.name))
        others = [process for process in processes if process not in struck]
        assert join(others if blow.name == "SIGSTOP" else processes), f"hangs: {blow}"
        seconds = time.monotonic() - start
    dead = blow.ranks if blow.name in {"SIGKILL", "SIGSTOP"} else ()
    texts = {rank: folder / f"ended {rank}" for rank in {0, 1} - {*dead}}
    ends = [texts[rank].read_text() for rank in sorted(texts)]
    assert all(ENDINGS.match(text) for text in ends), (blow, ends)
    return ends, seconds


def finish(folder: str, reference: str, channels: bool) -> list[str]:
    """Job: continue from the last checkpoint, and compare with an undisturbed fit."""
    wrong = faulty_checkpoints(Path(folder))
    again = fit_to_the_end(folder, channels)
    whole = torch.load(Path(reference, f"{dist.get_rank()}.pt"), weights_only=False)
    return wrong + differences(again, whole) + faulty_checkpoints(Path(folder))


def undisturbed(folder: str, channels: bool) -> None:
    """Job: a fit without a fault, whose result is kept in a file."""
    Path(folder).mkdir(exist_ok=True)
    result = fit_to_the_end(folder, channels)
    torch.save(result, Path(folder, f"{dist.get_rank()}.pt"))


def fit_to_the_end(folder: str, channels: bool) -> dict[str, Any]:
    """Fit, and return the result without what a checkpoint does not hold."""
    options = {"channels": channels, "keep_what_is_left": False}
    result = run(Path(folder), **options, **several(2, 60.0)).result
    state = result["state"]
    del state["gradients"], state["flags"]
    if dist.get_rank():
        # A checkpoint holds the BatchNorm statistics of rank 0.
        state["model"] = {n: v for n, v in state["model"].items() if "running" not in n}
    removed = sum(int((~kept).sum()) for kept in result["masks"].values())
    assert channels or removed == PLANNED[-1]
    assert not channels or masked_channels(result["masks"]) == PLANNED_CHANNELS[-1]
    return result


def strike_often(pool: RankPool, folder: Path, count: int, seed: int) -> list[str]:
    """Strike fits until so many blows have hit, and check what is left of each.

    Args:
        pool: processes for the fits that continue.
        folder: an empty folder.
        count: number of blows.
        seed: chooses signals, ranks and times.

    Returns:
        Lines of a table: how often each signal has ended which way, and the longest time.
    """
    durations = {}
    for channels in (False, True):
        whole = str(folder / f"whole {channels}")
        pool.run(2, undisturbed, whole, channels, launch="trainer", timeout=600.0)
        timed = folder / f"timed {channels}"
        timed.mkdir()
        with two_ranks(timed, channels) as processes:
            start = time.monotonic()
            assert join(processes)
            durations[channels] = time.monotonic() - start
    generator, found = random.Random(seed), defaultdict[str, list[float]](list)
    latest: dict[bool, Path] = {}
    number, hits = 0, 0
    while hits < count:
        channels = generator.random() < 0.5
        blow = Blow(
            generator.choice(SIGNALS),
            generator.choice([(0,), (1,), (0, 1)]),
            generator.uniform(0.0, durations[channels]),
            channels,
        )
        # Every second blow hits a fit that continues after another blow.
        place, number = folder / f"fit {number}", number + 1
        if channels in latest and generator.random() < 0.5:
            shutil.copytree(latest[channels], place)
        place.mkdir(exist_ok=True)
        ending = strike(place, blow)
        if ending is None:
            continue
        hits += 1
        finished = folder / "finished"
        shutil.copytree(place, finished)
        job = finish, str(finished), str(folder / f"whole {channels}"), channels
        wrong = pool.run(2, *job, launch="trainer", timeout=600.0)
        assert wrong == [[], []], (wrong, blow, ending, place)
        shutil.rmtree(finished)
        latest[channels] = place
        texts, seconds = ending
        kinds = " and ".join(sorted({text.partition(":")[0] for text in texts}))
        found[f"{blow.name}: {kinds or 'no rank is left'}"].append(seconds)
        print(f"{hits} of {count}: {blow}, {seconds:.1f} s, {texts}", flush=True)
    return [
        f"{len(all_seconds):3} {name}, at most {max(all_seconds):.1f} s"
        for name, all_seconds in sorted(found.items())
    ]
