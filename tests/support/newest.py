"""Print the installed version of everything that the package and its tests depend on.

``make lock`` writes them to ``tests/newest.txt``.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
NAME = "lightning-woodfisher"
# Builds of torch for one platform pull them in.
_OF_ONE_PLATFORM = re.compile(r"^(nvidia|cuda|triton)")


def declared() -> list[Requirement]:
    """Read the requirements of the package, its extras and its dependency groups."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    groups = project["dependency-groups"].values()
    lists = [project["project"]["dependencies"], *extras, *groups]
    texts = [text for group in lists for text in group if isinstance(text, str)]
    found = map(Requirement, texts)
    return [one for one in found if canonicalize_name(one.name) != NAME]


def installed() -> dict[str, str]:
    """Find the installed versions of all requirements, and of theirs, by name."""
    versions: dict[str, str] = {}
    pending = declared()
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        one = pending.pop()
        name = canonicalize_name(one.name)
        if (name, frozenset(one.extras)) in seen or _OF_ONE_PLATFORM.match(name):
            continue
        seen.add((name, frozenset(one.extras)))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        versions[name] = found.version
        for text in found.requires or ():
            new = Requirement(text)
            environments = [{"extra": extra} for extra in one.extras or {""}]
            if new.marker is None or any(map(new.marker.evaluate, environments)):
                pending.append(new)
    return versions


if __name__ == "__main__":
    print("# The versions that the tests passed with last.")
    for name, version in sorted(installed().items()):
        print(f"{name}=={version}")
