"""Read Markdown pages: blocks of code, commands, links and anchors."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n+)?"
    r"^```(?P<language>[\w{}-]*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^]]*\]\(([^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    ``reason`` says why it is not run; it comes from a comment
    ``<!-- not run: reason -->`` before it.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Return all fenced blocks of a page, in order."""
    content = page.read_text()
    return [
        Block(
            page,
            content.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["text"],
            found["reason"],
        )
        for found in _BLOCK.finditer(content)
    ]


def read_prose(page: Path) -> str:
    """Return the text outside of the blocks."""
    return _BLOCK.sub("", page.read_text())


def split_commands(text: str) -> list[list[str]]:
    """Split a shell block into the words of each command, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def read_commands(page: Path) -> list[list[str]]:
    """Return the commands of a page: in shell blocks, after ``$`` and in the text."""
    commands = []
    for block in read_blocks(page):
        if block.language in {"bash", "shell"} and block.reason is None:
            commands += split_commands(block.text)
        elif block.language == "text":
            shown = re.findall(r"^\$ (.*)$", block.text, re.M)
            commands += [shlex.split(line) for line in shown]
    starts = ("lightning-woodfisher ", "python -m ", "python examples/", "python docs/")
    starts += ("make ",)
    inline = [c for c in _INLINE.findall(read_prose(page)) if c.startswith(starts)]
    return commands + [shlex.split(command) for command in inline]


def read_links(page: Path) -> list[str]:
    """Return the targets of the links and figures of a page."""
    return _LINK.findall(_INLINE.sub("", read_prose(page)))


def anchors(page: Path) -> set[str]:
    """Return what a link may name after ``#``: headings."""
    prose = read_prose(page)
    headings = re.findall(r"^#{1,6} +(.*?) *$", prose, re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }
