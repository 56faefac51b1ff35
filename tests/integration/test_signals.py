"""A signal in the middle of a pruning step is handled when the step is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import Classifier, differences, loader, pruning, trainer

from lightning_woodfisher import OneShotSchedule, StepConfig
from lightning_woodfisher.callbacks.signals import delay_signals


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals in the order in which their handlers were called."""
    calls: list[int] = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [
        signal.signal(number, lambda n, frame: calls.append(n)) for number in numbers
    ]
    yield calls
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_each_signal_is_handled_once_afterwards(handled: list[int]) -> None:
    @delay_signals()
    def fail() -> None:
        for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR2):
            signal.raise_signal(number)
        assert handled == []
        raise RuntimeError("in the body")

    with pytest.raises(RuntimeError, match="in the body"):
        fail()
    assert handled == [signal.SIGUSR2, signal.SIGUSR1]
    signal.raise_signal(signal.SIGUSR1)
    assert handled == [signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR1]


def test_other_handlers_and_threads_are_left_alone(handled: list[int]) -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # A shell starts background jobs with SIGINT ignored.
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with delay_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, ignored)
        signal.signal(signal.SIGINT, interrupted)
    before = signal.getsignal(signal.SIGUSR1)
    inside: list[Any] = []

    def look() -> None:
        with delay_signals():
            inside.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert inside == [before]


class Signalled(Classifier):
    """Gets a signal with each gradient of a pruning step."""

    def pruning_loss(self, batch: Any, batch_idx: int) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return self.loss(batch)


@pytest.mark.parametrize(
    "schedule", [OneShotSchedule(epoch=0), OneShotSchedule(step=3)]
)
def test_a_checkpoint_upon_a_signal_holds_the_whole_step(
    schedule: OneShotSchedule, handled: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "requeue.ckpt"
    pruner = pruning(
        schedule=schedule,
        loss_method="pruning_loss",
        step=StepConfig(recompute_steps=2),
    )
    fitted = trainer(pruner, max_epochs=1)

    def save(number: int, frame: Any) -> None:
        # What Lightning does under SLURM.
        handled.append(number)
        if pruner._done:
            fitted.save_checkpoint(path)
            handled.append(fitted.global_step)

    signal.signal(signal.SIGUSR1, save)
    fitted.fit(Signalled(), loader(), loader(8))
    # A step in the middle of training is rehearsed before the first batch.
    rehearsed = [signal.SIGUSR1] if schedule.unit == "step" else []
    assert handled == [*rehearsed, signal.SIGUSR1, schedule.position]
    checkpoint = torch.load(path, weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    assert state["done"] == [[schedule.unit, schedule.position, 0.75]]
    assert len(state["reports"]) == 1
    assert differences(state["masks"], dict(pruner.masks.state_dict())) == []
    for name, mask in state["masks"].items():
        assert torch.equal(checkpoint["state_dict"][name].cpu() != 0, mask), name
    # The gradients' passes through BatchNorm have left no trace.
    assert checkpoint["state_dict"]["net.1.num_batches_tracked"] == schedule.position
