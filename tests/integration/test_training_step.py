"""What TrainingStepLoss makes of training steps that do more than return a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from fits import CLASSES, Classifier, Counting, images, loader, pruning, trainer
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from rank_pool import RankPool
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_woodfisher import FisherConfig, OneShotSchedule, PruningError
from lightning_woodfisher.callbacks.training_step import TrainingStepLoss
from lightning_woodfisher.data.losses import compute_losses
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.collect import collect_gradients
from lightning_woodfisher.gradients.task import GradientTask

COUNT, SIZE = 5, 3


class Rows(pl.Callback):
    """Collects the gradients of some parameters before the first batch.

    Args:
        names: of the parameters; all by default.
        scale: multiplies the loss before the backward pass.
    """

    def __init__(self, names: tuple[str, ...] = (), scale: float = 1.0) -> None:
        self.names = names
        self.scale = scale
        self.rows = torch.empty(0)
        self.losses: list[float] = []
        self.measured: list[float] = []
        self.expected = torch.empty(0)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        source = TrainingStepLoss(trainer, module)
        source.loss_scale = self.scale
        known = dict(module.named_parameters())
        parameters = {name: known[name] for name in self.names or known}
        active = {
            name: torch.arange(p.numel(), device=p.device)
            for name, p in parameters.items()
        }
        before = [p.requires_grad for p in module.parameters()]
        batches = source.batches(COUNT, SIZE, seed=1)
        comm = Communicator(module.device)
        sizes = [sum(p.numel() for p in parameters.values())]
        if hasattr(module, "gradients"):
            module.eval()
            moved = [
                trainer.strategy.batch_to_device(batches.fetch(i)) for i in range(COUNT)
            ]
            flat = [module.gradients(batch) for batch in moved]
            self.expected = torch.stack(
                [torch.cat([g.view(-1) for g in f]) for f in flat]
            ).cpu()
            module.train()
        with source.session("eval"):
            # One by one: what the module saw is counted, and each loss compared.
            task = GradientTask(source, parameters, active, COUNT, 1, comm, self.losses)
            rows = collect_gradients(task, batches, sizes, collection="loop")
            self.rows = torch.cat(list(rows)).cpu()
            self.measured = compute_losses(source, batches, range(COUNT), comm, 1)
        assert [p.requires_grad for p in module.parameters()] == before


def collected(module: pl.LightningModule, **options: Any) -> Rows:
    """Run one epoch of one batch."""
    rows = Rows(**options)
    trainer(rows, max_epochs=1, limit_train_batches=1).fit(module, loader())
    return rows


# ---------------------------------------------------------------- several players


class Adversaries(pl.LightningModule):
    """A generator and a discriminator.

    Args:
        style: how the training step says which loss is whose.
    """

    def __init__(self, style: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.style = style
        self.generator = nn.Linear(4, 64)
        self.discriminator = nn.Linear(64, 1)

    def generator_loss(self, batch: Any) -> Tensor:
        made = self.generator(batch[0].flatten(1)[:, :4])
        return nn.functional.softplus(-self.discriminator(made)).mean()

    def discriminator_loss(self, batch: Any) -> Tensor:
        made = self.generator(batch[0].flatten(1)[:, :4]).detach()
        judged = self.discriminator(torch.cat([made, -batch[0].flatten(1)]))
        return nn.functional.softplus(judged).mean()

    def gradients(self, batch: Any) -> list[Tensor]:
        """Give what each player gets of its own loss."""
        return [
            *torch.autograd.grad(
                self.generator_loss(batch), list(self.generator.parameters())
            ),
            *torch.autograd.grad(
                self.discriminator_loss(batch), list(self.discriminator.parameters())
            ),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        players = (first, self.generator_loss), (second, self.discriminator_loss)
        for optimizer, loss in players:
            if self.style == "toggled, steps later":
                self.toggle_optimizer(optimizer)
                self.manual_backward(loss(batch))
                self.untoggle_optimizer(optimizer)
            elif self.style == "toggle_model":
                with optimizer.toggle_model():
                    self.manual_backward(loss(batch))
            elif self.style == "closure":

                def closure(loss: Any = loss) -> Tensor:
                    value: Tensor = loss(batch)
                    self.manual_backward(value)
                    return value

                optimizer.step(closure)
            elif self.style == "steps":
                optimizer.zero_grad()
                self.manual_backward(loss(batch))
                optimizer.step()
            elif self.style == "toggled too late":
                value = loss(batch)
                self.toggle_optimizer(optimizer.optimizer)
                self.manual_backward(value)
                self.untoggle_optimizer(optimizer.optimizer)
            else:
                self.manual_backward(loss(batch))

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(player.parameters(), lr=0.1)
            for player in (self.generator, self.discriminator)
        ]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize(
    "style",
    ["toggled, steps later", "toggle_model", "closure", "steps", "toggled too late"],
)
def test_every_player_gets_the_gradient_of_its_own_loss(
    style: str, scale: float
) -> None:
    found = collected(Adversaries(style), scale=scale)
    assert found.rows.shape == (COUNT, 4 * 64 + 64 + 64 + 1)
    torch.testing.assert_close(found.rows, found.expected, rtol=1e-5, atol=1e-8)
    assert bool((found.rows[:, -65:-1].abs().sum(dim=1) > 0).all())
    assert found.losses == pytest.approx(found.measured)


def test_losses_of_nobody_are_refused() -> None:
    with pytest.raises(PruningError, match=r"manual_backward 2 times .*loss_method="):
        collected(Adversaries("silent"))


class Joint(Adversaries):
    """One loss that two optimizers share, with a step every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.generator_loss(batch))
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()

    def gradients(self, batch: Any) -> list[Tensor]:
        return list(
            torch.autograd.grad(self.generator_loss(batch), list(self.parameters()))
        )


def test_a_single_loss_trains_everything() -> None:
    found = collected(Joint(""))
    torch.testing.assert_close(found.rows, found.expected, rtol=1e-5, atol=1e-8)


def test_a_step_that_fails_while_toggled_leaves_nothing_toggled() -> None:
    class Failing(Adversaries):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.toggle_optimizer(self.optimizers()[0])
            raise LookupError("nothing there")

    module = Failing("")
    with pytest.raises(LookupError):
        collected(module)
    assert all(p.requires_grad for p in module.parameters())
    assert module._param_requires_grad_state == {}
    assert "toggle_optimizer" not in vars(module)


# ---------------------------------------------------------------- schedulers


class Scheduled(Classifier):
    """Reads its scheduler in the training step."""

    def __init__(self, automatic: bool, plateau: bool) -> None:
        super().__init__(optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        self.automatic_optimization = automatic
        self.plateau = plateau
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scheduler = self.lr_schedulers()
        self.rates += scheduler.get_last_lr()
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        assert isinstance(optimizer, torch.optim.SGD)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.detach())
        else:
            scheduler.step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.plateau:
            scheduler: Any = ReduceLROnPlateau(optimizer, patience=0, mode="max")
        else:
            scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        return [optimizer], [scheduler]


@pytest.mark.parametrize(
    ("automatic", "plateau"), [(True, False), (False, False), (False, True)]
)
def test_schedulers_are_read_but_not_stepped(automatic: bool, plateau: bool) -> None:
    module = Scheduled(automatic, plateau)
    rows = Rows(("net.5.weight",))
    trainer(rows, max_epochs=1, limit_train_batches=2).fit(module, loader())
    # Five gradients and five measurements read, then two batches train.
    assert module.rates[:11] == [0.5] * 11
    if not plateau:
        assert module.rates[11:] == ([0.5] if automatic else [0.25])


# ---------------------------------------------------------------- gradients inside


class Penalised(Classifier):
    """Adds the norm of the gradient by the pixels."""

    def penalised(self, batch: Any) -> Tensor:
        pixels = batch[0].clone().requires_grad_()
        loss = self.loss((pixels, batch[1]))
        (slope,) = torch.autograd.grad(loss, pixels, create_graph=True)
        return loss + slope.square().sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.penalised(batch)

    def gradients(self, batch: Any) -> list[Tensor]:
        names = dict(self.named_parameters())
        weight = names["net.5.weight"]
        return list(torch.autograd.grad(self.penalised(batch), [weight]))


def test_a_loss_that_differentiates_inside() -> None:
    found = collected(Penalised(), names=("net.5.weight",))
    torch.testing.assert_close(found.rows, found.expected)
    assert found.losses == found.measured
    assert len(set(found.losses)) == COUNT
    pruner = pruning()
    trainer(pruner).fit(Penalised(), loader())
    assert pruner.reports[0].measured_increase is not None


# ---------------------------------------------------------------- where samples come from


class Numbered(Dataset[Any]):
    """Images that know their number."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        return (*images()[index], index)


class Noting(Classifier):
    """Notes the numbers of the samples of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch[2].tolist())
        return super().training_step(batch[:2], batch_idx)


