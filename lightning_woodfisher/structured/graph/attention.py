"""Attention heads as structures, and attention with some of its heads.

A head is the same rows of the projections of queries, keys and values, and the columns of
the output projection that read it. With values of zero it sends zeros, whatever its queries
and keys are: θ_s of a head are its rows of the value projection. The rows of queries and
keys are masked and removed with them, but not scored.
Shapes: n samples, L queries, T keys, H heads of d channels, E channels of the inputs.
"""

from __future__ import annotations

__all__ = [
    "PrunedAttention",
    "attention_modules",
    "find_heads",
    "separate_heads",
    "update_heads",
]

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.gradients.hessian_rows import twice_differentiable
from lightning_woodfisher.structured.graph.groups import Group, Member, Role
from lightning_woodfisher.structured.graph.inputs import recorded_calls, run_model
from lightning_woodfisher.weights.layers import axis_of_outputs, is_linear

# Layers of queries, keys and values in BERT, ViT and many other networks of transformers;
# one layer of all three in GPT-2 and in timm.
_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("c_attn",),
    ("qkv",),
)
_HEADS = ("num_attention_heads", "num_heads")


class PrunedAttention(nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` that has lost heads.

    torch's own wants as many channels in its heads as in its inputs. Parameters have the
    same names; ``embed_dim`` is the size of inputs and outputs, E.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the heads that are left.

        Args:
            query: ``[n, L, E]`` with ``batch_first``, else ``[L, n, E]``; or ``[L, E]``.
            key: the same with T.
            value: the same with T.
            key_padding_mask: bool or float ``[n, T]`` or ``[T]``; True for keys to ignore.
            need_weights: whether to return the weights.
            attn_mask: bool or float ``[L, T]``; True for pairs to ignore.
            average_attn_weights: whether to average the weights over the heads.
            is_causal: has no effect of its own; ``attn_mask`` says the same.

        Returns:
            Outputs in the layout of ``query``, and the weights: None, ``[n, L, T]`` or
            ``[n, H, L, T]`` with H the heads that are left.

        Raises:
            ValueError: for a mask that differs between the heads.
        """
        if attn_mask is not None and attn_mask.dim() != 2:
            raise ValueError("attention that has lost heads needs attn_mask [L, T]")
        is_batched = query.dim() == 3
        weights = _separate(self.in_proj_weight) or (
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
        )
        biases = _separate(self.in_proj_bias) or (None,) * 3
        heads = []
        for inputs, weight, bias in zip(
            (query, key, value), weights, biases, strict=True
        ):
            if not is_batched:
                inputs = inputs[None]
            elif not self.batch_first:
                inputs = inputs.transpose(0, 1)
            projected = F.linear(inputs, weight, bias)
            shape = *inputs.shape[:2], self.num_heads, self.head_dim
            heads.append(projected.view(shape).transpose(1, 2))
        q, k, v = heads
        mask = _additive(attn_mask, query)
        padding = _additive(key_padding_mask, query)
        if padding is not None:
            padding = padding.view(-1, 1, 1, padding.shape[-1])
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        shares = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            shares = (scores if mask is None else scores + mask).softmax(dim=-1)
            shares = F.dropout(shares, dropout)
            mixed = shares @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        outputs = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if shares is not None and average_attn_weights:
            shares = shares.mean(dim=1)
        if not is_batched:
            return outputs[0], None if shares is None else shares[0]
        return outputs if self.batch_first else outputs.transpose(0, 1), shares


def _separate(packed: Tensor | None) -> tuple[Tensor, ...] | None:
    return None if packed is None else packed.chunk(3)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return what a mask adds to the products of queries and keys."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def find_heads(
    model: nn.Module, example_inputs: Any
) -> tuple[list[Group], dict[str, str]]:
    """Find the attention heads of a model: one group for each attention.

    Known are ``nn.MultiheadAttention``, and modules with linear layers ``query``, ``key``
    and ``value`` (or ``q_proj``, ``k_proj``, ``v_proj``; or ``c_attn`` or ``qkv`` for all
    three) and a number of heads. The output projection of the latter is the linear layer
    that is called next.

    Args:
        model: the network; unchanged afterwards.
        example_inputs: see :func:`.trace_groups`.

    Returns:
        The groups, and why other attentions have none, by the name of the layer.
    """
    with (
        isolated(model, "eval"),
        twice_differentiable(),
        torch.no_grad(),
        recorded_calls(model) as calls,
    ):
        run_model(model, example_inputs)
    called = [
        name
        for name, module, *_ in calls
        if isinstance(module, nn.MultiheadAttention) or is_linear(module)
    ]
    groups, reasons = [], {}
    found: Group | str | None
    for name, module in model.named_modules():
        names = _projections(module)
        if isinstance(module, nn.MultiheadAttention):
            if name not in called:
                continue
            found = _heads_of_torch(name, module)
            output = f"{name}.out_proj".lstrip(".")
            reasons[output] = "it is the output projection of an attention"
        elif names:
            layers = [f"{name}.{key}".lstrip(".") for key in names]
            found = _heads_of_layers(model, module, layers, called)
            name = layers[-1]
        else:
            continue
        if isinstance(found, Group):
            groups.append(found)
        elif found:
            reasons[name] = found
    return groups, reasons


def attention_modules(
    model: nn.Module, groups: Iterable[Group]
) -> dict[str, nn.Module]:
    """Find the modules that multiply queries by keys.

    Args:
        model: the network.
        groups: its groups.

    Returns:
        The attention of each group of heads, by group name.
    """
    found = {}
    for group in groups:
        for member in group.of_role("query_key"):
            is_layer = is_linear(model.get_submodule(member.module))
            path = member.module.rpartition(".")[0] if is_layer else member.module
            found[group.name] = model.get_submodule(path)
    return found


def update_heads(module: Any) -> None:
    """Set the number of heads of an attention to that of its tensors.

    Args:
        module: any module whose tensors may have lost slices, before the sizes of its
            layers are set.
    """
    if isinstance(module, nn.MultiheadAttention):
        heads = module.out_proj.weight.shape[1] // module.head_dim
        if heads < module.num_heads:
            _separate_heads(module)
            module.num_heads = heads
    elif names := _projections(module):
        layer = getattr(module, names[-1])
        before = getattr(layer, "nf", None) or layer.out_features
        after = layer.weight.shape[axis_of_outputs(layer)]
        for key in (*_HEADS, "all_head_size", "split_size", "attn_dim"):
            size = getattr(module, key, None)
            if isinstance(size, int):
                setattr(module, key, size * after // before)


@contextlib.contextmanager
def separate_heads(module: nn.MultiheadAttention) -> Iterator[None]:
    """Make an attention call its output projection with its heads.

    Args:
        module: the attention.

    Yields:
        Nothing; afterwards the attention is as before.
    """
    kind, same_size = type(module), module._qkv_same_embed_dim
    _separate_heads(module)
    try:
        yield
    finally:
        module.__class__, module._qkv_same_embed_dim = kind, same_size


def _separate_heads(module: nn.MultiheadAttention) -> None:
    module.__class__ = PrunedAttention
    # The fused kernel of encoder layers wants all heads. This keeps it away.
    module._qkv_same_embed_dim = False


def _number_of_heads(module: nn.Module) -> int:
    numbers = (getattr(module, key, None) for key in _HEADS)
    return next((n for n in numbers if isinstance(n, int) and n > 0), 0)


def _projections(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the layers of queries, keys and values of an attention."""
    if not _number_of_heads(module):
        return None
    for names in _PROJECTIONS:
        layers = [getattr(module, key, None) for key in names]
        if all(layer is not None and is_linear(layer) for layer in layers):
            return names
    return None


def _heads_of_torch(name: str, module: nn.MultiheadAttention) -> Group | str:
    if type(module) not in {nn.MultiheadAttention, PrunedAttention}:
        return f"it is a {type(module).__name__} with a forward of its own"
    if module.bias_k is not None or module.add_zero_attn:
        return "its attention has keys of its own (add_bias_kv or add_zero_attn)"
    head = torch.arange(module.num_heads).repeat_interleave(module.head_dim)
    none = torch.full_like(head, -1)
    values, queries = torch.cat([none, none, head]), torch.cat([head, head, none])
    rows: list[tuple[str, Role, Tensor]]
    packed: Tensor | None = module.in_proj_weight
    if packed is not None:
        rows = [
            ("in_proj_weight", "producer", values),
            ("in_proj_weight", "query_key", queries),
        ]
    else:
        rows = [("v_proj_weight", "producer", head)]
        rows += [(f"{key}_proj_weight", "query_key", head) for key in "qk"]
    if module.in_proj_bias is not None:
        rows += [
            ("in_proj_bias", "bias", values),
            ("in_proj_bias", "query_key", queries),
        ]
    members = [Member(name, tensor, 0, role, heads) for tensor, role, heads in rows]
    output = f"{name}.out_proj".lstrip(".")
    members.append(Member(output, "weight", 1, "consumer", head))
    return Group(name, module.num_heads, tuple(members))


def _heads_of_layers(
    model: nn.Module, module: nn.Module, layers: Sequence[str], called: Sequence[str]
) -> Group | str | None:
    if not {*layers} <= {*called}:
        return None
    number = _number_of_heads(module)
    # One layer may have the queries, the keys and the values, in this order.
    parts = 3 // len(layers)
    places = [(layer, place) for layer in layers for place in range(parts)]
    rows = {layer: axis_of_outputs(model.get_submodule(layer)) for layer in layers}
    outputs = {n: model.get_parameter(f"{n}.weight").shape[rows[n]] for n in layers}
    sizes = [outputs[layer] // parts for layer, _ in places]
    last = max(called.index(layer) for layer in layers)
    output = next(iter(called[last + 1 :]), "")
    reader: Any = model.get_submodule(output)
    columns = 1 - axis_of_outputs(reader)
    if not is_linear(reader) or reader.weight.shape[columns] != sizes[2]:
        return "no Linear layer reads all heads of its attention"
    if any(size % number for size in sizes):
        return (
            f"its {sizes[2]} channels of values do not divide into {number} heads; "
            f"projections of queries, keys and values have {sizes} rows"
        )
    heads = [torch.arange(number).repeat_interleave(size // number) for size in sizes]
    members: list[Member] = []
    roles: tuple[tuple[int, Role, Role], ...] = (
        (2, "producer", "bias"),
        (0, "query_key", "query_key"),
        (1, "query_key", "query_key"),
    )
    for index, of_weight, of_bias in roles:
        (layer, place), size = places[index], sizes[index]
        owners = torch.full((outputs[layer],), -1)
        owners[place * size : (place + 1) * size] = heads[index]
        members.append(Member(layer, "weight", rows[layer], of_weight, owners))
        if model.get_submodule(layer).bias is not None:
            members.append(Member(layer, "bias", 0, of_bias, owners))
    members.append(Member(output, "weight", columns, "consumer", heads[2]))
    return Group(layers[-1], number, tuple(members))
