"""Masks and weights of one map against dense least squares in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_woodfisher.layerwise.rows import RowShare
from lightning_woodfisher.layerwise.selection import MaskRule
from lightning_woodfisher.layerwise.solver import Curvature, LayerProblem, Moments
from lightning_woodfisher.weights.patterns import Pattern, parse_pattern


def make_moments(
    groups: int = 1, outputs: int = 3, inputs: int = 6, samples: int = 50
) -> tuple[Moments, Tensor, Tensor, Tensor]:
    """Return moments, and the x ``[g, n, d]``, y ``[g, n, o]`` and dense weights."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, samples, inputs, generator=generator, dtype=torch.float64)
    x = x @ mix + 1.5
    dense = torch.randn(
        groups, outputs, inputs, generator=generator, dtype=torch.float64
    )
    noise = torch.randn(
        groups, samples, outputs, generator=generator, dtype=torch.float64
    )
    y = x @ dense.mT + 0.3 * noise - 0.7
    xc, yc = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    moments = Moments(
        xc.mT @ xc / samples,
        yc.mT @ xc / samples,
        yc.square().mean(1),
        x.mean(1),
        y.mean(1),
    )
    return moments, x, y, dense


def make_rule(
    count: int, shape: tuple[int, ...], text: str = "unstructured"
) -> MaskRule:
    pattern = parse_pattern(text)
    numel = int(torch.tensor(shape).prod())
    numbers = torch.arange(numel)
    places = numbers[:, None]
    if pattern.is_grouped:
        places = pattern.grouped(numbers.view(shape[-2], shape[-1]))
    leaving = places.shape[1] - pattern.kept
    return MaskRule(
        places, pattern, torch.zeros(numel, dtype=torch.bool), count // leaving
    )


def share_of(dense: Tensor) -> RowShare:
    return RowShare(*dense.shape[:2], torch.device("cpu"))


def make_problem(
    moments: Moments, dense: Tensor, relative_damping: float
) -> tuple[LayerProblem, Curvature]:
    curvature = Curvature(moments.inputs, relative_damping)
    ones = torch.ones(dense.shape[:2], dtype=torch.float64)
    rows = share_of(dense)
    problem = LayerProblem(
        curvature, moments.products, dense, ones, rows, torch.float64
    )
    return problem, curvature


def solve_row_by_row(
    x: Tensor, y: Tensor, dense: Tensor, removed: Tensor, damping: float
) -> Tensor:
    """Least squares of each output on its kept inputs, with λ‖w − w_d‖² as further rows."""
    weights = torch.zeros_like(dense)
    xc, yc = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    for g, o in itertools.product(range(dense.shape[0]), range(dense.shape[1])):
        kept = ~removed[g, o]
        number = int(kept.sum())
        scale = (damping * x.shape[1]) ** 0.5
        rows = torch.cat(
            [xc[g][:, kept], scale * torch.eye(number, dtype=torch.float64)]
        )
        right = torch.cat([yc[g][:, o], scale * dense[g, o, kept]])
        weights[g, o, kept] = torch.linalg.lstsq(rows, right).solution
    return weights


