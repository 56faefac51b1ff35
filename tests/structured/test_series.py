"""Layers in series count once: scores against the loss without the channel."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.config import (
    ScoringMethod,
    StructureConfig,
    StructureKind,
)
from lightning_woodfisher.structured.graph.groups import channel_masks
from lightning_woodfisher.structured.scores.evaluation import Evaluation
from lightning_woodfisher.structured.scores.gates import Gates
from lightning_woodfisher.structured.scores.methods import score_structures
from lightning_woodfisher.structured.scores.series import keep_ends_of_series
from lightning_woodfisher.structured.tracing import trace_groups

HIDDEN = 6


class Separable(nn.Module):
    """A 1×1 convolution, a depthwise one and a linear head."""

    def __init__(self, skips: bool = False, last_norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand = nn.Conv2d(3, HIDDEN, 1, bias=False)
        self.first = nn.BatchNorm2d(HIDDEN)
        self.depthwise = nn.Conv2d(HIDDEN, HIDDEN, 3, 1, 1, groups=HIDDEN, bias=False)
        self.last = nn.BatchNorm2d(HIDDEN) if last_norm else nn.Identity()
        self.head = nn.Linear(HIDDEN, 2)
        self.skips = skips
        for norm in (self.first, self.last):
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.bias, 0.5, 1.5)
                nn.init.normal_(norm.running_mean)
        self.double().eval()

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.first(self.expand(images)))
        found = self.last(self.depthwise(hidden))
        if self.skips:
            found = found + hidden
        return self.head(F.relu(found).mean((2, 3)))


def mean_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def evaluate(model: nn.Module, kind: StructureKind) -> tuple[Evaluation, list[Tensor]]:
    torch.manual_seed(1)
    batch = [torch.randn(8, 3, 5, 5).double(), torch.randn(8, 2).double()]
    groups = trace_groups(model, batch[0][:1]).groups
    source = FunctionLoss(model, TensorDataset(*batch), mean_loss)
    config = StructureConfig(num_samples=8, batch_size=8, structure=kind)
    return Evaluation(source, groups, config, Communicator()), batch


def scored(evaluation: Evaluation) -> set[str]:
    with evaluation.session():
        keep_ends_of_series(evaluation)
    return {one.module for one in evaluation.vectors.slices}


@pytest.mark.parametrize(("kind", "layer"), [("conv", "depthwise"), ("bn", "last")])
def test_two_derivatives_give_the_loss_without_a_channel(
    kind: StructureKind, layer: str
) -> None:
    """Behind the gates the loss is quadratic, so the second order is exact."""
    model = Separable()
    if kind == "conv":
        # Filters of zero before this norm would leave its constant.
        model.last = nn.Identity()
    evaluation, batch = evaluate(model, kind)
    assert scored(evaluation) == {layer}
    whole = mean_loss(model, batch).item()
    (group,) = trace_groups(model, batch[0][:1]).groups
    expected = []
    for number in range(HIDDEN):
        saved = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for name, mask in channel_masks(
                model, [group], {group.name: [number]}
            ).items():
                model.get_parameter(name).masked_fill_(mask, 0.0)
            expected.append(mean_loss(model, batch).item() - whole)
            for name, weight in saved.items():
                model.get_parameter(name).copy_(weight)
    gates = Gates(evaluation.vectors)
    with evaluation.session(), gates.attached():
        value = gates.run(lambda: mean_loss(model, batch))
        slope = gates.derivatives(value, create_graph=True)[0]
        curvature = torch.stack(
            [
                gates.derivatives(one, retain_graph=True)[0, number]
                for number, one in enumerate(slope)
            ]
        )
    found = 0.5 * curvature - slope.detach()
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_a_layer_that_reaches_the_loss_on_another_path_counts() -> None:
    assert scored(evaluate(Separable(skips=True), "conv")[0]) == {"expand", "depthwise"}
    assert scored(evaluate(Separable(skips=True), "bn")[0]) == {"first", "last"}


def test_a_structure_whose_series_ends_without_a_norm_is_scored_before_it() -> None:
    assert scored(evaluate(Separable(last_norm=False), "bn")[0]) == {"first"}


def test_filters_and_norms_of_the_same_layer_both_count() -> None:
    """The vector of this kind has both by definition."""
    assert scored(evaluate(Separable(), "conv+bn")[0]) == {"depthwise", "last"}


@pytest.mark.parametrize("method", ["diagonal", "sosp_h"])
def test_scores_leave_out_the_layers_before(method: ScoringMethod) -> None:
    model = Separable()
    evaluation, batch = evaluate(model, "bn")
    groups = trace_groups(model, batch[0][:1]).groups
    config = dataclasses.replace(evaluation.config, method=method, labels="true")
    (found,) = score_structures(evaluation.source, groups, config).values
    outputs: list[Tensor] = []
    model.last.register_forward_hook(lambda *call: outputs.append(call[2]))
    predicted = model(batch[0])
    losses = (predicted - batch[1]).square().mean(dim=1)
    (slopes,) = torch.autograd.grad(losses.sum(), outputs, retain_graph=True)
    rows = (slopes * outputs[0]).sum((2, 3)).detach()
    if method == "diagonal":
        expected = 0.5 * rows.square().mean(dim=0) + rows.mean(dim=0).abs()
    else:
        # The loss is a mean of squares, and linear in the pooled channels.
        pooled = F.relu(outputs[0]).mean((2, 3))
        share = pooled[:, None, :] * model.head.weight
        curvature = (share * share.sum(dim=2, keepdim=True)).mean(dim=(0, 1)) * 2
        expected = rows.mean(dim=0).abs() + 0.5 * curvature.abs()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=0)
