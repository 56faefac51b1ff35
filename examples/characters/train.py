"""Train the dense network and write its ``state_dict`` to ``runs/characters/dense.pt``.

python -m examples.characters.train --steps 1500

An interrupted run goes on from its last 100 steps, which are kept beside the output.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.characters.model import (
    CONTEXT,
    CharacterModel,
    held_out_loss,
    loss_fn,
    read_sources,
)

_STEPS_BETWEEN_SAVES = 100


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Make AdamW; :func:`take_step` sets the learning rate."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Tensor,
    step: int,
    steps: int,
    *,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> float:
    """Train on one batch and return its loss.

    The batch depends on the step, so that it is the same after an interruption. The
    learning rate follows one cosine cycle over ``steps``.
    """
    generator = torch.Generator().manual_seed(seed * 10**9 + step)
    first = torch.randint(len(text) - CONTEXT, (batch_size, 1), generator=generator)
    windows = text[first + torch.arange(CONTEXT + 1)].long()
    warm = min(1.0, (step + 1) / 100)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    optimizer.param_groups[0]["lr"] = learning_rate * warm * cosine
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(model, (windows[:, :-1], windows[:, 1:]))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def main() -> None:
    """Train, and save the state every 100 steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=288)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/characters/dense.pt"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    train, held_out = read_sources()
    model = CharacterModel(arguments.width, arguments.depth)
    optimizer = make_optimizer(model)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    interrupted = arguments.out.with_suffix(".state")
    first_step = 0
    if interrupted.exists():
        first_step, weights, moments = torch.load(interrupted, weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    for step in range(first_step, arguments.steps):
        loss = take_step(
            model,
            optimizer,
            train,
            step,
            arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
        )
        if (step + 1) % _STEPS_BETWEEN_SAVES == 0:
            state = (step + 1, model.state_dict(), optimizer.state_dict())
            torch.save(state, interrupted)
            print(f"step {step + 1}: {loss:.3f}", flush=True)
    torch.save(model.state_dict(), arguments.out)
    interrupted.unlink(missing_ok=True)
    print(f"held-out loss {held_out_loss(model, held_out):.4f} nats a byte")


if __name__ == "__main__":
    main()
