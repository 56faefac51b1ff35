"""Start the example's scripts as a user does, and read what the ranks have recorded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
REPO = HERE.parents[1]
TORCHRUN = REPO / "examples" / "clusters" / "torchrun.sh"
SBATCH = REPO / "examples" / "clusters" / "slurm.sbatch"
# A safety net: no launch takes so long unless it hangs.
SECONDS = 150


def environment(run: Path, **values: object) -> dict[str, str]:
    """Variables of the scripts, and a clean slate for everything else that launches."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "PYTEST_", "COV_"))
    }
    paths = [str(HERE), inherited.get("PYTHONPATH", "")]
    return {
        **inherited,
        "RUN": str(run),
        "REPO": str(REPO),
        "CONFIG": str(HERE / "short.yaml"),
        "ACCELERATOR": "cpu",
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "INTERFACE": "lo",
        **{name: str(value) for name, value in values.items()},
    }


def run_together(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], logs: Path
) -> None:
    """Run commands at the same time; when one fails or hangs, none is left running."""
    files = [logs / f"output-{number}" for number in range(len(commands))]
    processes = []
    try:
        for (command, env), file in zip(commands, files, strict=True):
            with file.open("w") as output:
                process = subprocess.Popen(
                    command,
                    env=dict(env),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            processes.append(process)
        for process in processes:
            process.wait(timeout=SECONDS)
    finally:
        for process in processes:
            end_session(process)
    codes = [process.returncode for process in processes]
    assert not any(codes), "\n".join(file.read_text() for file in files)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started, if it still runs."""
    if process.poll() is None:
        # torchrun ends its workers, when it is asked and not killed.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def recorded(run: Path, name: str, ranks: int = 2) -> dict[str, Any]:
    """What the ranks have recorded; all must have the same, which is returned."""
    states = [torch.load(run / f"{name}-rank-{rank}.pt") for rank in range(ranks)]
    assert not (run / f"{name}-rank-{ranks}.pt").exists()
    first = states[0]
    assert first["world_size"] == ranks
    for other in states[1:]:
        assert_same(other, first)
    return first


def assert_same(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Masks and weights are the same, bit for bit."""
    for kind in ("masks", "weights"):
        assert left[kind].keys() == right[kind].keys()
        for name, tensor in right[kind].items():
            assert torch.equal(left[kind][name], tensor), f"{kind} of {name} differ"


def sparsity(state: Mapping[str, Any]) -> float:
    """Share of pruned weights, which must be zero."""
    for name, mask in state["masks"].items():
        assert not state["weights"][name][~mask].any(), name
    zeros = sum(int((~mask).sum()) for mask in state["masks"].values())
    return zeros / sum(mask.numel() for mask in state["masks"].values())
