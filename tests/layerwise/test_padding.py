"""Padded tokens change nothing: results are those of the samples without padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_woodfisher import FisherConfig, LayerwiseConfig, PruningError, prune
from lightning_woodfisher.layerwise.maps import LinearMap
from lightning_woodfisher.layerwise.padding import TokenMasks

SAMPLES, WIDTH, LONGEST = 8, 12, 7


class Block(nn.Module):
    """Self-attention, then a perceptron on tokens of one of three layouts."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.expand, self.contract = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        # Its inputs [n, WIDTH] have as many columns as the longest sample has tokens.
        self.narrow, self.head = nn.Linear(WIDTH, LONGEST), nn.Linear(LONGEST, 4)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask != 0
        mixed = F.scaled_dot_product_attention(
            self.q(tokens), self.k(tokens), self.v(tokens), kept.unsqueeze(1)
        )
        hidden = tokens + self.out(mixed)
        shape = hidden.shape
        if self.layout == "[n·t, d]":
            hidden = hidden.flatten(0, 1)
        elif self.layout == "[t, n, d]":
            hidden = hidden.transpose(0, 1)
        hidden = hidden + self.contract(self.expand(hidden).relu())
        hidden = hidden.transpose(0, 1) if self.layout == "[t, n, d]" else hidden
        hidden = hidden.reshape(shape).masked_fill(~kept.unsqueeze(-1), 0.0).sum(1)
        pooled = self.narrow(hidden / kept.sum(1, keepdim=True))
        result: Tensor = self.head(pooled.tanh())
        return result


def lengths() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, LONGEST + 1, (SAMPLES,), generator=generator).tolist()


def pad(tokens: Tensor, value: float, left: bool) -> Tensor:
    """Pad a sample ``[1, t, ...]`` to the longest length."""
    extra = LONGEST - tokens.shape[1]
    filling = tokens.new_full((1, extra, *tokens.shape[2:]), value)
    return torch.cat([filling, tokens] if left else [tokens, filling], dim=1)


def find_weights(
    model: nn.Module, batches: list[Any], loss: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    prune(
        model,
        batches,
        loss,
        target_sparsity=0.5,
        criterion="layerwise",
        fisher=FisherConfig(num_gradients=len(batches)),
    )
    return model.state_dict()


def require_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, found in one.items():
        torch.testing.assert_close(
            found, other[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("left", "wrapped"), [(False, False), (True, True)])
@pytest.mark.parametrize("layout", ["[n, t, d]", "[n·t, d]", "[t, n, d]"])
def test_padding_changes_nothing(layout: str, left: bool, wrapped: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    samples = [torch.randn(1, n, WIDTH, generator=generator) for n in lengths()]
    ones = [torch.ones(1, n, dtype=torch.int64) for n in lengths()]
    plain: list[Any] = []
    padded: list[Any] = []
    for x, mask in zip(samples, ones, strict=True):
        plain.append({"tokens": x, "attention_mask": mask})
        both = {"tokens": pad(x, 30.0, left), "attention_mask": pad(mask, 0, left)}
        padded.append((both, torch.zeros(1)) if wrapped else both)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs = batch[0] if isinstance(batch, tuple) else batch
        return model(**inputs).logsumexp(1).mean()

    expected = find_weights(Block(layout), plain, loss)
    found = find_weights(Block(layout), padded, loss)
    require_close(found, expected)
    # The padding would count without the mask.
    for batch in padded:
        mapping = batch[0] if wrapped else batch
        mapping["mask"] = mapping.pop("attention_mask")

    def renamed(model: nn.Module, batch: Any) -> Tensor:
        inputs = batch[0] if isinstance(batch, tuple) else batch
        return model(inputs["tokens"], inputs["mask"]).logsumexp(1).mean()

    other = find_weights(Block(layout), padded, renamed)
    assert not torch.allclose(other["expand.weight"], expected["expand.weight"], 0.1)


WORDS = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [
        ("Bert", "ForMaskedLM", SIZES),
        pytest.param("Llama", "ForCausalLM", SIZES, marks=pytest.mark.slow),
        ("T5", "ForConditionalGeneration", T5 | {"decoder_start_token_id": 1}),
    ],
)
def test_transformers(name: str, head: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**WORDS, **options)
    model = getattr(transformers, name + head)(config).eval()
    generator = torch.Generator().manual_seed(2)
    plain: list[Any] = []
    padded: list[Any] = []
    for n, m in zip(lengths(), reversed(lengths()), strict=True):
        words = torch.randint(2, 30, (1, n), generator=generator)
        # The decoder of T5 has tokens of its own, padded to the same length.
        labels = words
        if name == "T5":
            labels = torch.randint(2, 30, (1, m), generator=generator)
        ones = torch.ones_like(words)
        plain.append({"input_ids": words, "attention_mask": ones, "labels": labels})
        padded.append(
            {
                "input_ids": pad(words, 3, False),
                "attention_mask": pad(ones, 0, False),
                "labels": pad(labels, -100, False),
            }
        )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result: Tensor = model(**batch).loss
        return result

    expected = find_weights(copy.deepcopy(model), plain, loss)
    require_close(find_weights(model, padded, loss), expected)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((2, 3, 5), 4),
        ((3, 2, 5), 4),
        ((6, 5), 4),
        ((2, 3), 2),
        ((2, 5), 2),
        ((2, 4, 5), 2),
    ],
)
def test_shapes(shape: tuple[int, ...], tokens: int) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    linear = LinearMap("weight", 0, (4, shape[-1]))
    (found,) = TokenMasks({"attention_mask": mask}).drop(
        linear, None, torch.zeros(shape)
    )
    assert len(found) == tokens


def test_all_tokens_are_padding() -> None:
    padding = torch.zeros(2, 3)
    batches = [{"tokens": torch.randn(2, 3, WIDTH), "attention_mask": padding}] * 2
    model = nn.Sequential(nn.Linear(WIDTH, 4))
    before = model[0].weight.clone()
    with pytest.raises(PruningError, match="marks all tokens as padding"):
        prune(
            model,
            batches,
            lambda net, batch: net(batch["tokens"]).square().mean(),
            target_sparsity=0.5,
            criterion="layerwise",
            layerwise=LayerwiseConfig(output_weights=False),
            fisher=FisherConfig(num_gradients=2),
        )
    assert torch.equal(model[0].weight, before)
