"""``lightning-woodfisher report``: what it reads, what it prints, and the page."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from report_samples import EVIL, KEY, MASKS, REPORTS, Reader, step

from lightning_woodfisher.cli.main import main
from lightning_woodfisher.cli.messages import explain_wandb
from lightning_woodfisher.pruning.report import LayerReport, PruningReport
from lightning_woodfisher.reporting import figures
from lightning_woodfisher.reporting.page import build_page


def write_json(path: str, reports: list[PruningReport] = REPORTS) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps([report.to_dict() for report in reports]))


def write_checkpoint(path: str, reports: list[PruningReport] = REPORTS) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    state = {"reports": [r.to_dict() for r in reports], "masks": MASKS}
    state |= {"version": 1, "done": []}
    torch.save({"callbacks": {KEY: state, "Other": {}}, "state_dict": {}}, path)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["report", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["report", *arguments]) == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("path", ["a.ckpt", "a.json", "sharded/meta.pt"])
def test_tables(capsys: pytest.CaptureFixture[str], path: str) -> None:
    (write_json if path.endswith("json") else write_checkpoint)(path)
    told = printed(capsys, path.removesuffix("/meta.pt"))
    lines = [line.split()[:7] for line in told.splitlines()]
    assert ["3", "7", "84", "20.00%", "31.80%", "0.002", "-3e-05"] in lines
    assert REPORTS[-1].to_table() in told


def test_the_newest_of_a_folder_that_has_reports(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_json("run/old/report.json", [step(1)])
    write_checkpoint("run/checkpoints/last.ckpt", [step(5)])
    torch.save({"state_dict": {}}, "run/newest.ckpt")
    Path("run/hparams.json").write_text("{}")
    for age, name in enumerate(
        ["hparams.json", "newest.ckpt", "checkpoints/last.ckpt", "old/report.json"]
    ):
        os.utime(f"run/{name}", (1e9 - age, 1e9 - age))
    assert "run/checkpoints/last.ckpt" in printed(capsys, "run")
    os.utime("run/old/report.json")
    assert "run/old/report.json" in printed(capsys, "run")


def test_a_truncated_newest_checkpoint_is_named_and_the_next_one_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_checkpoint("run/epoch=1.ckpt", [step(1)])
    write_checkpoint("run/last.ckpt", [step(5)])
    last = Path("run/last.ckpt")
    last.write_bytes(last.read_bytes()[:-300])
    os.utime("run/epoch=1.ckpt", (1e9, 1e9))
    assert main(["report", "run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("run/epoch=1.ckpt\n")
    assert "run/last.ckpt is not a checkpoint, or it is cut off" in shown.err


def test_two_callbacks_make_two_tables(capsys: pytest.CaptureFixture[str]) -> None:
    plain = [
        {"reports": [step(e).to_dict()], "masks": {}, "version": 1, "done": []}
        for e in (1, 2)
    ]
    keys = [KEY, KEY.replace("[]", "['fc']", 1)]
    torch.save({"callbacks": dict(zip(keys, plain, strict=True))}, "two.ckpt")
    told = printed(capsys, "two.ckpt")
    assert all(key in told for key in keys)
    assert told.count("\nselected") == 2


@pytest.mark.parametrize(
    ("make", "path", "remedy"),
    [
        (lambda: None, "nowhere.ckpt", "does not exist; give a checkpoint"),
        (
            lambda: torch.save({"state_dict": {}, "callbacks": {"A": {}}}, "a.ckpt"),
            "a.ckpt",
            "has no state of a pruning callback",
        ),
        (lambda: write_checkpoint("a.ckpt", []), "a.ckpt", "give a later one"),
        (lambda: write_json("a.json", []), "a.json", "give a later one"),
        (
            lambda: torch.save({"hyper_parameters": Path()}, "a.ckpt"),
            "a.ckpt",
            "no code in the file is run",
        ),
        (lambda: Path("a.ckpt").write_text("{}"), "a.ckpt", "is not a checkpoint"),
        (
            lambda: torch.save(
                {"callbacks": {KEY: {"version": 9, "masks": {}, "done": []}}}, "a.ckpt"
            ),
            "a.ckpt",
            "has version 9",
        ),
        (
            lambda: Path("a.json").write_text("[1]"),
            "a.json",
            "not written by report_path",
        ),
        (
            lambda: Path("a.json").write_text('[{"groups": '),
            "a.json",
            "(Expecting value: line 1 column 13 (char 12)); give the file that report_path",
        ),
        (lambda: Path("run").mkdir(), "run", "no checkpoint (*.ckpt) and no JSON"),
        (
            lambda: (Path("run").mkdir(), Path("run/pruning_steps.csv").touch()),
            "run",
            "tables of CSVLogger, which are not enough for a report: pruning_steps.csv",
        ),
        (lambda: write_json("run/a.json", []), "run", "give a later one"),
    ],
)
def test_errors_say_what_to_do(
    capsys: pytest.CaptureFixture[str], make: Any, path: str, remedy: str
) -> None:
    make()
    message = refused(capsys, path)
    assert remedy in message
    assert "Traceback" not in message


def test_a_page_that_cannot_be_written_is_refused_before_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_json("a.json")
    assert "--html='a.json/a.html' cannot be written" in refused(
        capsys, "a.json", "--html", "a.json/a.html"
    )


def test_a_page_needs_matplotlib_and_the_table_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json("a.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "fc.weight" in printed(capsys, "a.json")
    assert "lightning-woodfisher[figures]" in refused(
        capsys, "a.json", "--html", "a.html"
    )
    assert not Path("a.html").exists()


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page() -> str:
    metrics = {"val_accuracy": 0.875, "val_loss": 0.5, "val_auroc": 0.75}
    full = [
        dataclasses.replace(
            report,
            loss_recalibrated=0.2375,
            logged_before=metrics,
            logged_after={**metrics, "val_accuracy": 0.8125},
            flops_dense=1000,
            flops_after=625.0,
            stages=number,
        )
        for number, report in enumerate(REPORTS, start=1)
    ]
    return build_page("runs/<b>x</b>.ckpt", {"": full}, {"": MASKS}, {"": 2})


def test_the_page_holds_all_and_loads_nothing(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert reader.tags.count("svg") == 7
    assert reader.tags.count("table") == 2
    assert all(link.startswith(("#", "data:image/png;")) for link in reader.links)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    everything = " ".join(reader.texts)
    for report in REPORTS:
        assert f"{report.sparsity:.2%}" in everything
    assert "fc.weight from weight 0: λ = 0.01" in everything
    assert "but 2 planned steps were not done" in everything
    assert "val_accuracy was 0.875 before pruning and is 0.8125 now." in everything
    assert "0.875 → 0.8125" in reader.texts
    assert EVIL in reader.texts
    assert "runs/<b>x</b>.ckpt" in reader.texts
    assert "prefers-color-scheme: dark" in page


def test_names_inside_the_page_are_there_once(page: str) -> None:
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(names)) == len(names)
    for link in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page):
        assert (link[0] or link[1]) in names
    # The same figure of another callback on the page.
    other = figures.to_svg(lambda: figures.draw_layers(REPORTS[-1]), "run1-layers", "")
    assert set(re.findall(r'\bid="([^"]*)"', other)).isdisjoint(names)


def _chromium() -> str | None:
    found = (shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


@pytest.mark.spawns
@pytest.mark.skipif(_chromium() is None, reason="needs a Chromium browser")
@pytest.mark.parametrize(
    ("width", "scheme"), [(420, "light"), (420, "dark"), (1100, "light")]
)
def test_a_browser_lays_it_out(
    page: str, width: int, scheme: str, tmp_path: Path
) -> None:
    # Written by the page itself after layout: the policy is lifted for this script only.
    probe = """<script>const f = [...document.querySelectorAll("svg, table, .cards")];
      document.title = JSON.stringify({
        sizes: f.map(e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height]),
        wide: document.documentElement.scrollWidth > innerWidth,
        scrolls: [...document.querySelectorAll(".scroll")]
          .map(e => e.scrollWidth - e.clientWidth),
        paper: getComputedStyle(document.body).backgroundColor,
        ink: [...document.querySelectorAll("svg text")].map(e => getComputedStyle(e).fill),
        loaded: performance.getEntriesByType("resource").map(e => e.name)
          .filter(name => !name.startsWith("data:"))})</script>"""
    open_page = re.sub(r"<meta http-equiv=.*>\n", "", page)
    path = Path("page.html")
    path.write_text(open_page.replace("</body>", f"{probe}</body>"))
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--window-size={width},900 --dump-dom"
    )
    command = [
        str(_chromium()),
        *options.split(),
        f"--user-data-dir={tmp_path}/browser",
    ]
    command.append(f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")
    command.append(path.absolute().as_uri())
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr[-2000:]
    seen = json.loads(html.unescape(title[1]))
    assert len(seen["sizes"]) == 10
    assert all(width > 200 and height > 60 for width, height in seen["sizes"])
    assert not seen["wide"]
    # On a screen of 1,100 pixels every column of a table is in sight.
    assert width < 1000 or seen["scrolls"] == [0, 0]
    assert seen["loaded"] == []
    light, dark = "rgb(255, 255, 255)", "rgb(22, 24, 28)"
    assert seen["paper"] == (light if scheme == "light" else dark)
    ink = {"light": "rgb(31, 35, 41)", "dark": "rgb(230, 232, 235)"}[scheme]
    assert seen["ink"].count(ink) > 50


# ---------------------------------------------------------------- figures


def test_layers_are_drawn_as_reported() -> None:
    axes = figures.draw_layers(REPORTS[-1]).axes[0]
    # However many layers there are, all bars of a color are one object.
    after, before = axes.collections
    bars = [path.get_extents() for path in after.get_paths()]
    assert [bar.x1 for bar in bars] == pytest.approx([100 * 170 / 288, 100 * 17 / 300])
    assert [(bar.x0, bar.y0, bar.y1) for bar in bars] == [(0, -0.4, 0.4), (0, 0.6, 1.4)]
    bars = [path.get_extents() for path in before.get_paths()]
    assert [bar.x1 for bar in bars] == pytest.approx([100 * 50 / 288, 0])
    assert axes.get_ylim() == (1.5, -0.5)


def test_the_heatmap_is_layers_by_steps() -> None:
    axes = figures.draw_schedule(REPORTS).axes[0]
    shares = axes.images[0].get_array()
    assert shares.tolist() == [
        [pytest.approx(100 * (100 + 10 * e) / 288) for e in (3, 4, 7)],
        [pytest.approx(100 * (10 + e) / 300) for e in (3, 4, 7)],
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "4", "7"]
    assert len(axes.texts) == 6


def test_a_measured_fall_is_on_the_axis() -> None:
    axes = figures.draw_loss_increase(REPORTS).axes[0]
    predicted, measured, zero = axes.lines
    assert predicted.get_xydata().tolist() == [[3, 2e-3], [4, 2e-3], [7, 2e-3]]
    assert measured.get_ydata().tolist() == [-3e-5, 3e-5, -3e-5]
    assert axes.get_yscale() == "symlog"
    assert list(zero.get_ydata()) == [0, 0]
    rises = [dataclasses.replace(r, measured_increase=2e-5) for r in REPORTS]
    assert figures.draw_loss_increase(rises).axes[0].get_yscale() == "log"


def test_saliencies_of_zero_are_drawn_at_the_left() -> None:
    axes = figures.draw_saliencies(REPORTS[-1]).axes[0]
    thin, thick = axes.collections
    assert thin.get_segments()[0].tolist() == [[1e-9, 0], [1e-4, 0]]
    assert thick.get_segments()[0].tolist() == [[1e-9, 0], [1e-6, 0]]
    median, gone = axes.lines
    assert median.get_xydata().tolist() == [[1e-7, 0]]
    assert gone.get_xydata().tolist() == [[1e-6, 0]]
    assert len(axes.get_yticks()) == 2


def test_many_layers_share_labels() -> None:
    layers = tuple(
        dataclasses.replace(REPORTS[0].layers[0], name=f"block.{i}.w")
        for i in range(130)
    )
    many = step(1, layers=layers)
    for figure in (figures.draw_layers(many), figures.draw_schedule([many])):
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == [f"block.{i}.w" for i in range(0, 130, 4)]
        assert figure.get_figheight() < 13


def test_old_and_bare_reports_can_be_drawn() -> None:
    layers = (LayerReport("w", (2, 2), 4, 0, 2, None, None),)
    unknown = ("predicted_increase", "measured_increase", "loss_before", "loss_after")
    unknown += ("threshold", "damping", "epoch", "step")
    bare = dataclasses.replace(
        step(0, layers=layers, raised_damping={}, local_model=()),
        **dict.fromkeys(unknown),
    )
    assert build_page("old", {"": [bare]}, {}).count("<svg") == 5
    (text,) = figures.draw_loss_increase([bare]).axes[0].texts
    assert text.get_text() == "neither predicted nor measured"
    (text,) = figures.draw_progress([bare]).axes[1].texts
    assert text.get_text() == "not measured (measure_loss)"


def test_masks_are_black_where_kept() -> None:
    shapes = {"small": (4, 6), "wide": (3, 257), "conv": (8, 4, 3, 3)}
    assert figures.small_layers(shapes) == ["small", "conv"]
    kept = torch.tensor([[True, False], [False, False]])
    picture = figures.draw_masks({"w": kept}).axes[0].images[0]
    assert picture.get_array().tolist() == [[0, 1], [1, 1]]
    assert picture.to_rgba(picture.get_array())[..., 0].tolist() == [[0, 1], [1, 1]]


def test_pixels_show_what_is_drawn() -> None:
    pixels = figures.to_pixels(figures.draw_layers(REPORTS[0]))
    assert pixels.shape[2] == 3
    colours = {tuple(int(c) for c in p) for p in pixels.reshape(-1, 3)[::7]}
    assert {(255, 255, 255), (0x3A, 0x86, 0xC8)} <= colours


# ---------------------------------------------------------------- W&B


NOT_LOGGED_IN = """
import sys, wandb
from lightning_woodfisher.cli.messages import explain_wandb
try:
    wandb.init(project="tests", dir=sys.argv[1])
except wandb.errors.UsageError as error:
    outer = RuntimeError("while fitting")
    outer.__cause__ = error
    print(explain_wandb(outer))
"""


@pytest.mark.slow
def test_errors_of_wandb_offer_the_way_without_an_account(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    # In a process of its own: wandb keeps the settings of its first start.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", NOT_LOGGED_IN, str(tmp_path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "No API key configured" in told
    assert "WANDB_MODE=offline" in told
    missing = ModuleNotFoundError("No module named 'wandb'")
    assert "lightning-woodfisher[wandb]" in str(explain_wandb(missing))
    assert explain_wandb(ValueError("wandb")) is None


def test_the_command_passes_the_remedy_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def fail(*_: Any) -> None:
        raise wandb.errors.CommError("no route to host.")

    monkeypatch.setattr("lightning_woodfisher.cli.report._read", fail)
    assert main(["report", "x"]) == 2
    assert "no route to host. Without an account" in capsys.readouterr().err
