"""Types that several folders share."""

from __future__ import annotations

__all__ = ["ModelMode"]

from typing import Literal

#: Mode of the network while gradients are collected.
ModelMode = Literal["train", "eval"]
