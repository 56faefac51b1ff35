"""examples/clusters/slurm.sbatch on a real SLURM: interrupted, requeued, resumed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from launches import REPO, SBATCH, assert_same, environment, recorded, sparsity

SCRIPTS = REPO / "tests" / "slurm"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge"
# A safety net: no job takes so long unless it hangs.
SECONDS = 150

_SEARCH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
_MISSING = [name for name in PROGRAMS if shutil.which(name, path=_SEARCH) is None]
# Marks, not skips in the fixture: the run to compare with is not made in vain.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_MISSING), reason=f"no {', '.join(_MISSING)}: {INSTALL}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start this SLURM"),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands reach a cluster of two nodes."""
    # Not pytest's folder: the path of a socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        run_script("start_slurm.sh", folder)
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        run_script("stop_slurm.sh", folder)
        shutil.rmtree(folder)


def run_script(name: str, folder: Path) -> None:
    # Into a file, not a pipe: the daemons that are started would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output:
        code = subprocess.run(
            [str(SCRIPTS / name), str(folder)],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=120,
        ).returncode
        output.seek(0)
        assert code == 0, output.read()


def ask(env: Mapping[str, str], *command: str) -> str:
    done = subprocess.run(
        command,
        check=False,
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def await_true(what: str, happened: Callable[[], bool], run: Path) -> None:
    end = time.monotonic() + SECONDS
    while not happened():
        if time.monotonic() > end:
            printed = "\n".join(file.read_text() for file in run.glob("*.out"))
            pytest.fail(f"not in {SECONDS} s: {what}\n{printed}")
        time.sleep(0.2)


# More than all the safety nets inside together: they say what it was that hung.
@pytest.mark.timeout(600)
def test_a_requeued_job_ends_like_an_uninterrupted_one(
    slurm: dict[str, str], two_processes: Path, tmp_path: Path
) -> None:
    env = environment(
        tmp_path,
        # The names of the nodes mean nothing to the network of this machine.
        MASTER_ADDR="127.0.0.1",
        TEST_WAIT_AFTER_EPOCH=1,
        **slurm,
    )
    output = f"--output={tmp_path}/slurm-%j.out"
    job = ask(env, "sbatch", "--parsable", output, str(SBATCH)).strip()

    def shows(pattern: str) -> bool:
        return bool(re.search(pattern, ask(env, "scontrol", "show", "job", job)))

    def is_waiting() -> bool:
        # A job that has failed will never wait.
        assert not shows("JobState=(FAILED|COMPLETED|CANCELLED)"), printed()
        return all((tmp_path / f"waiting-{rank}").exists() for rank in range(2))

    def printed() -> str:
        return (tmp_path / f"slurm-{job}.out").read_text()

    await_true("both ranks wait", is_waiting, tmp_path)
    # What SLURM does by itself when the time is nearly over.
    ask(env, "scancel", "--signal=USR1", job)
    await_true(
        "the job has ended",
        lambda: shows("JobState=(FAILED|COMPLETED|CANCELLED|NODE_FAIL|TIMEOUT)"),
        tmp_path,
    )
    assert shows("Requeue=1 Restarts=1 "), printed()
    assert shows("JobState=COMPLETED"), printed()
    assert f"start 1 of job {job} on n[1-2]" in printed()
    assert f"start 2 of job {job} on n[1-2]" in printed()

    checkpoint = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    (key,) = (k for k in checkpoint["callbacks"] if k.startswith("WoodFisher"))
    state = checkpoint["callbacks"][key]
    assert [step[:2] for step in state["done"]] == [["epoch", 0], ["epoch", 1]]
    resumed = recorded(tmp_path, "start-1")
    saved = {
        name: value
        for name, value in checkpoint["state_dict"].items()
        if name in resumed["weights"]
    }
    assert_same(resumed, {"masks": state["masks"], "weights": saved})
    assert_same(resumed, recorded(two_processes, "trained-1"))
    for name in ("epoch-0", "epoch-1", "trained-1", "epoch-2", "end"):
        assert_same(recorded(tmp_path, name), recorded(two_processes, name))
    assert sparsity(recorded(tmp_path, "end")) == pytest.approx(0.9, abs=1e-4)
