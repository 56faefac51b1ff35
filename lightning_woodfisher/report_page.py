"""One HTML page about a pruned run: nothing in it is loaded from anywhere."""

from __future__ import annotations

__all__ = ["build_page"]

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_woodfisher import figures
from lightning_woodfisher.report import SALIENCY_SHARES, PruningReport

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
    runs: Mapping[str, Sequence[PruningReport]],
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
            parts.append(f"<h2>{_text(title)}</h2>")
        parts.append(_section(f"run{number}", reports, masks.get(title, {})))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Pruning report – {_text(source)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Pruning report</h1>\n"
        f'<div class="dim">{_text(source)}</div>\n{"".join(parts)}</body>\n</html>\n'
    )


def _section(
    name: str, reports: Sequence[PruningReport], masks: Mapping[str, Tensor]
) -> str:
    last = reports[-1]
    raised = "".join(
        f"<li>{_text(block)}: λ = {damping:.3g}</li>"
        for block, damping in last.raised_damping.items()
    )
    if raised:
        raised = f"<h2>Blocks with raised damping</h2>\n<ul>{raised}</ul>\n"
    return (
        f"{_cards(reports)}<h2>Figures</h2>\n"
        f'<div class="figures">{_figures(name, reports, masks)}</div>\n'
        f"<h2>Steps</h2>\n{_steps(reports)}"
        f"<h2>Layers after the last step</h2>\n{_layers(last)}{raised}"
    )


def _cards(reports: Sequence[PruningReport]) -> str:
    last = reports[-1]
    cards = {
        "zeros": f"{last.sparsity:.2%}",
        "weights pruned": f"{last.zeros:,} of {last.weights:,}",
        "criterion": last.criterion,
        "pruning steps": f"{len(reports)}",
        "ranks": f"{last.world_size}",
    }
    if last.loss_before is not None and last.loss_after is not None:
        cards["loss in the last step"] = (
            f"{last.loss_before:.3g} → {last.loss_after:.3g}"
        )
    if last.flops_share is not None:
        cards["FLOPs left"] = f"{last.flops_share:.1%}"
    if last.damping is not None:
        cards["damping λ"] = f"{last.damping:.3g}"
    shown = "".join(
        f"<div><b>{_text(value)}</b>{_text(label)}</div>"
        for label, value in cards.items()
    )
    return f'<div class="cards">{shown}</div>\n'


def _figures(
    name: str, reports: Sequence[PruningReport], masks: Mapping[str, Tensor]
) -> str:
    last = reports[-1]
    small = {
        n: masks[n]
        for n in figures.small_layers({n: m.shape for n, m in masks.items()})
    }
    drawn: list[tuple[Callable[[], Any], str, str]] = [
        (
            lambda: figures.draw_course(reports),
            "course",
            "Zeros after each step, and the mean loss just before and after it.",
        ),
        (
            lambda: figures.draw_increase(reports),
            "increase",
            "The quadratic model predicts a rise of the loss for each step; was it right? "
            "Below zero the step has lowered the loss.",
        ),
        (
            lambda: figures.draw_layers(last),
            "layers",
            "Layers that the loss can spare get sparser than others.",
        ),
        (
            lambda: figures.draw_schedule(reports),
            "schedule",
            "Zeros of each layer after each step, in per cent.",
        ),
        (
            lambda: figures.draw_saliencies(last),
            "saliencies",
            "Where the saliencies of each layer lay, and the largest that was removed.",
        ),
    ]
    if last.local_model:
        drawn.append(
            (
                lambda: figures.draw_local_model(last),
                "local",
                "Loss along the way from the weights before the step to those after it.",
            )
        )
    if small:
        drawn.append(
            (
                lambda: figures.draw_masks(small),
                "masks",
                "Kept weights are black; a white row is an output without any weight, a white "
                "column an unused input.",
            )
        )
    return "".join(
        f"<figure>{figures.to_svg(draw, f'{name}-{kind}', caption)}"
        f"<figcaption>{_text(caption)}</figcaption></figure>\n"
        for draw, kind, caption in drawn
    )


def _steps(reports: Sequence[PruningReport]) -> str:
    head = ["step", "epoch", "optimizer steps", "target", "zeros", "predicted rise"]
    head += ["measured rise", "loss before", "loss after", "parts", "seconds"]
    rows = [
        [
            f"{number}",
            _count(report.epoch),
            _count(report.step),
            f"{report.target_sparsity:.2%}",
            f"{report.sparsity:.2%}",
            _number(report.predicted_increase),
            _number(report.measured_increase),
            _number(report.loss_before),
            _number(report.loss_after),
            f"{report.parts}",
            f"{sum(report.seconds.values()):.1f}",
        ]
        for number, report in enumerate(reports, start=1)
    ]
    return _table(head, rows)


def _layers(report: PruningReport) -> str:
    head = ["layer", "shape", "weights", "zeros", "share", "largest saliency gone"]
    head += ["λ", "predicted rise", *(f"saliency {q:.0%}" for q in SALIENCY_SHARES)]
    rows = [
        [
            layer.name,
            "×".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            f"{layer.zeros_after:,}",
            f"{layer.sparsity:.2%}",
            _number(layer.threshold),
            _number(report.damping_of(layer)),
            _number(layer.predicted_increase),
            *(
                map(_number, layer.saliency_quantiles)
                if layer.saliency_quantiles
                else ["–"] * len(SALIENCY_SHARES)
            ),
        ]
        for layer in report.layers
    ]
    return _table(head, rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>\n{body}</table></div>\n'


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
