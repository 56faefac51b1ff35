"""Which tensors are selected by default, by class path and by regular expression."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.weights.layers import prunable_parameters


class Scaled(nn.Linear):
    """A user's own linear layer."""


class Network(nn.Module):
    """One layer of each kind that has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv1 = nn.Conv1d(2, 3, 3)
        self.conv2 = nn.Conv2d(2, 3, 3)
        self.up = nn.ConvTranspose2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.layer_norm = nn.LayerNorm([3, 4])
        self.fc = nn.Linear(4, 3)
        self.own = Scaled(3, 3)
        self.lstm = nn.LSTM(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.mix = nn.Bilinear(2, 2, 2)
        self.free = nn.Parameter(torch.ones(3, 3))


LINEAR = ["fc.weight", "own.weight", "attention.out_proj.weight"]
CONVOLUTION = ["conv1.weight", "conv2.weight", "up.weight"]
LSTM = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]


def names(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None
) -> list[str]:
    return list(prunable_parameters(model, include or [], exclude or []))


def test_default_is_the_weights_of_linear_and_convolution() -> None:
    assert sorted(names(Network())) == sorted(LINEAR + CONVOLUTION)


def test_result_holds_the_parameters_in_the_order_of_the_model() -> None:
    model = Network()
    found = prunable_parameters(model)
    order = [name for name, _ in model.named_parameters() if name in found]
    everything = dict(model.named_parameters())
    assert list(found) == order
    assert all(found[name] is everything[name] for name in found)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("torch.nn.Linear", LINEAR),
        ("Linear", LINEAR),
        ("torch.nn.modules.linear.Linear", LINEAR),
        ("torch.nn.Conv2d", ["conv2.weight"]),
        ("torch.nn.ConvTranspose2d", ["up.weight"]),
        ("Scaled", ["own.weight"]),
        (f"{Scaled.__module__}.Scaled", ["own.weight"]),
        ("torch.nn.Embedding", ["embed.weight"]),
        ("torch.nn.LayerNorm", ["layer_norm.weight"]),
        ("torch.nn.LSTM", LSTM),
        ("torch.nn.MultiheadAttention", ["attention.in_proj_weight"]),
        ("torch.nn.Bilinear", ["mix.weight"]),
    ],
)
def test_class_paths(pattern: str, expected: list[str]) -> None:
    assert sorted(names(Network(), [pattern])) == sorted(expected)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"^conv\d", ["conv1.weight", "conv2.weight"]),
        (r"^free$", ["free"]),
        (r"weight_hh", ["lstm.weight_hh_l0"]),
        (r"attention", ["attention.in_proj_weight", "attention.out_proj.weight"]),
    ],
)
def test_regular_expressions(pattern: str, expected: list[str]) -> None:
    assert sorted(names(Network(), [pattern])) == sorted(expected)


def test_a_regular_expression_passes_over_norms_embeddings_and_biases() -> None:
    chosen = names(Network(), ["."])
    unwanted = {"embed.weight", "norm.weight", "layer_norm.weight", "layer_norm.bias"}
    assert not unwanted & set(chosen)
    assert not [name for name in chosen if name.endswith("bias")]
    assert {"free", "mix.weight", *LINEAR, *CONVOLUTION, *LSTM} <= set(chosen)


def test_exclude_wins_over_include() -> None:
    assert names(Network(), ["Linear"], ["^fc"]) == ["own.weight", LINEAR[2]]
    assert names(Network(), [], ["Linear", "ConvTranspose2d"]) == CONVOLUTION[:2]


def test_several_patterns_add_up() -> None:
    chosen = names(Network(), ["torch.nn.Embedding", "^free$"])
    assert sorted(chosen) == ["embed.weight", "free"]


def test_frozen_weights_are_left_alone() -> None:
    model = Network()
    model.fc.weight.requires_grad_(False)
    assert "fc.weight" not in names(model)
    with pytest.raises(ConfigurationError, match=r"'\^fc' matches no trainable weight"):
        names(model, ["^fc"])


def test_tied_weights_count_once_under_the_first_name() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    assert names(nn.Sequential(first, nn.ReLU(), second)) == ["0.weight"]


def test_views_of_one_storage_count_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = nn.Parameter(first.weight.detach())
    assert names(nn.Sequential(first, second)) == ["0.weight"]


def test_tied_embedding_is_selected_through_its_linear_use() -> None:
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    assert names(model) == ["0.weight"]
    assert names(model, [r"^1\.weight"]) == ["0.weight"]


def test_a_module_used_twice_counts_once() -> None:
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]


def test_equal_empty_or_meta_tensors_are_not_mistaken_for_tied_ones() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert names(model) == ["0.weight", "1.weight"]


def test_tensors_that_a_weight_is_computed_from_are_no_weights() -> None:
    model = Network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.fc)
        nn.utils.spectral_norm(model.conv2)
    nn.utils.parametrizations.orthogonal(model.own)
    assert sorted(names(model)) == sorted(
        ["attention.out_proj.weight", "conv1.weight", "up.weight"]
    )
    with pytest.raises(
        ConfigurationError, match=r"own\.parametrizations\.weight.*remove_param"
    ):
        names(model, ["own"])
    alone = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(ConfigurationError, match="reparametrized are left out"):
        names(alone)


@pytest.mark.parametrize("include", [None, ["1"]])
def test_a_lazy_layer_has_to_see_a_batch_first(include: list[str] | None) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match=r"^0\.weight of a lazy layer.*batch"):
        names(model, include)
    model(torch.ones(1, 3))
    assert names(model) == ["0.weight", "1.weight"]


def test_a_model_that_is_a_layer() -> None:
    assert names(nn.Linear(2, 3)) == ["weight"]


@pytest.mark.parametrize("side", ["include", "exclude"])
def test_a_pattern_without_a_match_suggests_a_name(side: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"'fc.weigth'.*Did you mean 'fc.weight'"
    ):
        prunable_parameters(Network(), **{side: ["fc.weigth"]})


def test_every_pattern_must_match() -> None:
    with pytest.raises(ConfigurationError, match="'nothing'"):
        names(Network(), ["^fc", "nothing"])


def test_a_pattern_that_is_no_regular_expression() -> None:
    with pytest.raises(ConfigurationError, match=r"'\(fc' is not a regular expression"):
        names(Network(), ["(fc"])


def test_long_lists_of_names_are_shortened() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    with pytest.raises(ConfigurationError, match=r"11\.weight, … \(20 in all\)"):
        names(model, ["nothing"])


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(2, 2).requires_grad_(False)]
)
def test_a_model_without_matrices_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match=f"{type(model).__name__} has no"):
        prunable_parameters(model)


def test_nothing_left_to_prune_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="exclude"):
        names(nn.Linear(2, 2), [], ["Linear"])
    with pytest.raises(ConfigurationError):
        names(nn.Sequential(nn.Embedding(3, 3)))
