"""Move optimizers from the parameters of a dense model to those of the shrunk one."""

from __future__ import annotations

__all__ = ["transplant"]

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.structured.shrink.removal import Replacement


def transplant(
    optimizers: Iterable[Optimizer], replacements: Iterable[Replacement]
) -> None:
    """Let optimizers go on with the shrunk parameters, in place.

    State of a parameter's shape, such as momentum, is cut as the parameter was; single
    numbers, such as a step count, stay. The order of the parameters stays, so that
    saved optimizer states keep their meaning; a convolution with implants has two in the
    place of one. State that cannot be cut is refused with a
    ConfigurationError before any optimizer changes.

    Args:
        optimizers: their parameter groups hold the old parameters; others are left
            alone.
        replacements: what ``RemovalPlan.apply`` returned.
    """
    optimizers = tuple(optimizers)
    by_old: dict[Any, list[Replacement]] = {}
    for replacement in replacements:
        by_old.setdefault(replacement.old, []).append(replacement)
    for optimizer in optimizers:
        _require_cuttable(optimizer, by_old)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [
                new
                for p in group["params"]
                for new in ([r.new for r in by_old[p]] if p in by_old else [p])
            ]
        for old, parts in by_old.items():
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                for part in parts:
                    optimizer.state[part.new] = {
                        key: _moved(value, part) for key, value in state.items()
                    }


def _moved(value: Any, replacement: Replacement) -> Any:
    if isinstance(value, Tensor) and value.shape == replacement.old.shape:
        return replacement.cut(value)
    # Step counts are tensors, too, and no two parameters may share one.
    return value.clone() if isinstance(value, Tensor) else value


def _require_cuttable(optimizer: Optimizer, by_old: dict[Any, Any]) -> None:
    kind = type(optimizer).__name__
    touched = any(p in by_old for g in optimizer.param_groups for p in g["params"])
    if touched and isinstance(optimizer, LBFGS):
        raise ConfigurationError(
            f"{kind} keeps one history for all parameters, which cannot be cut; make a "
            "new optimizer for the shrunk model."
        )
    for old in by_old:
        for key, value in optimizer.state.get(old, {}).items():
            shaped = isinstance(value, Tensor) and value.numel() > 1
            if shaped and value.shape != old.shape:
                raise ConfigurationError(
                    f"the state {key!r} of {kind} has shape {tuple(value.shape)}, its "
                    f"parameter {tuple(old.shape)}, so it cannot be cut; make a new "
                    "optimizer for the shrunk model."
                )
