"""Which tensors are selected by default, by class path and by regular expression."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from conv1d import Conv1D
from torch import nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.weights.layers import (
    describe_selection,
    find_inputs_first,
    prunable_parameters,
)


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
DEFAULT = [*LINEAR, *CONVOLUTION, *LSTM, "attention.in_proj_weight"]


def names(
    model: nn.Module,
    only: list[str] | None = None,
    exclude: list[str] | None = None,
    include: list[str] | None = None,
) -> list[str]:
    return list(prunable_parameters(model, include or [], exclude or [], only or []))


def test_default_is_the_weights_of_linear_maps() -> None:
    assert sorted(names(Network())) == sorted(DEFAULT)


RECURRENT = {
    nn.RNN(2, 3, 2): ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"],
    nn.GRU(2, 3, bidirectional=True): [
        "weight_ih_l0",
        "weight_hh_l0",
        "weight_ih_l0_reverse",
        "weight_hh_l0_reverse",
    ],
    nn.LSTM(2, 4, proj_size=3): ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"],
    nn.RNNCell(2, 3): ["weight_ih", "weight_hh"],
    nn.LSTMCell(2, 3): ["weight_ih", "weight_hh"],
    nn.GRUCell(2, 3): ["weight_ih", "weight_hh"],
    nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True): [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
    ],
    Conv1D(5, 4): ["weight"],
}


@pytest.mark.parametrize("layer", RECURRENT, ids=lambda layer: type(layer).__name__)
def test_every_matrix_of_a_layer_is_selected(layer: nn.Module) -> None:
    assert names(layer) == RECURRENT[layer]
    # Biases of attention have three dimensions.
    assert names(layer, ["."]) == RECURRENT[layer]


def test_a_convolution_of_another_package_that_is_no_linear_map() -> None:
    other = type("Conv1D", (nn.Module,), {})()
    other.weight = nn.Parameter(torch.ones(3, 4, 2))
    assert names(nn.Sequential(other, nn.Linear(2, 2))) == ["1.weight"]


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.Linear(2, 3), set()),
        (nn.Conv2d(2, 3, 1), set()),
        (nn.LSTM(2, 3), set()),
        (Conv1D(5, 4), {"0.weight"}),
        (nn.ConvTranspose2d(2, 3, 1), {"0.weight"}),
    ],
)
def test_weights_with_their_inputs_first(layer: nn.Module, names: set[str]) -> None:
    model = nn.Sequential(layer)
    assert find_inputs_first(model, list(prunable_parameters(model))) == names


def test_include_adds_and_only_replaces() -> None:
    model = Network()
    added = names(model, include=["^free$", "Embedding"])
    assert sorted(added) == sorted([*DEFAULT, "free", "embed.weight"])
    assert sorted(names(model, ["^free$"])) == ["free"]
    assert "fc.weight" not in names(model, None, ["^fc"], ["^free$"])
    with pytest.raises(
        ConfigurationError, match="'^nothing' matches no".replace("^", r"\^")
    ):
        names(model, include=["^nothing"])


def test_complex_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 4, dtype=torch.cfloat), nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match=r"0\.weight is complex") as caught:
        names(model)
    advice = re.search(r"exclude=(\[.*\])", str(caught.value))
    assert advice is not None
    assert names(model, None, eval(advice[1])) == ["1.weight"]


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
    left = names(Network(), [], ["Linear", "ConvTranspose2d"])
    assert left == [*CONVOLUTION[:2], *LSTM, "attention.in_proj_weight"]


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


@pytest.mark.parametrize("share", [lambda w: w, lambda w: nn.Parameter(w.detach())])
def test_a_head_that_is_tied_to_an_embedding_stays_dense_unless_named(
    share: Any,
) -> None:
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = share(embed.weight)
    model = nn.Sequential(embed, nn.Linear(3, 3), head)
    assert names(model) == names(model, ["Linear"]) == ["1.weight"]
    assert names(model, include=[r"^2\.weight"]) == ["0.weight", "1.weight"]
    assert names(model, include=["Embedding"]) == ["0.weight", "1.weight"]
    assert names(model, [r"^2\.weight"]) == ["0.weight"]
    assert "left dense: 15 (tied to an embedding): 0.weight" in describe_selection(
        model
    )


def test_a_module_used_twice_counts_once() -> None:
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_elements_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 0))
    assert names(model) == ["0.weight"]
    assert "1.weight" in describe_selection(model)


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
        {*DEFAULT} - {"fc.weight", "conv2.weight", "own.weight"}
    )
    with pytest.raises(
        ConfigurationError, match=r"own\.parametrizations\.weight.*remove_param"
    ):
        names(model, ["own"])
    alone = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(ConfigurationError, match=r"leave no weight.*reparametrized"):
        names(alone)


def norm(layer: nn.Module, key: str) -> None:
    nn.utils.weight_norm(layer, key)


def spectral(layer: nn.Module, key: str) -> None:
    nn.utils.spectral_norm(layer, key)


def masked(layer: nn.Module, key: str) -> None:
    nn.utils.prune.identity(layer, key)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", [norm, spectral, masked])
@pytest.mark.parametrize(
    ("layer", "key"),
    [(nn.Linear, "weight"), (nn.Conv1d, "weight"), (nn.LSTM, "weight_hh_l0")],
)
def test_sources_of_a_weight_are_refused_when_named(
    change: Any, layer: Any, key: str
) -> None:
    model = nn.Sequential(layer(3, 3, 1), nn.Linear(3, 3))
    before = names(model)
    change(model[0], key)
    sources = [n for n, _ in model.named_parameters() if f"{key}_" in n]
    assert sources
    assert names(model) == [name for name in before if name != f"0.{key}"]
    assert "(reparametrized): " + sources[0][:8] in describe_selection(model)
    for source in sources:
        parameter = model.get_parameter(source)
        if parameter.dim() > 1:
            for options in ({"include": [source]}, {"only": [source]}):
                with pytest.raises(
                    ConfigurationError, match=r"is not the weight of a l"
                ):
                    names(model, **options)


def test_a_description_has_at_most_five_lines() -> None:
    model = Network()
    model.fc.weight.requires_grad_(False)
    model.tied = nn.Linear(4, 5)
    model.tied.weight = model.embed.weight
    nn.utils.parametrizations.orthogonal(model.own)
    text = describe_selection(model, exclude=["conv1"])
    first, *others = text.splitlines()
    assert len(others) == 4
    chosen = prunable_parameters(model, exclude=["conv1"])
    weights = sum(p.numel() for p in chosen.values())
    total = sum(p.numel() for p in model.parameters())
    assert first.startswith(f"{weights:,} of {total:,} parameters")
    assert "LSTM (2)" in first
    for reason in (
        "frozen",
        "selection.exclude",
        "tied",
        "reparam",
        "biases",
        "include",
    ):
        assert reason in text
    sizes = [int(n) for n in re.findall(r"(\d+) \(", "\n".join(others))]
    assert sum(sizes) == total - weights
    assert sizes == sorted(sizes, reverse=True)
    assert "not in selection.only" in describe_selection(model, only=["conv2"])


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
