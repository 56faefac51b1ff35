"""Read the file that W&B writes offline.

Seven bytes of header (``:W&B``, a magic number, a version), then the blocks of a LevelDB
log: 32 KiB each, in them fragments with a header of checksum, length and kind. The
fragments put together are protobuf records.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Seconds until a file must be complete.
_PATIENCE = 30.0
_HEADER = 7
_BLOCK = 32 * 1024
_FRAGMENT = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass
class OfflineRun:
    """Everything that a run has logged.

    Attributes:
        folder: of the run; media lie in ``files``.
        history: one dict for each step of W&B.
        summary: last value of every key.
        charts: settings of every custom chart, by key.
        config: settings of the run.
        artifacts: files of every artifact, by its type.
    """

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    charts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)

    def table(self, entry: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
        """Read a table that an entry of the history refers to."""
        content = json.loads((self.folder / "files" / entry["path"]).read_text())
        return content["columns"], content["data"]


def read_run(folder: Path) -> OfflineRun:
    """Read the only run below a folder."""
    path, records = _finished(folder)
    run = OfflineRun(path.parent)
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run.history.append(_values(record.history.item))
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "config":
            config = _values(record.config.update)
            run.config |= config
            run.charts |= config.get("_wandb", {}).get("visualize", {})
        elif kind == "artifact":
            files = [entry.local_path for entry in record.artifact.manifest.contents]
            run.artifacts.setdefault(record.artifact.type, []).extend(files)
    return run


def _finished(folder: Path) -> tuple[Path, list[Any]]:
    """Wait until the process that writes the file has written its end."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        paths = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
        records = [r for path in paths for r in _records(path.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            (path,) = paths
            return path, records
        if time.monotonic() > deadline:
            raise ValueError(f"{paths or folder} has no end, {len(records)} records")
        time.sleep(0.05)


def _values(items: Iterable[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        keys = list(item.nested_key) or [item.key]
        place = values
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = json.loads(item.value_json)
    return values


def _records(content: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    if not content:
        return
    if not content.startswith(b":W&B"):
        raise ValueError(f"not a W&B file: {content[:8]!r}")
    position, pieces = _HEADER, []
    while position + _FRAGMENT.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _FRAGMENT.size:  # padding
            position += left
            continue
        _, length, kind = _FRAGMENT.unpack_from(content, position)
        if kind == 0:
            return
        position += _FRAGMENT.size
        if position + length > len(content):  # it is being written
            return
        if kind in {_FULL, _FIRST}:
            pieces = []
        pieces.append(content[position : position + length])
        position += length
        if kind in {_FULL, _LAST}:
            record = Record()
            record.ParseFromString(b"".join(pieces))
            yield record
