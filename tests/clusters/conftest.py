"""The run that all the others are compared with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Tests are not a package: this lets them share modules.
sys.path.insert(0, str(Path(__file__).parent))

from launches import TORCHRUN, environment, run_together


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two processes on this machine that nothing has interrupted."""
    run = tmp_path_factory.mktemp("two")
    run_together([([str(TORCHRUN)], environment(run, NPROC=2))], run)
    return run
