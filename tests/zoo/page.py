"""Write docs/reference/networks.md from the results of the zoo.

python -m tests.zoo.page
"""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from tests.zoo.catalogue import LIBRARIES, catalogue, is_installed
from tests.zoo.checks import CHECKS
from tests.zoo.results import RESULTS, ROOT, read_results

PAGE = ROOT / "docs" / "reference" / "networks.md"
HEADINGS = {
    "unstructured": "single weights",
    "layerwise": "layer-wise",
    "sosp": "SOSP",
    "hap": "HAP",
}
INTRODUCTION = """\
`make zoo` prunes networks of other libraries, each in a process of its own, with random \
weights, small inputs and few samples, and `python -m tests.zoo.page` writes this page from \
what it found, here with {versions}. A network passes, or it is refused in one sentence and \
its weights are as they were.

- **Single weights** (`WoodFisherPruningCallback`): exactly 60 % of the weights are zero, \
outputs are finite, all masks hold after each of three optimizer steps, and the report reads \
back from JSON. Layers without gradients, such as auxiliary classifiers in evaluation mode, \
stay dense with a warning and do not count. Detectors need `fisher.model_mode="train"`.
- **Channels** (`SOSPPruningCallback` in a fit, HAP by `prune_structures`): at least 20 % of \
the multiply-accumulates are gone. In float64 the masked and the smaller network differ by at \
most 1e-9 of the largest output. The parameters and multiply-accumulates of the report are \
exactly those that PyTorch counts on the smaller network, and a saved one loads with the same \
bits (SOSP).

The work of R-CNNs depends on the number of proposals, and so on the weights. Reports count \
the proposals of the network before pruning; here they are always as many.\
"""
Results = Mapping[tuple[str, ...], Mapping[str, Any]]


def table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def count_passed(results: Results) -> list[str]:
    """Count what has passed, by family and check."""
    checks = [check for check in CHECKS if any(key[2] == check for key in results)]
    families: dict[str, int] = defaultdict(int)
    for network in catalogue():
        families[network.family] += 1

    def count(check: str, *families: str) -> str:
        found = [
            one["status"] == "passed"
            for (family, _, name), one in results.items()
            if name == check and family in families
        ]
        return f"{sum(found)} of {len(found)}" if found else ""

    totals = ["all", str(sum(families.values()))]
    return table(
        [
            ["family", "networks", *(HEADINGS[check] for check in checks)],
            *(
                [name, str(size), *(count(check, name) for check in checks)]
                for name, size in families.items()
            ),
            totals + [count(check, *families) for check in checks],
        ]
    )


def shorten(reason: str) -> str:
    """Reduce a message to why, without names of layers and advice."""
    _, is_without_group, reasons = reason.partition("exclude=[]. ")
    if is_without_group:
        # Numbers differ between layers with the same reason.
        found = {
            re.sub(r"\d+", "", why): why
            for why in (part.partition(": ")[2] or part for part in reasons.split("; "))
        }
        reason = f"no group of channels is left: {'; '.join(found.values())}"
    return re.split(r"; (?:use|lower) |\. (?:Pass|Use) ", reason)[0].replace("|", "/")


def list_refusals(results: Results) -> list[str]:
    """List what has not passed, and why."""
    rows = [
        [
            name,
            HEADINGS[check],
            "**fails**: " * (one["status"] == "failed") + shorten(one["reason"]),
        ]
        for (_, name, check), one in results.items()
        if one["status"] != "passed"
    ]
    return table([["network", "method", "reason"], *sorted(rows)])


def list_networks(results: Results) -> Iterator[str]:
    """List the names of each family, and those that were not run."""
    checked = {key[:2] for key in results}
    names: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for network in catalogue():
        is_left = (network.family, network.name) not in checked
        names[network.family, is_left].append(network.name)
    for (family, is_left), found in sorted(names.items()):
        title = f"Not run for their size ({family})" if is_left else f"**{family}**"
        text = f"{title}: {', '.join(sorted(found))}."
        yield from ["", textwrap.fill(text, 98, break_on_hyphens=False)]


def render(results: Results) -> str:
    """Write the page."""
    libraries = ["torch", *filter(is_installed, LIBRARIES)]
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    known = {(network.family, network.name) for network in catalogue()}
    results = {key: one for key, one in results.items() if key[:2] in known}
    introduction = [
        textwrap.fill(part, 98, subsequent_indent="  " * part.startswith("-"))
        for part in INTRODUCTION.format(versions=versions).split("\n")
    ]
    lines = [
        "# Tested networks",
        "",
        *introduction,
        "",
        *count_passed(results),
        "",
        "## What is refused, and why",
        "",
        *list_refusals(results),
        "",
        "## Names",
        *list_networks(results),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(read_results(RESULTS)), encoding="utf-8")
