"""Real gloo processes for tests, which are started once and run many jobs.

A job is a module-level function. It runs in R processes at the same time, each of which is
one rank, and its results are returned in the order of the ranks. An error on any rank, or a
job that does not end in time, fails the test that started it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

# "group": the pool initializes torch.distributed. "trainer": the environment is that of
# torchrun, and the Trainer initializes what it needs.
Launch = Literal["group", "trainer"]

# After one rank has failed, the others have this time to fail, too.
_SECONDS_AFTER_A_FAILURE = 20.0


class RankPool:
    """A pool of processes that wait for jobs.

    Args:
        size: number of processes, the largest world size.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *arguments: Any,
        launch: Launch = "group",
        timeout: float = 120.0,
    ) -> list[Any]:
        """Run a function on every rank.

        Args:
            world_size: number of ranks, at most the size of the pool.
            function: module-level function; arguments and result must be picklable.
            arguments: arguments, the same on every rank.
            launch: what initializes ``torch.distributed``.
            timeout: seconds after which the job is considered to hang.

        Returns:
            One result for each rank, in order.

        Raises:
            RuntimeError: if any rank fails; contains the tracebacks of all that do.
        """
        if not self._processes:
            self._start()
        target = (inspect.getfile(function), function.__module__, function.__qualname__)
        with tempfile.TemporaryDirectory() as folder:
            port = _free_port()
            for rank, pipe in enumerate(self._pipes[:world_size]):
                environment = _environment(rank, world_size, port)
                store = str(Path(folder, "store")) if launch == "group" else None
                pipe.send_bytes(
                    pickle.dumps((target, environment, store, pickle.dumps(arguments)))
                )
            answers = self._collect(world_size, timeout)
        failures = [
            f"rank {rank}:\n{text}"
            for rank in range(world_size)
            for kind, text in [answers.get(rank, ("error", "no answer in time"))]
            if kind == "error"
        ]
        if failures:
            if len(answers) < world_size:
                self.close()
            raise RuntimeError("\n".join(failures))
        return [answers[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """Stop the processes; the next job starts new ones."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        # One process imports everything and forks the others, because three imports
        # would take longer than many of the jobs.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lightning_woodfisher"])
        with _changed_environment({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}):
            for _ in range(self.size):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there,), daemon=False)
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)

    def _collect(self, world_size: int, timeout: float) -> dict[int, tuple[str, Any]]:
        answers: dict[int, tuple[str, Any]] = {}
        end = time.monotonic() + timeout
        while len(answers) < world_size:
            waiting = [
                p for r, p in enumerate(self._pipes[:world_size]) if r not in answers
            ]
            ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = ("error", "the process has died")
                if answers[rank][0] == "error":
                    end = min(end, time.monotonic() + _SECONDS_AFTER_A_FAILURE)
        return answers


def _serve(pipe: Connection) -> None:
    """Run jobs until the pipe is closed or an empty message arrives."""
    import torch

    torch.set_num_threads(1)
    with _measured_coverage():
        _answer_jobs(pipe)


def _answer_jobs(pipe: Connection) -> None:
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        if not message:
            return
        target, environment, store, arguments = pickle.loads(message)
        try:
            with _changed_environment(environment):
                answer = ("ok", _run(target, store, arguments))
        except BaseException:
            answer = ("error", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


@contextlib.contextmanager
def _measured_coverage() -> Iterator[None]:
    """Measure the coverage of this process for ``make coverage``, which sets a variable."""
    settings = os.environ.get("WOODFISHER_COVERAGE")
    if settings is None:
        yield
        return
    from coverage import Coverage

    folder = Path(settings).parent
    measurement = Coverage(str(folder / ".coverage"), True, config_file=settings)
    measurement.start()
    try:
        yield
    finally:
        measurement.stop()
        measurement.save()


def _run(target: tuple[str, str, str], store: str | None, arguments: bytes) -> Any:
    import torch
    import torch.distributed as dist

    from lightning_woodfisher.distributed.communicator import destroy_group

    function = _load(*target)
    random.seed(0)
    torch.manual_seed(0)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if store is not None and world_size > 1:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
    try:
        return function(*pickle.loads(arguments))
    finally:
        if dist.is_initialized():
            destroy_group()


def _load(file: str, module_name: str, qualname: str) -> Callable[..., Any]:
    """Load a function from the file of a test module, which may not be importable."""
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise ImportError(file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    function: Callable[..., Any] = getattr(sys.modules[module_name], qualname)
    return function


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets."""
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return {key: str(value) for key, value in environment.items()}


def rank_environment(world_size: int) -> list[dict[str, str]]:
    """Return the environment of each rank of a job, as torchrun sets it."""
    port = _free_port()
    return [_environment(rank, world_size, port) for rank in range(world_size)]


@contextlib.contextmanager
def _changed_environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
