"""The file with the results of the zoo: a line of JSON for each check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "runs" / "zoo" / "results.jsonl"
_KEYS = ("family", "network", "check")


def read_results(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Read the latest result of each check, by family, network and check."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    results = map(json.loads, lines)
    return {tuple(one[key] for key in _KEYS): one for one in results}


def append_result(path: Path, result: Mapping[str, Any]) -> None:
    """Add the result of a check."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
