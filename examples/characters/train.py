"""Train the dense network and write its ``state_dict`` to ``runs/characters/dense.pt``.

python -m examples.characters.train --steps 1500

An interrupted run goes on from its last 100 steps, which are kept beside the output.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from examples.characters.model import (
    CONTEXT,
    CharacterModel,
    held_out_loss,
    loss_fn,
    read_sources,
)

_STEPS_BETWEEN_SAVES = 100


def main() -> None:
    """Train with AdamW and one cosine cycle of the learning rate."""
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
    optimizer = torch.optim.AdamW(
        model.parameters(), arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.1
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    interrupted = arguments.out.with_suffix(".state")
    first_step = 0
    if interrupted.exists():
        first_step, weights, moments = torch.load(interrupted, weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    for step in range(first_step, arguments.steps):
        # Batches depend on the step, so that they are the same after an interruption.
        generator = torch.Generator().manual_seed(arguments.seed * 10**9 + step)
        places = (arguments.batch_size, 1)
        first = torch.randint(len(train) - CONTEXT, places, generator=generator)
        windows = train[first + torch.arange(CONTEXT + 1)].long()
        warm = min(1.0, (step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        optimizer.param_groups[0]["lr"] = arguments.learning_rate * warm * cosine
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model, (windows[:, :-1], windows[:, 1:]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % _STEPS_BETWEEN_SAVES == 0:
            state = (step + 1, model.state_dict(), optimizer.state_dict())
            torch.save(state, interrupted)
            print(f"step {step + 1}: {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), arguments.out)
    interrupted.unlink(missing_ok=True)
    print(f"held-out loss {held_out_loss(model, held_out):.4f} nats a byte")


if __name__ == "__main__":
    main()
