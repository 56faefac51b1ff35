"""One structured step after the other on plain models."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
from hand_groups import cross_entropy, images, make_residual, residual_groups
from torch import Tensor, nn

from lightning_woodfisher import (
    ConfigurationError,
    PruningError,
    StructureConfig,
    prune_structures,
)
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.structured.graph.groups import add_prefix, zero_structures
from lightning_woodfisher.structured.selection import select_count, select_for_size
from lightning_woodfisher.structured.shrink.removal import shrink


def settings(**options: Any) -> StructureConfig:
    return StructureConfig(**{"num_samples": 16, "batch_size": 8, **options})


def prune(model: nn.Module, target: float, **options: Any) -> Any:
    config = settings(**{"measure": "structures", **options.pop("config", {})})
    options = {"config": config, "groups": residual_groups(), **options}
    return prune_structures(model, images(), cross_entropy, target=target, **options)


def test_a_plain_model_is_masked_and_shrunk() -> None:
    model, pixels = make_residual().eval(), images(8).tensors[0]
    dense = sum(p.numel() for p in model.parameters())
    options = {"groups": None, "example_inputs": pixels[:1]}
    report, groups = prune(model, 0.3, config={"measure": "parameters"}, **options)
    assert {g.name for g in groups} == {"stem", "conv1"}
    found = zero_structures(model, groups)
    assert {n: tuple(s.tolist()) for n, s in found.items()} == report.removed
    masked = model(pixels)
    smaller = copy.deepcopy(model)
    shrink(smaller, groups, report.removed)
    torch.testing.assert_close(smaller(pixels), masked, rtol=0, atol=1e-12)
    left = sum(p.numel() for p in smaller.parameters())
    assert left == report.parameters <= 0.7 * dense
    assert report.loss_before != report.loss_after
    losses = cross_entropy(model, images()[:]).detach()
    assert report.loss_after == pytest.approx(float(losses), rel=0.5)


@pytest.mark.parametrize("method", ["sosp_i", "sosp_h", "hap"])
def test_later_steps_only_take_more(method: str) -> None:
    model, last = make_residual(), set()
    for target, count in ((0.2, 2), (0.4, 4), (0.5, 4), (0.3, 4)):
        config = {"method": method, "probes": 10, "seed": count}
        report, _ = prune(model, target, config=config)
        gone = {(n, s) for n, those in report.removed.items() for s in those}
        assert len(gone) == count
        assert last <= gone
        last = gone


def test_greedy_goes_on_from_what_is_gone() -> None:
    """The second step is the best addition to the first, not a new beginning."""
    model = make_residual()
    config = {"method": "sosp_i", "labels": "true"}
    first, groups = prune(model, 0.25, config=config)
    second, _ = prune(model, 0.35, config=config)
    (new,) = {(n, s) for n, those in second.removed.items() for s in those} - {
        (n, s) for n, those in first.removed.items() for s in those
    }
    # By hand: rows of all samples from per-sample gradients, 16 samples of the step.
    from lightning_woodfisher.data.isolation import derive_seed
    from lightning_woodfisher.data.losses import FunctionLoss
    from lightning_woodfisher.distributed.communicator import Communicator
    from lightning_woodfisher.structured.scores.methods import score_structures

    replay = make_residual()
    prune(replay, 0.25, config=config)
    seed = derive_seed(0, 0) % 2**62
    source = FunctionLoss(replay, images(), cross_entropy)
    scores = score_structures(
        source, groups, settings(seed=seed, **config), Communicator()
    )
    alone = torch.split(scores.pairs.diagonal(), [g.size for g in groups])
    costs = {
        (g.name, s): float(alone[place][s])
        for place, g in enumerate(groups)
        for s in range(g.size)
        if s not in first.removed.get(g.name, ())
        and g.size - len(first.removed.get(g.name, ())) > 2
    }
    # What is gone has rows of zeros, so that a structure adds what it costs alone.
    assert new == min(costs, key=costs.get)  # type: ignore[arg-type]


def test_multiples_and_what_is_gone() -> None:
    groups = residual_groups(8, 10)
    scores = [torch.arange(8.0), torch.arange(10.0) + 1]
    limits = StructureConfig(round_to=4)

    def count(wanted: int, **options: Any) -> list[list[int]]:
        removed = select_count(groups, scores, wanted, limits, **options)
        return [removed[g.name].tolist() for g in groups]

    # The second group keeps 8 or 4 of 10, the first 4 of 8.
    assert count(4) == [[0, 1, 2, 3], []]
    assert count(5) == [[0, 1, 2, 3], [0, 1]]
    assert count(3) == [[0, 1, 2, 3], []]
    assert count(1) == [[], [0, 1]]
    gone = {"conv1": [8, 9]}
    # Without what is gone, four of the first group would be the only way to four.
    assert count(6, removed_before=gone) == [[0, 1, 2, 3], [8, 9]]
    assert count(4, removed_before=gone) == [[0, 1, 2, 3], [8, 9]]
    assert count(1, removed_before=gone) == [[], [8, 9]]
    with pytest.raises(ConfigurationError, match="limits of the groups allow 10"):
        count(11)


def test_tighter_limits_bring_nothing_back() -> None:
    groups = residual_groups(8, 10)
    scores = [torch.zeros(8), torch.ones(10)]
    earlier = {"stem": [1, 2, 3, 4, 5]}
    config = StructureConfig(max_ratio=0.5)
    removed = select_count(groups, scores, 7, config, earlier)
    assert removed["stem"].tolist() == [1, 2, 3, 4, 5]
    assert removed["conv1"].tolist() == [0, 1]


def test_a_target_that_is_met_takes_nothing_more() -> None:
    model = make_residual()
    first, groups = prune(model, 0.4, config={"measure": "macs"})
    again, _ = prune(model, 0.1, config={"measure": "macs", "seed": 7})
    assert again.removed == first.removed
    assert [g.removed_before for g in again.groups] == [
        len(g.removed) for g in first.groups
    ]


def test_a_layer_of_zeros_keeps_a_channel() -> None:
    model, pixels = make_residual().eval(), images(8).tensors[0]
    for tensor in (*model.conv1.parameters(), *model.bn1.parameters()):
        nn.init.zeros_(tensor)
    report, groups = prune(model, 0.4)
    assert [group.removed_before for group in report.groups] == [0, 0]
    # Its scores are zero, so all go that may.
    assert len(report.removed["conv1"]) == 3
    smaller = copy.deepcopy(model)
    shrink(smaller, groups, report.removed)
    torch.testing.assert_close(smaller(pixels), model(pixels), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["diagonal", "sosp_i", "sosp_h", "hap"])
def test_zeros_cannot_be_ranked(method: str) -> None:
    model = make_residual()
    nn.init.zeros_(model.fc.weight)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(PruningError, match=f"'{method}' computed zero .*; train first"):
        prune(model, 0.3, config={"method": method, "probes": 4})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_cannot_work_is_refused() -> None:
    model = make_residual()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = [tuple(images().tensors)]
    for data, options, message in (
        (images(), {}, "pass example_inputs, or groups"),
        (iter(batches), {"groups": residual_groups()}, "read only once"),
        (
            batches,
            {"groups": residual_groups()},
            "batch_size=8 is more than the 1 batches that the data has; lower num_samples",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            prune_structures(
                model, data, cross_entropy, target=0.5, config=settings(), **options
            )
    for count, message in ((-1, "must be at least 0"), (1.5, "not a whole number")):
        with pytest.raises(ConfigurationError, match=message):
            settings(batchnorm_recalibration_batches=count)
    with pytest.raises(ConfigurationError, match="min_kept=0 .* has no output"):
        settings(min_kept=0)
    for target, options, message in (
        (0.9, {}, "for 8 of 9 structures .* allow 5; lower the target, min_kept or"),
        (0.9, {"measure": "macs"}, "0.9 of the macs cannot be reached: with all 5 "),
        (0.1, {"round_to": 64}, "allow 0; lower the target, round_to, min_kept or"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            prune(model, target, config=options)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def failing(model: Any, batch: Any) -> Tensor:
    loss = cross_entropy(model, batch)
    return loss / (0.0 if bool((model.bn1.weight == 0).any()) else 1.0)


def failing_to_recalibrate(model: Any, batch: Any) -> Tensor:
    if len(batch[0]) == 64 and bool((model.bn1.weight == 0).any()):
        return cross_entropy(model, [batch[0] * torch.inf, batch[1]])
    return cross_entropy(model, batch)


@pytest.mark.parametrize(
    ("loss", "count", "message"),
    [
        (failing, 0, "inf"),
        # Here the new statistics are in the model when the loss is measured.
        (failing, 2, "inf"),
        (failing_to_recalibrate, 2, "statistic of the pruned network is not finite"),
    ],
)
def test_a_loss_that_breaks_after_the_masks_leaves_the_model(
    loss: Any, count: int, message: str
) -> None:
    model = make_residual()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(Exception, match=message):
        prune_structures(
            model,
            images(),
            loss,
            target=0.6,
            config=settings(
                min_kept=1, measure="structures", batchnorm_recalibration_batches=count
            ),
            groups=residual_groups(),
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def batch_statistics(model: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    """Means over batches of mean and unbiased variance, by a plain loop."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():

        def note(_: nn.Module, args: Any, name: str = name) -> None:
            values = args[0].detach().movedim(1, 0).flatten(1)
            pair = values.mean(1), values.var(1)
            seen.setdefault(name, []).append(pair)

        norm.register_forward_pre_hook(note)
    model.train()
    for pixels in batches:
        model(pixels)
    return {
        name: tuple(sum(values) / len(batches) for values in zip(*pairs, strict=True))
        for name, pairs in seen.items()
    }


