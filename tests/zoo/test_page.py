"""The page that is written from the results."""

from __future__ import annotations

from tests.zoo.catalogue import catalogue
from tests.zoo.page import Results, render

NO_GROUP = (
    "GPT2LMHeadModel has no group of channels that can be pruned: only=[], exclude=[]. "
    "a, b: it passes 48 elements: not 64; c: it passes 192 elements: not 256; Other is no "
    "layer of torch"
)
TARGET = "target=0.2 cannot be reached; lower the target, or raise max_ratio."


def test_results_are_counted_and_reasons_are_listed() -> None:
    family = "torchvision classification"
    first, second, *_ = (one for one in catalogue() if one.family == family)
    results: Results = {
        (family, first.name, "sosp"): {"status": "refused", "reason": NO_GROUP},
        (family, second.name, "sosp"): {"status": "refused", "reason": TARGET},
        (family, first.name, "unstructured"): {"status": "passed"},
        (family, second.name, "unstructured"): {"status": "failed", "reason": "E: x|y"},
        (family, "removed from the catalogue", "sosp"): {"status": "passed"},
    }
    page = render(results)
    assert "| family | networks | single weights | SOSP |\n" in page
    assert f"| all | {len(catalogue())} | 1 of 2 | 0 of 2 |\n" in page
    assert (
        f"| {first.name} | SOSP | no group of channels is left: it passes 192 elements: not "
        "256; Other is no layer of torch |\n"
    ) in page
    assert f"| {second.name} | SOSP | target=0.2 cannot be reached |\n" in page
    assert f"| {second.name} | single weights | **fails**: E: x/y |\n" in page
    assert f"\n**{family}**: {', '.join(sorted([first.name, second.name]))}.\n" in page