class EveryThird(Sampler[int]):
    """A sampler that does not tell what it draws."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, 48, 3))

    def __len__(self) -> int:
        return 16


def seen_with(sampler: Any, **options: Any) -> set[int]:
    """Numbers of the samples that gradients were taken of."""
    module = Noting()
    data = DataLoader(Numbered(), batch_size=8, sampler=sampler)
    rows = Rows(("net.5.weight",))
    options = {"max_epochs": 1, "limit_train_batches": 1, **options}
    trainer(rows, **options).fit(module, data)
    assert len(module.seen) == 2 * COUNT + 1
    return {number for batch in module.seen[:-1] for number in batch}


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: SubsetRandomSampler(range(20, 40)),
        lambda: SubsetRandomSampler(torch.arange(20, 40)),
        lambda: WeightedRandomSampler([0.0] * 20 + [0.1] * 20 + [0.0] * 8, 20),
        lambda: DistributedSamplerWrapper(
            SubsetRandomSampler(range(20, 40)), num_replicas=1, rank=0
        ),
    ],
    ids=["range", "tensor", "weights", "wrapped by Lightning"],
)
def test_samples_outside_the_sampler_are_left_alone(
    sampler: Callable[[], Any],
) -> None:
    found = seen_with(sampler())
    assert len(found) == COUNT * SIZE
    assert found <= set(range(20, 40))


def test_a_sampler_that_tells_nothing_gets_a_warning() -> None:
    with pytest.warns(UserWarning, match="EveryThird has no attribute `indices`"):
        found = seen_with(EveryThird())
    assert len(found) == COUNT * SIZE


def test_a_generator_is_measured_on_the_batches_of_the_gradients() -> None:
    taken: list[tuple[float, ...]] = []

    class Taking(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            taken.append(tuple(batch[1].tolist()))
            return super().training_step(batch, batch_idx)

    def stream() -> Iterator[Any]:
        for start in range(0, 48, 4):
            yield images()[start : start + 4]

    given = stream()
    pruner = pruning(dataloader=given, schedule=OneShotSchedule(epoch=1))
    trainer(pruner).fit(Taking(), loader())
    expected = [tuple(images()[i : i + 4][1].tolist()) for i in range(0, 24, 4)]
    assert taken[6:18] == expected * 2
    # Six batches are left: the plan at the start has not read any.
    assert len(list(given)) == 6


# ---------------------------------------------------------------- failures


def test_weights_that_are_frozen_meanwhile_are_named() -> None:
    class Freeze(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
            module.net[5].requires_grad_(False)

    with pytest.raises(PruningError, match=r"frozen .*: net\.5\.weight; .*exclude"):
        trainer(Freeze(), pruning()).fit(Classifier(), loader())


def test_a_loss_that_breaks_down_by_pruning_undoes_the_step() -> None:
    class Fragile(Counting):
        """Divides by its smallest weight."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            smallest = self.net[7].weight.detach().abs().min()
            return super().training_step(batch, batch_idx) / smallest

    for criterion in ("magnitude", "woodfisher"):
        pruner, module = pruning(criterion=criterion), Fragile()
        with pytest.raises(PruningError, match=r"loss of gradient 0 \(samples .* inf"):
            trainer(pruner).fit(module, loader())
        assert pruner.masks.sparsity() == 0.0
        assert all(bool((p != 0).any()) for p in module.net[7].parameters())
        assert bool((module.net[7].weight != 0).all())


# ---------------------------------------------------------------- several ranks


class Gathering(Classifier):
    """Talks to the other ranks in its training step.

    Args:
        how: by a metric that synchronises at each step, or by ``all_gather``.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.accuracy = torchmetrics.Accuracy(
            "multiclass", num_classes=CLASSES, dist_sync_on_step=True
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.how == "metric":
            self.accuracy(self.net(batch[0]).detach(), batch[1])
            self.accuracy.compute()
        else:
            self.all_gather(loss.detach())
        return loss


def talk() -> dict[str, Any]:
    """Job: fits whose training steps talk, with an odd number of gradients."""
    results: dict[str, Any] = {}
    for how in ("metric", "all_gather"):
        module = Gathering(how)
        pruner = pruning(fisher=FISHER)
        fitted = trainer(pruner, devices=2, strategy="ddp", max_epochs=1)
        try:
            fitted.fit(module, loader())
            results[how] = pruner.reports[0].zeros
        except PruningError as error:
            results[how] = str(error)
        results[f"{how} synchronises"] = (
            module.accuracy.dist_sync_on_step and module.accuracy.sync_on_compute
        )
    return results


FISHER = FisherConfig(num_gradients=5, gradient_batch_size=2, block_size=16)


def test_steps_that_talk_to_other_ranks_do_not_hang(ranks: RankPool) -> None:
    for result in ranks.run(2, talk, launch="trainer", timeout=60):
        assert result["metric"] == round(0.75 * (3 * 9 + 108 * 12 + 12 * CLASSES))
        assert "calls all_gather" in result["all_gather"]
        assert "loss_method=" in result["all_gather"]
        assert result["metric synchronises"]
        assert result["all_gather synchronises"]


def test_all_gather_of_one_rank_gives_what_it_gets() -> None:
    pruner = pruning(fisher=FISHER)
    trainer(pruner, max_epochs=1).fit(Gathering("all_gather"), loader())
    assert len(pruner.reports) == 1
