"""The package keeps its layout: few names at its root, and folders that say what they do."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from documentation import ROOT

PACKAGE = ROOT / "lightning_woodfisher"
FOLDERS = sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))


def is_ignored(path: Path) -> bool:
    return path.name == "__pycache__" or path.name.startswith(".")


def test_the_root_has_four_files_and_at_most_seventeen_folders() -> None:
    found = [path for path in PACKAGE.iterdir() if not is_ignored(path)]
    files = {path.name for path in found if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "one_shot.py", "py.typed"}
    folders = [path for path in found if path.is_dir()]
    assert len(folders) <= 17
    assert [path.name for path in folders if not (path / "__init__.py").is_file()] == []


def count_sentences(text: str) -> int:
    """Count the places where a sentence ends: a stop before a capital or at the end."""
    return len(re.findall(r"[.!?](?=\s+[A-Z:`(]|\s*$)", text))


def test_sentences_are_counted() -> None:
    assert count_sentences("Fisher.") == 1
    assert count_sentences("Rows ``[n, D_r]``, e.g. of a layer, go in.\n") == 1
    assert count_sentences("One idea.\n\nAnother one, in fisher/base.py. A third.") == 3


@pytest.mark.parametrize(
    "folder", FOLDERS, ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_each_folder_says_what_it_is_for(folder: Path) -> None:
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    assert count_sentences(docstring) >= 2, docstring