@pytest.mark.parametrize(("batch_size", "size"), [(8, 64), (70, 70)])
def test_statistics_are_those_of_the_network_without_the_channels(
    batch_size: int, size: int
) -> None:
    model, data = make_residual(), images(150)
    smaller = copy.deepcopy(model)
    config = settings(
        batch_size=batch_size,
        measure="structures",
        search="greedy",
        batchnorm_recalibration_batches=3,
    )
    report, groups = prune_structures(
        model, data, cross_entropy, target=0.4, config=config, groups=residual_groups()
    )
    assert sorted(map(len, report.removed.values())) == [2, 2]
    assert report.batchnorm_layers == 3
    assert report.seconds["recalibrate"] > 0
    shrink(smaller, groups, report.removed)
    chosen = FunctionLoss(model, data, cross_entropy).batches(
        3, size, derive_seed(0, 0, "batchnorm"), True
    )
    batches = [chosen.fetch(index)[0] for index in range(3)]
    assert {len(pixels) for pixels in batches} == {size}
    expected = batch_statistics(smaller, batches)
    for name, group in (("bn", "stem"), ("bn1", "conv1"), ("bn2", "stem")):
        norm: Any = model.get_submodule(name)
        gone = torch.zeros(norm.num_features, dtype=torch.bool)
        gone[list(report.removed[group])] = True
        for mine, theirs in zip(
            (norm.running_mean, norm.running_var), expected[name], strict=True
        ):
            # Batches are added in float64, of numbers in float32.
            torch.testing.assert_close(mine[~gone], theirs, rtol=1e-6, atol=1e-7)
            assert bool((mine[gone] == 0).all())
        assert norm.num_batches_tracked == 0
    # The loss of the report is that of the network with these statistics.
    model.eval()
    sample = FunctionLoss(model, data, cross_entropy).batches(
        config.num_batches, 16 // config.num_batches, derive_seed(0, 0)
    )
    losses = [
        float(cross_entropy(model, sample.fetch(index)).detach())
        for index in range(config.num_batches)
    ]
    assert report.loss_after == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_only_recalibration_changes_the_statistics() -> None:
    dense, plain, anew = make_residual(), make_residual(), make_residual()
    first, _ = prune(plain, 0.4)
    second, _ = prune(anew, 0.4, config={"batchnorm_recalibration_batches": 2})
    assert first.batchnorm_layers == 0
    assert "recalibrate" not in first.seconds
    assert first.removed == second.removed
    for name, tensor in plain.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, dense.state_dict()[name])
            assert not torch.equal(tensor, anew.state_dict()[name])
        else:
            assert torch.equal(tensor, anew.state_dict()[name])


