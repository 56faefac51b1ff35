"""One HTML page about a pruned run: nothing in it is loaded from anywhere."""

from __future__ import annotations

__all__ = ["Reports", "build_page"]

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.reporting.page.channels import channel_section
from lightning_woodfisher.reporting.page.elements import text
from lightning_woodfisher.reporting.page.weights import weight_section
from lightning_woodfisher.structured.report import StructureReport

#: Of the steps of one callback, in order.
Reports: TypeAlias = list[PruningReport] | list[StructureReport]

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2329; --paper: #ffffff; --card: #f3f4f6;
  --line: #d5d9e0; --dim: #5b6472; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181c;
  --card: #212429; --line: #3a3f47; --dim: #9aa3b0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; } h2 { margin: 2.2rem 0 .8rem; font-size: 1.2rem; }
.dim, figcaption { color: var(--dim); font-size: .9rem; overflow-wrap: anywhere; }
.cards { display: grid; gap: .7rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.cards div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.15rem; font-weight: 600; }
.figures { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: .5rem; }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap; }
th { background: var(--card); white-space: normal; vertical-align: bottom; }
tr + tr td { border-top: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def build_page(
    source: str,
    runs: Mapping[str, Reports],
    masks: Mapping[str, Mapping[str, Tensor]],
) -> str:
    """Write the page.

    Args:
        source: where the reports come from.
        runs: reports of the steps of each pruning callback, by a title.
        masks: bool tensors by parameter name, True where kept, by the same titles.

    Returns:
        HTML. It has no scripts, and asks for no file and no host.
    """
    parts = []
    for number, (title, reports) in enumerate(runs.items()):
        if len(runs) > 1:
            parts.append(f"<h2>{text(title)}</h2>")
        parts.append(_section(f"run{number}", reports, masks.get(title, {})))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Pruning report – {text(source)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Pruning report</h1>\n"
        f'<div class="dim">{text(source)}</div>\n{"".join(parts)}</body>\n</html>\n'
    )


def _section(name: str, reports: Reports, masks: Mapping[str, Tensor]) -> str:
    # Each list has reports of one kind.
    channels = [report for report in reports if isinstance(report, StructureReport)]
    if channels:
        return channel_section(name, channels)
    weights = [report for report in reports if isinstance(report, PruningReport)]
    return weight_section(name, weights, masks)
