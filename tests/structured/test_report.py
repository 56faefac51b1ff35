"""Steps that remove channels: figures, tables, the command, and the page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from report_samples import KEY, MASKS, REPORTS, Reader

from lightning_woodfisher.cli.main import main
from lightning_woodfisher.reporting import figures
from lightning_woodfisher.reporting.page import build_page
from lightning_woodfisher.structured.report import (
    GroupReport,
    StructureReport,
    format_structure_steps,
)

EVIL = "net.<b>stem</b> $x$"
CHANNEL_KEY = "HAPPruningCallback{'only': [], 'exclude': [], 'network': None}"


BARE = dict.fromkeys(("latency", "loss_before", "epoch", "step"))


def step(number: int, **changes: Any) -> StructureReport:
    """Remove ``1 + number`` of 8 channels and implant two; of the other group nothing."""
    gone = tuple(range(1 + number))
    groups = (
        GroupReport(EVIL, ("a", "b", "c"), 8, number, gone, (6, 7)),
        GroupReport("fc", ("fc",), 32, 0, ()),
    )
    report = StructureReport(
        method="hap",
        structure="conv",
        measure="macs",
        target=0.25,
        groups=groups,
        parameters_dense=2000,
        parameters=1000 - number,
        macs_dense=4000,
        macs=3000 - 400 * number,
        loss_before=0.5,
        loss_after=0.75,
        seconds={"score": 1.0, "select": 0.25},
        epoch=number,
        step=12 * number,
        latency_dense=0.004,
        latency=0.003 - 0.0004 * number,
        latency_runs=7,
    )
    return dataclasses.replace(report, **changes)


STEPS = [step(0), step(1), step(3)]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- numbers


def test_shares_are_those_of_the_dense_network() -> None:
    found = STEPS[-1].metrics()
    expected = {
        "structures_removed": 4 / 40,
        "structures_implanted": 2 / 40,
        "parameters": 997,
        "parameters_dense": 2000,
        "parameters_left": 997 / 2000,
        "macs": 1800,
        "macs_dense": 4000,
        "macs_left": 0.45,
        "latency": 0.0018,
        "latency_dense": 0.004,
        "latency_left": 0.45,
        f"channels/{EVIL}": 4,
        "channels/fc": 32,
        "loss_before": 0.5,
        "loss_after": 0.75,
    }
    wanted = {f"pruning/{name}": value for name, value in expected.items()}
    assert found == pytest.approx(wanted, rel=1e-12)
    told = STEPS[-1].to_table()
    assert "4 ms → 1.8 ms (45%; medians of 7)" in told
    assert "parameters 2,000 → 997 (49.9%), MACs 4,000 → 1,800 (45.0%)" in told


def test_the_table_counts_implants_where_there_are_any() -> None:
    groups = STEPS[0].groups
    assert "; 2 of them with 1x1 filters" in STEPS[0].to_table()
    bare = dataclasses.replace(groups[0], implanted=())
    assert "1x1" not in step(0, groups=(bare, groups[1])).to_table()


def test_reports_without_times_are_read() -> None:
    plain = json.loads(json.dumps(STEPS[0].to_dict()))
    assert StructureReport.from_dict(plain) == STEPS[0]
    for name in ("latency_dense", "latency", "latency_runs"):
        del plain[name]
    old = StructureReport.from_dict(plain)
    assert old.latency is old.latency_left is None
    assert not any("latency" in name for name in old.metrics())
    assert "forward" not in old.to_table()


def test_the_table_of_steps_has_a_line_for_each() -> None:
    lines = format_structure_steps([*STEPS, step(5, **BARE)])
    cells = [re.split(r"\s{2,}", line) for line in lines.splitlines()[2:]]
    shares = ["25.0% of MACs", "36", "45.0%", "49.9%", "45%", "0.5", "0.75", "1.2"]
    assert cells[2] == ["3", "3", "36", *shares]
    assert cells[3][1] == cells[3][7] == "–"


# ---------------------------------------------------------------- figures


def spans(bars: Any) -> list[tuple[float, float]]:
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]


def test_bars_are_channels() -> None:
    left, right = figures.draw_channels(STEPS[-1]).axes
    whole, implanted, dense = left.containers
    assert spans(whole) == [(0, 2), (0, 32)]
    assert spans(implanted) == [(2, 4), (32, 32)]
    assert spans(dense) == [(0, 8), (0, 32)]
    assert all(bar.get_facecolor()[3] == 0 for bar in dense)
    assert spans(right.containers[0]) == [(0, 25), (0, 100)]
    assert spans(right.containers[1]) == [(25, 50), (100, 100)]
    assert list(right.lines[0].get_xdata()) == [90, 90]
    assert [text.get_text() for text in right.texts] == ["4 of 8", "32 of 32"]
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == [f"{EVIL} (+2)".replace("$", r"\$"), "fc"]


def test_sixty_groups_have_their_names_and_do_not_overlap() -> None:
    groups = tuple(
        dataclasses.replace(STEPS[0].groups[1], name=f"backbone.layer{i}.conv")
        for i in range(60)
    )
    figure = figures.draw_channels(step(0, groups=groups))
    figures.to_pixels(figure)
    left, right = figure.axes
    for texts in (left.get_yticklabels(), right.texts):
        assert len(texts) == 60
        boxes = [text.get_window_extent() for text in texts]
        assert all(a.y0 >= b.y1 for a, b in zip(boxes, boxes[1:], strict=False))
        assert all(figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 for box in boxes)
    many = figures.draw_channels(step(0, groups=groups * 3))
    assert len(many.axes[0].get_yticks()) == 60
    assert many.get_figheight() < 18


def test_what_is_left_begins_with_the_dense_network() -> None:
    upper, lower = figures.draw_network_size(STEPS).axes
    lines = {line.get_label(): line for line in upper.lines}
    courses = [line for line in upper.lines if line.get_drawstyle() == "steps-post"]
    assert [list(line.get_ydata()) for line in courses] == [
        pytest.approx([100, 75, 65, 45, 45]),
        pytest.approx([100, 50, 49.95, 49.85, 49.85]),
        pytest.approx([100, 97.5, 95, 90, 90]),
        pytest.approx([100, 75, 65, 45, 45]),
    ]
    assert courses[0].get_xdata()[0] < 0
    assert list(lines["MACs 45.0 %"].get_xdata()) == [0, 1, 3]
    assert list(lines["target (macs)"].get_ydata()) == [75, 75, 75]
    before, after = lower.lines
    assert set(before.get_ydata()) == {0.5}
    assert set(after.get_ydata()) == {0.75}
    assert upper.get_ylim() == (0, 104)
    slow = dataclasses.replace(STEPS[-1], latency=2 * STEPS[-1].latency_dense)
    assert figures.draw_network_size([slow]).axes[0].get_ylim() == (0, 208)
    bare = step(0, **BARE)
    upper, lower = figures.draw_network_size([bare]).axes
    assert len(upper.lines) == 7
    assert lower.texts[0].get_text() == "not measured (measure_loss)"


# ---------------------------------------------------------------- the command


def state(reports: Any, masks: Any) -> dict[str, Any]:
    plain = [report.to_dict() for report in reports]
    return {"version": 1, "masks": masks, "done": [], "reports": plain}


def test_a_checkpoint_of_both_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    states = {KEY: state(REPORTS, MASKS), CHANNEL_KEY: state(STEPS, {})}
    torch.save({"callbacks": states, "state_dict": {}}, "last.ckpt")
    assert main(["report", "last.ckpt", "--html", "page.html"]) == 0
    told = capsys.readouterr().out
    assert told.index(KEY) < told.index(REPORTS[-1].to_table())
    assert told.index(CHANNEL_KEY) < told.index(format_structure_steps(STEPS))
    assert told.index("Channels after the last") < told.index(STEPS[-1].to_table())
    page = Path("page.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.tags.count("svg") == 7 + 2
    assert reader.tags.count("table") == 2 + 2
    assert "script" not in reader.tags
    assert EVIL in reader.texts
    assert {"4 → 1.8 ms", "36 of 40", "45.0%", "50.0%"} <= set(reader.texts)
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(names)) == len(names)


def test_a_file_of_report_path(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.json").write_text(json.dumps([report.to_dict() for report in STEPS]))
    assert main(["report", "r.json"]) == 0
    told = capsys.readouterr().out
    assert STEPS[-1].to_table() in told
    assert "Layers after" not in told
    old = build_page("old", {"": [step(0, latency=None)]}, {})
    assert "forward pass of one sample" not in old
