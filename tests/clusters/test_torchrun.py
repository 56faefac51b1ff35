"""examples/clusters/torchrun.sh: processes on one machine, and on two "machines"."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from launches import (
    TORCHRUN,
    assert_same,
    environment,
    recorded,
    run_together,
    sparsity,
)

NETWORK = "10.77.0"

pytestmark = pytest.mark.slow


def test_two_processes_do_the_step_of_one(two_processes: Path, tmp_path: Path) -> None:
    run_together([([str(TORCHRUN)], environment(tmp_path, NPROC=1))], tmp_path)
    one, two = (
        recorded(tmp_path, "epoch-0", ranks=1),
        recorded(two_processes, "epoch-0"),
    )
    # The same seed makes the same network, and the first step comes before any training.
    assert_same(two, one)
    assert 0.6 < sparsity(two) < 0.7
    # From here on the batches are not those of one process, but the ranks are at one.
    for name in ("epoch-1", "epoch-2", "end"):
        recorded(two_processes, name)
    assert sparsity(recorded(two_processes, "end")) == pytest.approx(0.9, abs=1e-4)
    assert sparsity(recorded(tmp_path, "end", ranks=1)) == pytest.approx(0.9, abs=1e-4)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable."""
    if shutil.which("ip") is None:
        pytest.skip("no ip: apt-get install iproute2")
    names = [f"wf{os.getpid()}{side}" for side in "ab"]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError:
        pytest.skip("network namespaces need root (CAP_SYS_ADMIN)")
    try:
        ip("netns", "add", names[1])
        # Each end is made inside of its namespace: the names meet nobody else's.
        ip("-n", names[0], "link", "add", "cable", "type", "veth",
           "peer", "name", "cable", "netns", names[1])  # fmt: skip
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            # The cable goes with its ends.
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def test_two_hosts_do_what_two_processes_do(
    hosts: list[str], two_processes: Path, tmp_path: Path
) -> None:
    commands = []
    for rank, host in enumerate(hosts):
        settings = {"MASTER": f"{NETWORK}.1:29500", "INTERFACE": "cable"}
        settings.update(NNODES="2", NODE_RANK=str(rank), NPROC="1")
        command = ["ip", "netns", "exec", host, str(TORCHRUN)]
        commands.append((command, environment(tmp_path, **settings)))
    run_together(commands, tmp_path)
    for name in ("epoch-0", "epoch-1", "epoch-2", "end"):
        assert_same(recorded(tmp_path, name), recorded(two_processes, name))
