"""Write one self-contained HTML page about a pruned run."""

from __future__ import annotations

__all__ = ["build_page"]

import html
from collections.abc import Mapping

from torch import Tensor

from lightning_woodfisher.reporting import figures
from lightning_woodfisher.reporting.contents import (
    Contents,
    Reports,
    Table,
    collect_contents,
)

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
.verdict p { margin: .3rem 0; max-width: 60rem; overflow-wrap: anywhere; }
.verdict { margin: 1.2rem 0 0; padding: .5rem .9rem; border-left: .25rem solid #3a86c8; }
.cards { display: grid; gap: .7rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.cards div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.15rem; font-weight: 600; }
.figures { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: .5rem; }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .8rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .35rem; text-align: right; white-space: nowrap; }
th { background: var(--card); white-space: normal; vertical-align: bottom; }
tr + tr td { border-top: 1px solid var(--line); }
.name { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
"""
_CAPTIONS = {
    "progress": "Zeros after each step, and the mean loss just before and after it. A logged "
    "metric is that of the last validation before the step and before the next one.",
    "loss_increase": "Rise of the loss in each step, as predicted by the quadratic model "
    "and as measured. A value below zero means that the step lowered the loss.",
    "layers": "Layers that matter less to the loss become sparser than others.",
    "schedule": "Zeros of each layer after each step, in percent.",
    "saliencies": "Range of the saliencies in each layer, and the largest one removed.",
    "local_model": "Loss along the line from the weights before the step to those after it.",
    "masks": "Kept weights are black. A white row is an output without any weight, a white "
    "column an unused input.",
    "channels": "Channels of each group of layers. The outline is the dense network. (+n) "
    "means that n more layers lose the same channels.",
    "network_size": "Size of the network after each step, and the mean loss just before "
    "and after it.",
}
# Formats of columns; by default integers have commas and floats three digits.
_FORMATS = {
    "sparsity": ".2%",
    "target_sparsity": ".2%",
    "flops_share": ".1%",
    "target": ".1%",
    "kept_share": ".1%",
    "macs_left": ".1%",
    "parameters_left": ".1%",
    "seconds": ".1f",
}
# Headings of columns; by default the name of the column.
_HEADINGS = {
    "step": "optimizer steps",
    "threshold": "largest saliency removed",
    "damping": "damping λ",
    "flops_share": "FLOPs left",
    "target": "to remove",
    "implanted": "with 1×1 filters",
    "loss_recalibrated": "with new BN statistics",
    "measured_increase": "measured rise",
    "predicted_increase": "predicted rise",
    "saliency_50%": "median saliency",
    "sparsity": "share of zeros",
    "target_sparsity": "target",
    "latency": "forward pass (s)",
    "latency_dense": "dense forward pass (s)",
}
# Columns that are left out if all of their values are the same.
_UNLESS_CONSTANT = {
    "damping",
    "stages",
    "method",
    "measure",
    "macs_dense",
    "structures",
}
_UNLESS_CONSTANT |= {"parameters_dense", "latency_dense", "implanted"}
# The figure of the saliencies shows these quantiles.
_ONLY_IN_FIGURES = {f"saliency_{share}%" for share in (5, 25, 75, 95)}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def build_page(
    source: str,
    runs: Mapping[str, Reports],
    masks: Mapping[str, Mapping[str, Tensor]],
    steps_left: Mapping[str, int] | None = None,
) -> str:
    """Write the page.

    Args:
        source: file or run of the reports, shown below the title.
        runs: reports of the steps of each pruning callback, by a title for the callback.
        masks: bool tensors by parameter name, True where kept, by the same titles.
        steps_left: numbers of planned steps that have not happened, by the same titles.

    Returns:
        HTML without scripts, external files or network requests.
    """
    sections = []
    for number, (title, reports) in enumerate(runs.items()):
        if len(runs) > 1:
            sections.append(f"<h2>{html.escape(title)}</h2>")
        left = (steps_left or {}).get(title, 0)
        contents = collect_contents(reports, masks.get(title, {}), left)
        sections.append(_write_section(f"run{number}", contents))
    shown = html.escape(source)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Pruning report – {shown}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Pruning report</h1>\n"
        f'<div class="dim">{shown}</div>\n{"".join(sections)}</body>\n</html>\n'
    )


def _write_section(name: str, contents: Contents) -> str:
    """Write the section of one callback; ``name`` makes its identifiers unique."""
    cards = "".join(
        f"<div><b>{html.escape(value)}</b>{html.escape(label)}</div>"
        for label, value in contents.key_numbers.items()
    )
    drawn = ""
    for figure, draw in contents.figures.items():
        caption = _CAPTIONS[figure]
        svg = figures.to_svg(draw, f"{name}-{figure}", caption)
        shown = f"<figcaption>{html.escape(caption)}</figcaption>"
        drawn += f"<figure>{svg}{shown}</figure>\n"
    raised = "".join(f"<li>{html.escape(x)}</li>" for x in contents.raised_damping)
    if raised:
        raised = f"<h2>Blocks with raised damping</h2>\n<ul>{raised}</ul>\n"
    verdict = "".join(f"<p>{html.escape(x)}</p>" for x in contents.verdict)
    return (
        f'<div class="verdict">{verdict}</div>\n<div class="cards">{cards}</div>\n'
        f'<h2>Figures</h2>\n<div class="figures">{drawn}</div>\n'
        f"<h2>Steps</h2>\n{_write_table(contents.steps)}"
        f"<h2>{contents.layers.name.capitalize()} after the last step</h2>\n"
        f"{_write_table(contents.layers)}{raised}"
    )


def _write_table(table: Table) -> str:
    """Write the columns that say something, in a box that scrolls on narrow screens."""
    values = {name: {row[name] for row in table.rows} for name in table.rows[0]}
    columns = [
        name
        for name, found in values.items()
        if found != {None}
        and not (name in _UNLESS_CONSTANT and len(found) == 1)
        and name not in _ONLY_IN_FIGURES
    ]
    # Names wrap, numbers do not.
    kinds = {
        name: ' class="name"' * isinstance(table.rows[0][name], str) for name in columns
    }
    titles = {name: _HEADINGS.get(name, name.replace("_", " ")) for name in columns}
    head = "".join(f"<th{kinds[n]}>{html.escape(titles[n])}</th>" for n in columns)
    body = ""
    for row in table.rows:
        cells = "".join(
            f"<td{kinds[name]}>{html.escape(_format_cell(name, row[name]))}</td>"
            for name in columns
        )
        body += f"<tr>{cells}</tr>\n"
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>\n'


def _format_cell(column: str, value: str | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return format(value, _FORMATS.get(column, "," if isinstance(value, int) else ".3g"))