def test_sizes_keep_what_is_gone() -> None:
    """Of the size target the choice contains the earlier one, whatever its scores."""
    from lightning_woodfisher.data.losses import FunctionLoss
    from lightning_woodfisher.distributed.communicator import Communicator
    from lightning_woodfisher.structured.network_cost import NetworkSize

    model, groups = make_residual(), residual_groups()
    data = torch.utils.data.DataLoader(images(), 8)
    source = FunctionLoss(model, data, cross_entropy)
    size = NetworkSize(source, groups, Communicator())
    scores = [torch.arange(4.0), torch.arange(5.0) - 10]
    earlier = {"stem": [3]}
    removed = select_for_size(groups, scores, size, 0.5, removed_before=earlier)
    assert 3 in removed["stem"].tolist()
    assert size.macs(removed) <= 0.5 * size.dense_macs


def test_few_probes_are_reported() -> None:
    config = {"method": "hap", "probes": 4, "seed": 1}
    with pytest.warns(UserWarning, match=r"HAP's 4 probes .* probes would settle it"):
        report, _ = prune(make_residual(), 0.3, config=config)
    assert report.notes["probe_agreement"] < 0.9
    assert "NaN" not in json.dumps(report.to_dict())


def test_a_cost_needs_a_target_that_costs() -> None:
    with pytest.raises(ConfigurationError, match="measure='macs' or 'parameters'"):
        settings(per_cost=True, measure="structures")


class Detector(nn.Module):
    """Returns losses in training mode, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_residual()

    def forward(self, images: Tensor, labels: Tensor) -> Any:
        outputs = self.net(images)
        if self.training:
            return {"loss": nn.functional.cross_entropy(outputs, labels)}
        return [{"label": output.argmax()} for output in outputs]


def prune_detector(loss: Any) -> Any:
    model = Detector()
    groups = add_prefix(residual_groups(), "net")
    return prune_structures(
        model,
        images(),
        loss,
        target=0.3,
        config=settings(method="sosp_h"),
        groups=groups,
    )


def test_a_loss_that_needs_batchnorm_in_training_mode_is_refused() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        assert model.net.bn1.training
        return model(*batch)["loss"]

    with pytest.raises(ConfigurationError, match="with BatchNorm and dropout in eval"):
        prune_detector(loss)


def test_training_mode_is_allowed_where_it_changes_no_layer() -> None:
    def loss(model: Any, batch: Any, mode: bool = False) -> Tensor:
        model.training = True
        model.net.bn1.train(mode)
        return model(*batch)["loss"]

    report, _ = prune_detector(loss)
    assert report.removed
    # By itself, too, where the loss needs it.
    found, _ = prune_detector(lambda model, batch: model(*batch)["loss"])
    assert found.removed == report.removed
    message = "the BatchNorm2d 'net.bn1' is in training mode"
    with pytest.raises(ConfigurationError, match=message):
        prune_detector(functools.partial(loss, mode=True))