def error(
    x: Tensor, y: Tensor, weights: Tensor, dense: Tensor, damping: float
) -> float:
    gap = y - x @ weights.mT
    gap = gap - gap.mean(1, keepdim=True)
    return float(
        gap.square().mean(1).sum() + damping * (weights - dense).square().sum()
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("relative_damping", [1e-4, 0.1])
def test_kept_weights_are_the_least_squares_solution(
    groups: int, relative_damping: float
) -> None:
    moments, x, y, dense = make_moments(groups)
    problem, curvature = make_problem(moments, dense, relative_damping)
    generator = torch.Generator().manual_seed(1)
    removed = torch.rand(dense.shape, generator=generator) < 0.5
    found = problem.solve(removed, steps=60)
    expected = solve_row_by_row(x, y, dense, removed, float(curvature.damping))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert (found[removed] == 0).all()


def test_errors_and_bias_are_those_of_the_samples() -> None:
    moments, x, y, dense = make_moments()
    bias = moments.bias(dense)
    gap = y - x @ dense.mT - bias.unsqueeze(1)
    torch.testing.assert_close(
        moments.errors(dense, share_of(dense)), gap.square().mean(1)
    )
    # The bias is the best one: the mean error of each output is zero.
    torch.testing.assert_close(gap.mean(1), torch.zeros_like(bias), atol=1e-12, rtol=0)


def test_large_damping_keeps_the_dense_weights() -> None:
    moments, _, _, dense = make_moments()
    problem, _ = make_problem(moments, dense, 1e10)
    nothing = torch.zeros_like(dense, dtype=torch.bool)
    torch.testing.assert_close(problem.solve(nothing), dense, rtol=1e-6, atol=1e-8)


def test_inputs_that_are_always_zero_keep_the_dense_weights() -> None:
    moments, _, _, dense = make_moments()
    zeros = torch.zeros_like
    silent = Moments(
        zeros(moments.inputs),
        zeros(moments.products),
        moments.targets,
        zeros(moments.input_means),
        moments.target_means,
    )
    problem, _ = make_problem(silent, dense, 0.1)
    nothing = torch.zeros_like(dense, dtype=torch.bool)
    torch.testing.assert_close(problem.solve(nothing), dense)


@pytest.mark.parametrize("count", [4, 9, 12])
def test_admm_is_close_to_the_best_mask_of_all(count: int) -> None:
    moments, x, y, dense = make_moments(outputs=2, inputs=6, samples=40)
    problem, curvature = make_problem(moments, dense, 1e-2)
    damping = float(curvature.damping)
    numel = dense.numel()

    def cost(removed: Tensor) -> float:
        weights = solve_row_by_row(x, y, dense, removed, damping)
        return error(x, y, weights, dense, damping)

    best = min(
        cost(
            torch.zeros(numel, dtype=torch.bool)
            .index_fill(0, torch.tensor(s), True)
            .view(dense.shape)
        )
        for s in itertools.combinations(range(numel), count)
    )
    rule = make_rule(count, tuple(dense.shape))
    removed, iterations = problem.find_mask(rule, 60)
    by_size, _ = problem.find_mask(rule, 0)
    assert int(removed.sum()) == int(by_size.sum()) == count
    assert iterations > 0
    nothing = error(x, y, torch.zeros_like(dense), dense, damping)
    assert best <= cost(removed) * (1 + 1e-9)
    assert cost(removed) - best <= 0.1 * (nothing - best)


def test_outputs_of_larger_weight_keep_more() -> None:
    moments, _, _, dense = make_moments(outputs=2)
    curvature = Curvature(moments.inputs, 0.1)
    rule = make_rule(6, tuple(dense.shape))
    kept = []
    for weight in (1e-4, 1.0, 1e4):
        rows = torch.tensor([[weight, 1.0]], dtype=torch.float64)
        problem = LayerProblem(
            curvature, moments.products, dense, rows, share_of(dense), torch.float64
        )
        removed, _ = problem.find_mask(rule, 30)
        kept.append(int((~removed[0, 0]).sum()))
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] == 6


@pytest.mark.parametrize(("text", "size"), [("2:4", 4), ("block4", 4), ("rows", 8)])
def test_masks_have_the_pattern(text: str, size: int) -> None:
    moments, _, _, dense = make_moments(outputs=6, inputs=8)
    problem, _ = make_problem(moments, dense, 0.1)
    removed, _ = problem.find_mask(make_rule(24, tuple(dense.shape), text), 30)
    assert int(removed.sum()) == 24
    in_groups = removed.view(-1, size).sum(1)
    wanted = {2} if text == "2:4" else {0, size}
    assert set(in_groups.tolist()) == wanted


def test_pruned_weights_are_chosen_first_and_ties_by_position() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    pruned = torch.tensor([True, False, False, False, False])
    rule = MaskRule(torch.arange(5)[:, None], Pattern(), pruned, 3)
    assert rule(scores).tolist() == [True, True, False, False, True]
    nothing = MaskRule(torch.arange(5)[:, None], Pattern(), ~pruned & pruned, 0)
    assert not nothing(scores).any()
