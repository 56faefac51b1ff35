"""Define a transformer that predicts the next byte of Python sources, and its data.

The text is Python's own standard library, so there is no download. One file in sixteen is
held out.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

SYMBOLS = 256
CONTEXT = 128
# Width of an attention head.
HEAD = 32


class Block(nn.Module):
    """Causal attention and two layers, each after a LayerNorm.

    Args:
        width: width of the residual stream.
        heads: number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """Map ``[n, t, width]`` to the same shape."""
        packed = self.attention(self.norm1(stream)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.projection(mixed.transpose(1, 2).flatten(2))
        return stream + self.contract(F.gelu(self.expand(self.norm2(stream))))


class CharacterModel(nn.Module):
    """A decoder with LayerNorm before its layers, as in GPT-2.

    Args:
        width: width of the residual stream, a multiple of the 32 of a head.
        depth: number of blocks.
    """

    def __init__(self, width: int = 288, depth: int = 6) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, width // HEAD) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, SYMBOLS)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> CharacterModel:
        """Build the network of a ``state_dict``."""
        depth = sum(name.endswith("contract.weight") for name in state)
        model = cls(state["symbols.weight"].shape[1], depth)
        model.load_state_dict(state)
        return model

    def forward(self, text: Tensor) -> Tensor:
        """Map bytes ``[n, t]`` to logits of the next bytes, ``[n, t, 256]``."""
        places = torch.arange(text.shape[1], device=text.device)
        stream = self.symbols(text) + self.positions(places)
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream))
        return logits


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows of a text: inputs and next bytes, int64 ``[t]`` each."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[index * CONTEXT : (index + 1) * CONTEXT + 1].long()
        return window[:-1], window[1:]


def read_sources() -> tuple[Tensor, Tensor]:
    """Read the sources of Python's standard library.

    Returns:
        Bytes of the training files and of the held-out files, uint8 ``[n]`` each.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if "site-packages" not in name and "/tests/" not in f"/{name}":
            held_out = zlib.crc32(name.encode()) % 16 == 0
            parts[held_out].append(path.read_bytes())
    train, held_out_text = (
        torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8)
        for part in parts
    )
    return train, held_out_text


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the mean cross-entropy of the next bytes, in nats."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor, windows: int = 512) -> float:
    """Compute the loss on windows that are spread over a text."""
    model.eval()
    data = Windows(text)
    chosen = torch.linspace(0, len(data) - 1, windows).long().tolist()
    total = 0.0
    for start in range(0, windows, 64):
        samples = [data[i] for i in chosen[start : start + 64]]
        inputs, targets = (torch.stack(part) for part in zip(*samples, strict=True))
        total += len(samples) * float(loss_fn(model, (inputs, targets)))
    return total / windows


@torch.no_grad()
def continue_text(
    model: nn.Module, start: str, length: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """Write ``length`` more bytes after a text, drawn from the model's predictions."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([list(start.encode())])
    for _ in range(length):
        logits = model(text[:, -CONTEXT:])[0, -1] / temperature
        drawn = torch.multinomial(logits.softmax(0), 1, generator=generator)
        text = torch.cat([text, drawn[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")
