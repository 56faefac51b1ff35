"""Random damage to files and to the plain data in them, reproducible by a seed."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# The file that code in a pickle makes.
RAN = "code was run"
ESCAPE = "\x1b[2Jgone\x07\x9b31m\u202e"


def _nested(depth: int) -> list[Any]:
    """Return a list whose text would have 2^depth elements."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found, found]
    return found


class _Code:
    """Makes a file when it is unpickled by a reader that runs code."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(RAN),)


def _with_attributes() -> OrderedDict[str, Any]:
    found = OrderedDict({"a": 1})
    found.get = found.copy = found.keys = 5  # type: ignore[method-assign, assignment]
    return found


# What JSON can hold, and what only torch.save can.
_JSON: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: -1,
    lambda: 0,
    lambda: 2**40,
    lambda: 2**63,
    lambda: 10**4000,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: -0.5,
    lambda: 1e300,
    lambda: "",
    lambda: "net",
    lambda: r"$\frac{1}$",
    lambda: ESCAPE,
    lambda: "lone \ud800",
    list,
    dict,
    lambda: [[]],
    lambda: [0, -1, 2**40],
    lambda: {"": None},
    lambda: {ESCAPE: ESCAPE},
]
_TORCH: list[Callable[[], Any]] = [
    lambda: (),
    lambda: {1: 2},
    lambda: b"\x1b",
    lambda: 2 + 1j,
    lambda: torch.zeros(0),
    lambda: torch.ones(()),
    lambda: torch.ones(3, dtype=torch.bool),
    lambda: torch.ones(2, 3).T,
    lambda: torch.ones(1).expand(2**40),
    lambda: torch.zeros(1, dtype=torch.bool).expand(2**40),
    lambda: torch.ones(2**40, device="meta"),
    lambda: torch.ones(3).to_sparse(),
    lambda: torch.nn.Parameter(torch.ones(2)),
    lambda: torch.float32,
    lambda: torch.Size([2**40]),
    lambda: _nested(40),
    _with_attributes,
    _Code,
]


def change(generator: random.Random, content: Any, json_only: bool = False) -> Any:
    """Change one to three places of nested dictionaries and lists.

    Args:
        generator: decides where and how.
        content: is left unchanged.
        json_only: insert only what JSON can hold.

    Returns:
        The changed copy.
    """
    values = _JSON if json_only else [*_JSON, *_TORCH]
    content = copy.deepcopy(content)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        places = list(_places(content))
        if not places:
            return generator.choice(values)()
        container, key = generator.choice(places)
        action = generator.random()
        if action < 0.7:
            container[key] = generator.choice(values)()
        elif action < 0.8:
            del container[key]
        elif isinstance(container, list):
            container.append(container[key])
        else:
            name: Any = ESCAPE if json_only or generator.random() < 0.5 else 7
            container[name] = container.pop(key)
    return content


def _places(content: Any, seen: set[int] | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield the dictionaries and lists, each once, with each of their keys."""
    seen = set() if seen is None else seen
    if id(content) in seen or not isinstance(content, dict | list):
        return
    seen.add(id(content))
    pairs = dict.items(content) if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        yield content, key
        yield from _places(value, seen)


def damage(generator: random.Random, content: bytes) -> bytes:
    """Cut a file off, or overwrite some of its bytes.

    Args:
        generator: decides where.
        content: of the file.

    Returns:
        The damaged content.
    """
    if generator.random() < 0.3:
        return content[: generator.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 4, 64])):
        changed[generator.randrange(len(content))] = generator.randrange(256)
    return bytes(changed)
