"""Threads of the factorizations where OpenMP binds threads to cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lightning_woodfisher.fisher import parallel

REPORT = """
import os, threading, torch
from lightning_woodfisher.fisher import parallel

together = threading.Barrier(2, timeout=60)
cores = []

def work(index):
    together.wait()
    cores.append(sorted(os.sched_getaffinity(0)))

torch.ones(2**20).sum()
bound = len(os.sched_getaffinity(0))
parallel.run_in_threads(work, 2, torch.device("cpu"))
print(bound, cores, len(os.sched_getaffinity(0)))
"""


@pytest.mark.spawns
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores and Linux",
)
def test_threads_may_use_the_cores_of_the_process_and_no_others() -> None:
    allowed = sorted(os.sched_getaffinity(0))[:2]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": ",".join(f"{{{core}}}" for core in allowed),
    }
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The thread that starts the others stays on its core.
    assert done.stdout.split("\n")[0] == f"1 {[allowed, allowed]} 1"


def test_a_platform_without_these_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    done: list[int] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("sched_setaffinity", "sched_getaffinity"):
            monkeypatch.setattr(os, name, refused, raising=False)
        parallel.run_in_threads(done.append, 4, torch.device("cpu"))
        for name in ("sched_setaffinity", "sched_getaffinity"):
            monkeypatch.delattr(os, name)
        parallel.run_in_threads(done.append, 4, torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert sorted(done) == sorted([*range(4)] * 2)
