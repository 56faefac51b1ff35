"""Train the dense network and write its ``state_dict`` to ``runs/characters/dense.pt``.

python -m examples.characters.train --minutes 30
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from examples.characters.model import (
    CONTEXT,
    CharacterModel,
    held_out_loss,
    loss_fn,
    read_sources,
)


def main() -> None:
    """Train with AdamW and one cosine cycle of the learning rate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/characters/dense.pt"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    train, held_out = read_sources()
    model = CharacterModel()
    optimizer = torch.optim.AdamW(
        model.parameters(), arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.1
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    start, steps, average = time.perf_counter(), 0, 0.0
    while (done := (time.perf_counter() - start) / (60 * arguments.minutes)) < 1:
        warm, cosine = min(1.0, (steps + 1) / 100), 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = arguments.learning_rate * warm * cosine
        first = torch.randint(len(train) - CONTEXT, (arguments.batch_size, 1))
        windows = train[first + torch.arange(CONTEXT + 1)].long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model, (windows[:, :-1], windows[:, 1:]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        average += (loss.item() - average) * max(0.02, 1 / steps)
        if steps % 250 == 0:
            print(f"step {steps}, {done:.0%}: {average:.3f}", flush=True)
    torch.save(model.state_dict(), arguments.out)
    print(f"held-out loss {held_out_loss(model, held_out):.4f} nats a byte")


if __name__ == "__main__":
    main()
