"""Averaged weights are pruned with the network: validated, saved, resumed and final."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    WEIGHTS,
    Classifier,
    Counting,
    Reseed,
    adamw,
    differences,
    final_state,
    loader,
    pruning,
    seed_all,
    trainer,
)
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_woodfisher import (
    ConfigurationError,
    OneShotSchedule,
    PolynomialSchedule,
    StepConfig,
    WoodFisherPruningCallback,
)
from lightning_woodfisher.callbacks.averaging import (
    mask_averages,
    require_maskable_averages,
)
from lightning_woodfisher.weights.masks import Masks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]
EPOCHS = 4


class Remembering(WeightAveraging):
    """An average of a user's own that never forgets what it was at first."""

    def __init__(self) -> None:
        self.first: dict[torch.Size, Tensor] = {}
        super().__init__(avg_fn=self.mix)

    def mix(self, average: Tensor, now: Tensor, count: Any) -> Tensor:
        first = self.first.setdefault(average.shape, average.detach().clone())
        return 0.5 * now + 0.5 * first


AVERAGES: dict[str, Callable[[], pl.Callback]] = {
    "ema": functools.partial(EMAWeightAveraging, decay=0.8),
    "swa": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    "remembering": Remembering,
}


def plain() -> nn.Sequential:
    """Give a network without BatchNorm: SWA then adds no epoch."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4))


class Look(pl.Callback):
    """Counts the zeros that are validated, and what an average would have brought back."""

    def __init__(self, pruner: WoodFisherPruningCallback, average: Any) -> None:
        self.pruner, self.average = pruner, average
        self.zeros: list[int] = []
        self.faults = 0

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        average = getattr(self.average._average_model, "module", None)
        named = dict((average or self.average._average_model).named_parameters())
        masks = self.pruner.masks
        # Masked at the step itself, and not only when somebody looks.
        if not isinstance(self.average, Remembering):
            for name in masks.parameters:
                copy, gone = named[name].cpu(), ~masks.kept(name).cpu()
                self.faults += int((copy[gone] != 0).sum())

    def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        masks = self.pruner.masks
        self.faults += sum(masks.violations().values())
        self.zeros.append(zeros_in(module.state_dict()))


def zeros_in(state: dict[str, Tensor]) -> int:
    return sum(int((value == 0).sum()) for value in state.values() if value.dim() > 1)


def by_magnitude(schedule: Any) -> WoodFisherPruningCallback:
    """Give a callback that is fast: averages know nothing of the criterion."""
    return pruning(
        schedule=schedule, criterion="magnitude", step=StepConfig(measure_loss=False)
    )


def fit(
    average: str, first: bool, build: Any, resumed: str | None = None, **options: Any
) -> tuple[pl.Trainer, WoodFisherPruningCallback, Look]:
    seed_all(1 if resumed is None else 99)
    pruner = by_magnitude(PolynomialSchedule(1, 2))
    other = AVERAGES[average]()
    look = Look(pruner, other)
    pair = [other, pruner] if first else [pruner, other]
    options = {"max_epochs": EPOCHS, **options}
    fitted = trainer(Reseed(), *pair, look, *options.pop("more", []), **options)
    module = Classifier(adamw, build)
    data = loader(shuffle=False), loader(8, shuffle=False)
    fitted.fit(module, *data, ckpt_path=resumed)
    return fitted, pruner, look


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("average", list(AVERAGES))
def test_averages_are_pruned_with_the_network(average: str, first: bool) -> None:
    checkpoints = ModelCheckpoint(
        Path.cwd(), "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    options = {"more": [checkpoints], "enable_checkpointing": True}
    fitted, pruner, look = fit(average, first, plain, **options)
    weights = 64 * 12 + 12 * 4
    target = round(0.75 * weights)
    expected = [report.zeros for report in pruner.reports]
    assert expected[-1] == target
    # Validation of every epoch, the saved weights of every epoch, and the result.
    assert look.faults == 0
    assert look.zeros == [0, *expected, target]
    module = fitted.lightning_module
    assert zeros_in(module.state_dict()) == target
    files = [Path.cwd() / f"epoch={epoch}.ckpt" for epoch in range(EPOCHS)]
    for file, count in zip(files, [0, *expected, target], strict=True):
        checkpoint = torch.load(file, weights_only=True)
        assert zeros_in(checkpoint["state_dict"]) == count
        assert zeros_in(checkpoint.get("current_model_state", {})) in {0, count}
        swa = [s for k, s in checkpoint["callbacks"].items() if k.startswith("Stoch")]
        # A copy that is not used yet is masked, too.
        assert [zeros_in(s["average_model_state"]) for s in swa] == [count] * len(swa)
    # The average is one: it is not the weights that were trained last.
    if average == "ema":
        last = torch.load(files[-1], weights_only=True)
        current, mean = last["current_model_state"], last["state_dict"]
        assert differences(current, mean) != []
        assert differences(module.state_dict(), mean) == []
    # Resumed from before, between or after the steps, it ends the same.
    for file in files[first : 3 : 1 + first]:
        again, restored, watch = fit(average, first, plain, resumed=str(file))
        assert watch.faults == 0
        assert zeros_in(again.lightning_module.state_dict()) == target
        if average != "remembering":
            # Its memory is not in the checkpoint.
            assert (
                differences(restored.masks.state_dict(), pruner.masks.state_dict())
                == []
            )
            state = final_state(again)["model"]
            assert differences(state, module.state_dict()) == [], file


def test_the_epoch_that_swa_adds_for_batchnorm_is_not_for_pruning() -> None:

    def plan(schedule: Any, *more: Any) -> list[tuple[int, int]]:
        seed_all(1)
        pruner, module = by_magnitude(schedule), Classifier()
        trainer(pruner, *more, max_epochs=4).fit(module, loader())
        assert zeros_in(module.state_dict()) == round(0.75 * WEIGHTS)
        return [(report.epoch, report.step) for report in pruner.reports]

    def swa() -> pl.Callback:
        return StochasticWeightAveraging(1e-2, swa_epoch_start=2)

    for schedule in (None, PolynomialSchedule(start_step=1, every_n_steps=5)):
        assert plan(schedule, swa()) == plan(schedule)
    for late in (OneShotSchedule(epoch=4), OneShotSchedule(step=24)):
        with pytest.raises(ConfigurationError, match="training has only"):
            plan(late, swa())


def test_averages_of_a_sharded_model_are_refused() -> None:
    options = {"strategy": ModelParallelStrategy(), "enable_checkpointing": False}
    fitted = trainer(EMAWeightAveraging(), pruning(), **options)
    with pytest.raises(ConfigurationError, match="ModelParallelStrategy shards them"):
        require_maskable_averages(fitted)


def test_an_average_in_an_unknown_place_is_refused() -> None:
    class Elsewhere(WeightAveraging):
        def __init__(self) -> None:
            super().__init__()
            del self._average_model

    module = Counting()
    with pytest.raises(ConfigurationError, match="Elsewhere of this version"):
        trainer(pruning(), Elsewhere()).fit(module, loader())
    assert module.steps == 0


def test_a_copy_of_an_incomplete_module_is_refused() -> None:
    swa, module = StochasticWeightAveraging(1e-2), Classifier(build=plain)
    swa._average_model = nn.Linear(2, 2)
    masks = Masks({"net.1.weight": module.net[1].weight})
    with pytest.raises(ConfigurationError, match=r"average has no net\.1\.weight"):
        mask_averages(trainer(swa), masks)
