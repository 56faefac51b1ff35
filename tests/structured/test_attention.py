"""Attention heads as structures: exact removal, costs, and scores against the Hessian."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv1d import Conv1D
from hand_groups import cross_entropy
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_woodfisher import ConfigurationError, load_shrunk, prune_structures
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.hessian_rows import twice_differentiable
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.attention import (
    PrunedAttention,
    separate_heads,
)
from lightning_woodfisher.structured.graph.groups import channel_masks
from lightning_woodfisher.structured.network_cost import NetworkSize
from lightning_woodfisher.structured.scores.methods import score_structures
from lightning_woodfisher.structured.shrink.files import save_shrunk
from lightning_woodfisher.structured.shrink.removal import shrink
from lightning_woodfisher.structured.tracing import trace_groups

pytest.importorskip("torch_pruning")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning"),
]

# Inputs [n, 5, 6], E = 16, H = 4.


class Encoder(nn.Module):
    """torch's encoder, with the samples or the tokens first; the last token is padding."""

    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(
            16, 4, 24, batch_first=batch_first, bias=bias, norm_first=not batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        if batch_first:
            self.encoder.use_nested_tensor = True
        self.batch_first = batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        axis = 1 if self.batch_first else 0
        hidden = self.embed(tokens).transpose(1, axis)
        hidden = self.encoder(hidden, src_key_padding_mask=padding)
        return self.head(hidden.narrow(axis, 0, 4).mean(axis))


class Cross(nn.Module):
    """Keys and values of other sizes than the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attend = nn.MultiheadAttention(
            16, 4, bias=False, kdim=6, vdim=10, batch_first=True
        )
        self.values = nn.Linear(6, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        values = self.values(tokens)
        mixed, weights = self.attend(self.embed(tokens), tokens, values)
        return self.head(F.relu(mixed).mean(1) + 0 * weights.sum())


class Bert(nn.Module):
    """Attention in two modules, as BERT of Hugging Face's transformers has it."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, 16 // heads
        self.all_head_size = 16
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        heads = [
            layer(hidden)
            .unflatten(-1, (self.num_attention_heads, self.attention_head_size))
            .transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2)
        return mixed.reshape(*hidden.shape[:-1], self.all_head_size)


class Vit(nn.Module):
    """Attention with its output projection, as ViT of transformers has it."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(16, 16, bias=number == 3) for number in range(4)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        heads = [
            layer(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        ]
        q, k, v = heads
        mixed = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Gpt2(nn.Module):
    """Queries, keys and values in one layer [inputs, outputs], as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.split_size, self.head_dim = 4, 16, 4
        self.c_attn, self.c_proj = Conv1D(48, 16), Conv1D(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.c_attn(hidden).split(self.split_size, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class Timm(nn.Module):
    """Queries, keys and values in one layer, as ViT of timm has them."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, 4, 16
        self.qkv, self.proj = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.qkv(hidden).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(mixed.reshape(*hidden.shape[:2], self.attn_dim))


class Block(nn.Module):
    """One attention and one MLP, with sums and norms."""

    def __init__(
        self, attention: nn.Module, output: nn.Module, *mlp: nn.Module
    ) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.norm, self.attention, self.output = nn.LayerNorm(16), attention, output
        self.fc1, self.fc2 = mlp or (nn.Linear(16, 24), nn.Linear(24, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.output(self.attention(self.norm(hidden)))
        return self.head((hidden + self.fc2(F.gelu(self.fc1(hidden)))).mean(1))


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models")

    class Tokens(nn.Module):
        """30 numbers as two patches of an image."""

        def __init__(self) -> None:
            super().__init__()
            self.net = models.VisionTransformer(8, 4, 2, 4, 16, 24, num_classes=3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.net(F.pad(tokens.flatten(1), (0, 162)).view(-1, 3, 8, 8))

    return Tokens()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "encoder": (
        Encoder,
        {
            "encoder.layers.0.self_attn": 4,
            "encoder.layers.0.linear1": 24,
            "encoder.layers.1.self_attn": 4,
            "encoder.layers.1.linear1": 24,
        },
    ),
    "tokens_first": (
        lambda: Encoder(batch_first=False, bias=False),
        {
            "encoder.layers.0.self_attn": 4,
            "encoder.layers.0.linear1": 24,
            "encoder.layers.1.self_attn": 4,
            "encoder.layers.1.linear1": 24,
        },
    ),
    "cross": (Cross, {"attend": 4}),
    "bert": (
        lambda: Block(Bert(), nn.Linear(16, 16)),
        {"attention.value": 4, "fc1": 24},
    ),
    "vit": (
        lambda: Block(Vit(), nn.Identity()),
        {"attention.v_proj": 4, "fc1": 24},
    ),
    "gpt2": (
        lambda: Block(Gpt2(), nn.Identity(), Conv1D(24, 16), Conv1D(16, 24)),
        {"attention.c_attn": 4, "fc1": 24},
    ),
    "timm": (
        lambda: Block(Timm(), nn.Identity()),
        {"attention.qkv": 4, "fc1": 24},
    ),
    "torchvision": (
        torchvision_vit,
        {
            f"net.encoder.layers.encoder_layer_{number}.{name}": size
            for number in range(2)
            for name, size in (("self_attention", 4), ("mlp.0", 24))
        },
    ),
}


def data(samples: int = 6) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(samples, 5, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(tokens, torch.arange(samples) % 3)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def count(model: nn.Module, inputs: Tensor) -> float:
    """Multiply-accumulates by torch, which does not know fused kernels of attention."""
    with (
        twice_differentiable(),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        model(inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_are_removed_exactly_and_cost_what_they_cost(name: str) -> None:
    model, inputs = build(name), data().tensors[0]
    traced = trace_groups(model, inputs)
    assert {group.name: group.size for group in traced.groups} == NETWORKS[name][1]
    source = FunctionLoss(model, data(), cross_entropy)
    cost = NetworkSize(source, traced.groups, Communicator())
    assert cost.dense_macs == count(model, inputs[:1])
    before = model(inputs)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        removed = {
            group.name: torch.randperm(group.size, generator=generator)[: 1 + 2 * seed]
            for group in traced.groups
        }
        masked, smaller = copy.deepcopy(model), copy.deepcopy(model)
        with torch.no_grad():
            for key, mask in channel_masks(masked, traced.groups, removed).items():
                masked.get_parameter(key)[mask] = 0.0
            shrink(smaller, traced.groups, removed)
            with twice_differentiable():
                expected = masked(inputs)
            # Also where torch uses its fused kernels and nested tensors for all heads.
            torch.testing.assert_close(smaller(inputs), expected, rtol=0, atol=1e-12)
        assert float((expected - before).detach().abs().max()) > 1e-3
        assert cost.macs(removed) == count(smaller, inputs[:1])
        assert cost.parameters(removed) == sum(p.numel() for p in smaller.parameters())
        # Training goes on, with the same outputs where nothing is dropped.
        torch.testing.assert_close(smaller(inputs), expected, rtol=0, atol=1e-12)
        smaller.train()(inputs).sum().backward()
        assert all(p.grad is not None for p in smaller.parameters())


@pytest.mark.parametrize("name", ["encoder", "bert", "gpt2", "timm"])
def test_a_smaller_network_is_saved_loaded_and_pruned_again(
    name: str, tmp_path: Path
) -> None:
    model, inputs = build(name), data().tensors[0]
    groups = trace_groups(model, inputs).groups
    dense = copy.deepcopy(model)
    plan = shrink(model, groups, {group.name: [0] for group in groups})
    save_shrunk(tmp_path, model.state_dict(), plan)
    loaded = load_shrunk(tmp_path, dense).eval()
    assert torch.equal(loaded(inputs), model(inputs))
    again = trace_groups(loaded, inputs).groups
    assert [group.size for group in again] == [group.size - 1 for group in groups]
    shrink(loaded, again, {group.name: [1] for group in again})
    shrink(dense, groups, {group.name: [0, 2] for group in groups})
    assert torch.equal(loaded(inputs), dense(inputs))


def scaled_loss(
    model: nn.Module, values: dict[str, tuple[Any, ...]], factors: Tensor, batch: Any
) -> Tensor:
    """The loss with the values of each head of 4 channels times a factor."""
    changed = {}
    for name, places in values.items():
        weight = model.get_parameter(name).detach()
        scale = factors.repeat_interleave(4)
        if weight.dim() == 2 and len(places) == 1:  # The channels are rows.
            scale = scale[:, None]
        changed[name] = weight.clone()
        changed[name][places] = weight[places] * scale
    with twice_differentiable():
        return F.cross_entropy(functional_call(model, changed, batch[0]), batch[1])


VALUES = {
    "encoder": (
        r"layers\.1.self_attn",
        {
            f"encoder.layers.1.self_attn.in_proj_{name}": (slice(32, 48),)
            for name in ("weight", "bias")
        },
    ),
    "cross": ("attend", {"attend.v_proj_weight": (slice(0, 16),)}),
    "bert": (
        "value",
        {f"attention.value.{name}": (slice(0, 16),) for name in ("weight", "bias")},
    ),
    "timm": ("qkv", {"attention.qkv.weight": (slice(32, 48),)}),
    "gpt2": (
        "c_attn",
        {
            "attention.c_attn.weight": (slice(None), slice(32, 48)),
            "attention.c_attn.bias": (slice(32, 48),),
        },
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_scores_of_heads_are_derivatives_along_their_values(name: str) -> None:
    model, samples = build(name), data()
    only, values = VALUES[name]
    groups = trace_groups(model, samples.tensors[0], only=[only]).groups
    assert len(groups) == 1
    batch = samples.tensors
    ones = torch.ones(4, dtype=torch.float64)
    source = FunctionLoss(model, samples, cross_entropy)

    def score(method: Any) -> Tensor:
        config = StructureConfig(
            method=method, num_samples=6, batch_size=6, labels="true"
        )
        return score_structures(source, groups, config).values[0]

    first = jacobian(lambda f: scaled_loss(model, values, f, batch), ones)
    second = hessian(lambda f: scaled_loss(model, values, f, batch), ones)
    expected = first.abs() + 0.5 * second.sum(dim=1).abs()
    torch.testing.assert_close(score("sosp_h"), expected, rtol=1e-9, atol=1e-12)
    rows = torch.stack(
        [
            jacobian(
                lambda f, n=number: scaled_loss(
                    model, values, f, [t[n : n + 1] for t in batch]
                ),
                ones,
            )
            for number in range(6)
        ]
    )
    expected = 0.5 * rows.square().mean(0) + rows.mean(0).abs()
    torch.testing.assert_close(score("diagonal"), expected, rtol=1e-9, atol=1e-12)
    squares = sum(
        model.get_parameter(key)[places]
        .detach()
        .movedim(len(places) - 1, 0)
        .unflatten(0, (4, 4))
        .square()
        .flatten(1)
        .sum(1)
        for key, places in values.items()
    )
    torch.testing.assert_close(score("magnitude"), squares.sqrt())
    assert type(model.get_submodule(groups[0].members[0].module)) is not PrunedAttention


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"average_attn_weights": False},
        {"need_weights": False},
        {"attn_mask": True},
        {"attn_mask": True, "need_weights": False, "is_causal": True},
        {"key_padding_mask": True, "need_weights": False},
        {"key_padding_mask": True, "attn_mask": True},
    ],
    ids=str,
)
def test_attention_without_a_loss_of_heads_is_that_of_torch(
    batched: bool, batch_first: bool, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    options = dict(options)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first).double().eval()
    tokens = torch.randn(3, 5, 8).double()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    if not batched:
        tokens, padding = tokens[1], padding[1]
    elif not batch_first:
        tokens = tokens.transpose(0, 1)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = padding
    if "attn_mask" in options:
        options["attn_mask"] = torch.ones(5, 5).triu(1).bool()
    expected = module(tokens, tokens, tokens, **options)
    with separate_heads(module):
        assert type(module) is PrunedAttention
        found = module(tokens, tokens, tokens, **options)
    assert type(module) is nn.MultiheadAttention
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_mask_for_each_head_cannot_be_divided() -> None:
    module = nn.MultiheadAttention(8, 2)
    tokens = torch.randn(5, 3, 8)
    with separate_heads(module), pytest.raises(ValueError, match="attn_mask"):
        module(tokens, tokens, tokens, attn_mask=torch.zeros(6, 5, 5))


class Subclass(nn.MultiheadAttention):
    pass


class Attend(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(6, 16), attention
        self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = self.attend(hidden, hidden, hidden)[0].mean(1)
        return self.fc2(F.relu(self.fc1(hidden)))


class Ragged(Bert):
    """Three heads of five of the 16 channels."""

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (
            layer(hidden)[..., :15].unflatten(-1, (3, 5)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return F.pad(mixed.flatten(2), (0, 1))


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention.value": (
        lambda: Block(Ragged(3), nn.Linear(16, 16)),
        "its 16 channels of values do not divide into 3 heads",
    ),
    "attention.v_proj": (
        # fc1 has as many inputs, but is not what reads the heads.
        lambda: Block(Bert(), nn.Conv1d(5, 5, 1)),
        "the network fails without its channels",
    ),
    "1.value": (
        lambda: nn.Sequential(
            nn.Linear(6, 16), Bert(), nn.Flatten(), nn.Linear(80, 8), nn.Linear(8, 3)
        ),
        "no Linear layer reads all heads of its attention",
    ),
    "attend": (
        lambda: Attend(Subclass(16, 4, batch_first=True)),
        "it is a Subclass with a forward of its own",
    ),
    "attend.": (
        lambda: Attend(nn.MultiheadAttention(16, 4, add_bias_kv=True)),
        "its attention has keys of its own",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_heads_that_stay_have_a_reason(case: str) -> None:
    make, reason = REASONS[case]
    layer = case.rstrip(".").replace("v_proj", "value")
    torch.manual_seed(0)
    model, inputs = make(), data().tensors[0].float()
    traced = trace_groups(model, inputs)
    assert reason in traced.left_out[layer]
    assert layer not in {group.name for group in traced.groups}
    with pytest.raises(ConfigurationError) as caught:
        trace_groups(model, inputs, only=[f"^{layer}$"])
    assert reason in str(caught.value)


def test_heads_are_rounded_by_their_channels() -> None:
    model, samples = build("bert"), data()
    limits = StructureConfig(
        num_samples=6, batch_size=3, round_to=8, min_kept=1, max_ratio=0.5
    )
    report, _ = prune_structures(
        model,
        samples,
        cross_entropy,
        target=0.25,
        config=limits,
        example_inputs=samples.tensors[0],
    )
    kept = {group.name: group.kept for group in report.groups}
    # Four heads of four channels: 8 channels are left.
    assert kept["attention.value"] == 2
    assert kept["fc1"] in {16, 24}


def test_heads_go_with_the_rest_for_a_target() -> None:
    model, samples = build("encoder"), data()
    report, groups = prune_structures(
        model,
        samples,
        cross_entropy,
        target=0.4,
        config=StructureConfig(num_samples=6, batch_size=3, min_kept=1),
        example_inputs=samples.tensors[0],
    )
    heads = [group for group in report.groups if group.name.endswith("self_attn")]
    assert any(group.removed for group in heads)
    smaller = copy.deepcopy(model)
    shrink(smaller, groups, report.removed)
    inputs = samples.tensors[0]
    torch.testing.assert_close(smaller(inputs), model(inputs), rtol=0, atol=1e-12)
    assert report.macs == count(smaller, inputs[:1]) <= 0.6 * report.macs_dense
