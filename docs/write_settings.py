"""Write the tables of ``reference/settings.md`` from signatures and docstrings.

A test compares the page with what this script would write.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning_woodfisher as lw

PAGE = Path(__file__).parent / "reference" / "settings.md"
_HEAD = """\
# Settings

Name, default and meaning of every argument, in a line each. The [API](api.md) has the whole
texts. `python docs/write_settings.py` writes this page from the code.

In YAML, arguments of a callback are below `init_args`, and groups are nested:
`fisher: {num_gradients: 512}`.
"""
_PUBLIC: tuple[Callable[..., Any], ...] = (
    lw.WoodFisherPruningCallback,
    lw.prune,
    lw.FisherConfig,
    lw.SelectionConfig,
    lw.StepConfig,
    lw.LayerwiseConfig,
    lw.PolynomialSchedule,
    lw.OneShotSchedule,
    lw.sweep,
    lw.estimate,
    lw.SOSPPruningCallback,
    lw.HAPPruningCallback,
    lw.StructuredPruningCallback,
    lw.StructureConfig,
    lw.prune_structures,
    lw.load_shrunk,
)


def render() -> str:
    """Return the text of the page."""
    return "\n".join([_HEAD, *(_section(public) for public in _PUBLIC)])


def _section(public: Callable[..., Any]) -> str:
    texts = dict(_read_arguments(inspect.getdoc(public) or ""))
    rows = [
        f"| `{name}` | {_default(public, parameter)} | {_shorten(texts[name])} |"
        for name, parameter in inspect.signature(public).parameters.items()
    ]
    title = public.__name__ + "()" * (not inspect.isclass(public))
    summary = _to_markdown((inspect.getdoc(public) or "").partition("\n\n")[0])
    table = "\n".join(["| name | default | meaning |", "|---|---|---|", *rows])
    return f"## `{title}`\n\n{summary}\n\n{table}\n"


def _read_arguments(docstring: str) -> Iterator[tuple[str, str]]:
    """Find the arguments in a docstring of Google's style, with their texts."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.M | re.S)
    for found in re.finditer(
        r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.M | re.S
    ):
        yield found[1], _to_markdown(" ".join(found[2].split())).replace("|", "\\|")


def _shorten(text: str) -> str:
    """Return the first sentence, and one that says what None does."""
    first, *more = re.split(r"(?<=\.) (?=[A-Z`λ0-9])", text)
    return ". ".join(
        sentence.removesuffix(".")
        for sentence in [first, *(s for s in more if s.startswith("None "))]
    )


def _to_markdown(text: str) -> str:
    text = re.sub(r":(?:func|meth):`~?[\w.]*?\.?(\w+)`", r"`\1()`", text)
    text = re.sub(r":\w+:`~?[\w.]*?\.?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def _default(public: Callable[..., Any], parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_KEYWORD:
        return ""
    if parameter.default is parameter.empty:
        return "required"
    value = parameter.default
    if dataclasses.is_dataclass(value):
        return f"`{type(value).__name__}()`"
    for field in dataclasses.fields(public) if dataclasses.is_dataclass(public) else ():
        if field.name == parameter.name and callable(field.default_factory):
            value = field.default_factory()
    shown = f'"{value}"' if isinstance(value, str) else repr(value)
    return f"`{shown}`"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
