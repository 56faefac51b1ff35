"""The benchmark: results of the baseline, counts of operations, output. No times."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.benchmark import (
    inverse,
    output,
    recursion,
    scaling,
    timing,
    training,
)
from lightning_woodfisher.benchmark.networks import ResNet20
from lightning_woodfisher.benchmark.presets import (
    PRESETS,
    custom_case,
    preset_cases,
    slice_case,
)
from lightning_woodfisher.benchmark.recursion import (
    KERNELS,
    Plan,
    block_runs,
    choose_plan,
    recursion_diagonal,
    recursion_inverse,
)
from lightning_woodfisher.benchmark.structures import (
    measure_structures,
    torchvision_network,
)
from lightning_woodfisher.cli.main import main
from lightning_woodfisher.resources.network_shapes import SHAPES, count_weights
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.partition import make_partition

CPU = torch.device("cpu")


def dense_inverse(rows: Tensor, damping: float) -> Tensor:
    fisher = damping * torch.eye(rows.shape[1], dtype=torch.float64)
    for row in rows.double():
        fisher += torch.outer(row, row) / len(rows)
    return torch.linalg.inv(fisher)


class TestRecursion:
    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("blocks_at_once", [1, 2, 100])
    def test_equals_the_dense_inverse(self, kernel: str, blocks_at_once: int) -> None:
        rows = torch.randn(9, 23, generator=torch.Generator().manual_seed(0)).double()
        runs = block_runs(make_partition([11, 12], 4, 1))
        inverses = recursion_inverse(rows, runs, 0.1, Plan(kernel, blocks_at_once))
        for run, blocks in zip(runs, inverses, strict=True):
            for index, block in enumerate(blocks):
                start = run.start + index * run.size
                expected = dense_inverse(rows[:, start : start + run.size], 0.1)
                torch.testing.assert_close(block, expected, rtol=1e-9, atol=1e-12)
        diagonal = recursion_diagonal(inverses)
        assert diagonal.shape == (23,)
        expected = dense_inverse(rows[:, 4:8], 0.1).diagonal()
        torch.testing.assert_close(diagonal[4:8], expected)

    def test_runs_cover_what_the_partition_covers(self) -> None:
        partition = make_partition([1000, 7, 1003], 10, 1)
        runs = block_runs(partition)
        weights = [w for run in runs for w in range(run.start, run.stop)]
        assert weights == list(range(2010))
        assert [(r.size, r.count) for r in runs] == [
            (10, 100),
            (7, 1),
            (10, 100),
            (3, 1),
        ]

    def test_the_fastest_plan_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tried: list[Plan] = []

        def seconds(rows: Tensor, run: object, damping: float, plan: Plan) -> float:
            tried.append(plan)
            return 1.0 if plan == Plan("mixed", 512) else 2.0

        monkeypatch.setattr(recursion, "_seconds_of_a_block", seconds)
        rows = torch.randn(20, 13_000)
        runs = block_runs(make_partition([13_000], 10, 1))
        assert choose_plan(rows, runs, 0.1) == Plan("mixed", 512)
        assert {plan.kernel for plan in tried} == set(KERNELS)
        # From a part of the blocks that fits a small cache to all 1300.
        assert {plan.blocks_at_once for plan in tried} == {256, 512, 1024, 1300}

    def test_every_plan_can_be_tried(self) -> None:
        rows = torch.randn(20, 130)
        runs = block_runs(make_partition([130], 10, 1))
        assert choose_plan(rows, runs, 0.1).blocks_at_once == 13


class TestFloor:
    def test_counts_of_small_products_by_hand(self) -> None:
        # One block of 3 weights and 5 rows: 5·3·3 for half of GᵀG, 3³ for the factors.
        assert inverse.floor_operations(5, 3, 3) == 45 + 27
        # Two such blocks cost twice as much.
        assert inverse.floor_operations(5, 3, 6) == 2 * (45 + 27)
        # Two rows, a block of 7: GGᵀ by halves is 2·2·7, the triangular solve 2·2·7.
        assert inverse.floor_operations(2, 7, 7) == 28 + 28
        assert inverse.floor_operations(2, None, 7) == 28 + 28
        assert inverse.floor_operations(5, 3, 3, "dual") == 2 * 5 * 5 * 3

    def test_rate_counts_multiplications_and_additions(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ticks = iter(range(100))
        monkeypatch.setattr(inverse.time, "perf_counter", lambda: float(next(ticks)))
        # Every product takes "one second".
        assert inverse.gemm_rate(CPU, size=8) == 2 * 8**3

    def test_a_better_rate_lowers_the_floor(self) -> None:
        row = inverse.with_rate(_row(), 1e9, 2e9)
        assert (row.floor_seconds, row.floor_share) == (0.25, 0.125)


class TestRows:
    def test_scale_and_repeatability(self) -> None:
        rows = inverse.make_rows(400, 500, CPU)
        assert torch.equal(rows, inverse.make_rows(400, 500, CPU))
        # The median row has the scale 1e-3, and the factors spread by e.
        spread = rows.std(dim=1).log()
        assert abs(float(spread.median()) - math.log(1e-3)) < 0.2
        assert abs(float(spread.std()) - 1.0) < 0.15

    def test_half_of_the_variance_is_common(self) -> None:
        rows = inverse.make_rows(400, 500, CPU).double()
        values = torch.linalg.svdvals(rows / rows.norm(dim=1, keepdim=True)).square()
        assert 0.4 < float(values[:16].sum() / values.sum()) < 0.65


class TestMeasureCase:
    @pytest.mark.parametrize(
        ("sizes", "names"),
        [
            ((30, 8, 100), ["recursion", "primal", "dual"]),
            ((6, 40, 100), ["recursion", "dual", "primal"]),
        ],
    )
    def test_rows_of_blocks(
        self, sizes: tuple[int, int, int], names: list[str]
    ) -> None:
        done: list[str] = []
        rows = inverse.measure_case(
            custom_case(*sizes),
            1e9,
            repeats=2,
            engines=("auto", names[2]),  # type: ignore[arg-type]
            with_update=True,
            tick=done.append,
        )
        assert [row.engine for row in rows] == names
        assert done == names * 2
        for row in rows:
            assert (row.num_gradients, row.block_size, row.weights) == sizes
            assert row.error < 1e-4
            assert len(row.runs) == 2
            assert row.ratio == pytest.approx(rows[0].seconds / row.seconds)
            assert row.processor_ratio is not None
            assert row.floor_share == pytest.approx(row.floor_seconds / row.seconds)
            assert (row.update_seconds is None) == (row.engine == "recursion")

    def test_the_full_fisher_has_no_recursion(self) -> None:
        (row,) = inverse.measure_case(custom_case(10, None, 60), 1e9, repeats=1)
        assert row.engine == "full"
        assert row.ratio is None
        assert row.error < 1e-5

    @pytest.mark.parametrize("block_size", [5, None])
    def test_error_sees_a_wrong_diagonal(self, block_size: int | None) -> None:
        case = custom_case(12, block_size, 20)
        rows = inverse.make_rows(12, 20, CPU)
        partition = make_partition([20], 5, 1)
        whole = dense_inverse(rows, inverse.DAMPING).diagonal()
        blocks = torch.cat(
            [dense_inverse(g, inverse.DAMPING).diagonal() for g in rows.split(5, dim=1)]
        )
        right = whole if block_size is None else blocks
        errors = inverse.reference_error(
            rows, partition, case, {"right": right, "wrong": right * 1.25}
        )
        assert errors["right"] < 1e-7
        assert errors["wrong"] == pytest.approx(0.25)


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "total"),
        [
            # 3·9·16 + 6·16²·9 + (16·32 + 5·32²)·9 + (32·64 + 5·64²)·9 + 640
            ("resnet20", 268_336),
            # Published 25,557,032 less 53,120 of BatchNorm and 1,000 biases.
            ("resnet50", 25_502_912),
            # Published 4,231,976 less 21,888 of BatchNorm and 1,000 biases.
            ("mobilenetv1", 4_209_088),
            # Twelve layers of 12·768² and the pooler.
            ("bert_base", 12 * 12 * 768**2 + 768**2),
            # The same, patches of 768·3·16², 1000 classes.
            ("vit_b", 12 * 12 * 768**2 + 768 * 768 + 768_000),
            # Published 6,738,415,616 less 32000·4096 embedded and 65·4096 of norms.
            ("llama7b", 6_607_077_376),
        ],
    )
    def test_totals(self, name: str, total: int) -> None:
        assert count_weights(SHAPES[name]) == total

    def test_resnet20_is_the_network_that_is_measured(self) -> None:
        shapes = [tuple(p.shape) for p in prunable_parameters(ResNet20()).values()]
        assert shapes == list(SHAPES["resnet20"].values())


class TestPresets:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_slice_is_about_as_large_as_asked(self, preset: str) -> None:
        for whole in preset_cases(preset):
            case = slice_case(whole, 300_000)
            assert case.total_weights == whole.weights
            assert case.weights <= 450_000
            if preset not in {"headline", "resnet20"}:
                assert case.weights >= 250_000
                assert case.total_weights == count_weights(SHAPES[preset])

    def test_without_a_limit_everything_is_measured(self) -> None:
        (case,) = preset_cases("bert_base")
        assert case.weights == case.total_weights == count_weights(SHAPES["bert_base"])

    def test_a_slice_has_whole_blocks_of_every_tensor(self) -> None:
        assert inverse.slice_segments([1000, 50, 3], 300, 10) == (280, 10, 3)
        assert inverse.slice_segments([1000, 50, 3], None, 10) == (1000, 50, 3)

    def test_sizes_are_checked(self) -> None:
        with pytest.raises(ConfigurationError, match="at least 1"):
            custom_case(0, 1, 1)


class TestTiming:
    def test_actions_take_turns(self) -> None:
        order: list[str] = []
        timings = timing.measure_alternately(
            {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU
        )
        assert order == ["a", "b"] * 3
        assert len(timings["a"].runs) == 3

    def test_seconds_are_the_median(self) -> None:
        assert timing.Timing((5.0, 1.0, 2.0), 1.0, None).seconds == 2.0

    def test_peak_memory_counts_what_is_gone_again(self) -> None:
        if timing.memory_measure(CPU).startswith("not"):
            pytest.skip("the system does not tell the peak")
        # 64 MB live for a moment only; the other action allocates next to nothing.
        timings = timing.measure_alternately(
            {"large": lambda: torch.ones(16_000_000).sum(), "small": lambda: None},
            2,
            CPU,
        )
        large, small = timings["large"].peak_bytes, timings["small"].peak_bytes
        assert large is not None
        assert small is not None
        assert 60e6 < large < 100e6
        assert small < 20e6

    def test_lines_without_tqdm(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _forbid(monkeypatch, "tqdm.auto")
        with timing.show_progress(2) as tick:
            tick("one")
            tick("two")
        assert capsys.readouterr().err == "[1/2] one\n[2/2] two\n"


class TestTraining:
    def test_collection_measures_every_way(self) -> None:
        rows = training.measure_collection(3, repeats=1, width=2, image_size=8)
        ways = ["batched", "loop", "vmap", "collect_gradients"]
        assert [row.way for row in rows] == ways
        assert rows[0].ratio == 1.0

    def test_the_ways_give_the_same_gradients(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The unit's gradient is the mean of the rows of the loop, and of vmap's."""
        data = training.RandomImages(4, 8)
        model = ResNet20(2).eval()
        seen: list[Any] = []
        grad = torch.autograd.grad

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append(grad(*args, **kwargs))
            return seen[-1]

        rows = torch.empty(4, sum(p.numel() for p in _weights(model)))
        training._run_loop(model, data, 4, rows)
        monkeypatch.setattr(torch.autograd, "grad", spy)
        training._run_batched(model, data)
        (batched,) = seen
        mean = torch.cat([g.reshape(-1) for g in batched])
        torch.testing.assert_close(rows.mean(dim=0), mean, rtol=1e-4, atol=1e-6)
        monkeypatch.undo()
        vmap = torch.func.vmap
        outputs: list[dict[str, Tensor]] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            inner = vmap(*args, **kwargs)

            def call(*inputs: Any) -> Any:
                outputs.append(inner(*inputs))
                return outputs[-1]

            return call

        monkeypatch.setattr(torch.func, "vmap", record)
        training._run_vmap(model, data)
        (per_sample,) = outputs
        flat = torch.cat([g.mean(dim=0).reshape(-1) for g in per_sample.values()])
        torch.testing.assert_close(flat, mean, rtol=1e-4, atol=1e-6)

    def test_the_published_step_gives_the_same_mask_and_weights(self) -> None:
        rows = training.measure_step(24, 12, repeats=1, width=2, image_size=8)
        assert [row.way for row in rows] == [
            "loop + recursion",
            "ours, independent",
            "ours, joint",
        ]
        assert rows[0].ratio == rows[0].equal_mask == 1.0
        assert all(row.equal_mask > 0.99 for row in rows)

    def test_masks_are_applied_in_half_of_the_steps(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[str] = []
        passes: list[str] = []
        for name in ("apply_to_gradients", "apply"):
            real = getattr(Masks, name)

            def counted(masks: Masks, real: Any = real, name: str = name) -> None:
                passes.append(name)
                real(masks)

            monkeypatch.setattr(Masks, name, counted)
        model = nn.Linear(6, 10)
        before = model.weight.detach().clone()
        networks = {"tiny": (model, torch.randn(4, 6))}
        (row,) = training.measure_masks(2, networks=networks, tick=done.append)
        assert (row.network, row.masked, row.steps) == ("tiny", 1, 2)
        assert len(done) == 2 + training.WARM_UP_STEPS
        assert passes == ["apply_to_gradients", "apply"] * len(done)
        assert row.ratio == pytest.approx(row.masked_seconds / row.plain_seconds)
        assert 0 < row.mask_seconds < row.masked_seconds
        assert not torch.equal(model.weight, before)


class TestScaling:
    def test_two_processes(self) -> None:
        done: list[str] = []
        rows = scaling.measure_scaling(
            2, 6, 40, repeats=1, width=2, image_size=8, tick=done.append
        )
        assert [row.world_size for row in rows] == [1, 2]
        assert done == ["1 processes", "2 processes"]
        one, two = rows
        assert one.speedup == 1.0
        assert len(two.state_bytes) == 2
        # The state is shared: together the two hold what one held.
        assert sum(two.state_bytes) == sum(one.state_bytes)

    def test_a_silent_exchange_has_the_shape_of_a_real_one(self) -> None:
        comm = scaling.SilentCommunicator()
        comm.rank, comm.world_size = 1, 3
        rows = torch.arange(12.0).view(2, 6)
        received = comm.exchange(rows, [1, 3, 2], [2, 2, 0]).wait()
        assert received.tolist() == [[1.0, 2.0, 3.0]] * 4
        none = comm.exchange(None, [1, 3, 2], [1, 0, 0], torch.float64).wait()
        assert none.shape == (1, 3)
        assert none.dtype == torch.float64
        assert comm.bytes_sent == 0


class TestCommand:
    def test_a_tiny_case_from_the_command_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        paths = tmp_path / "b.json", tmp_path / "b.png"
        arguments = ["benchmark", "--device", "cpu", "--repeats", "1"]
        arguments += ["--case", "12,5,40", "--case", "6,full,40"]
        arguments += ["--json", str(paths[0]), "--png", str(paths[1])]
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert "recursion" in shown
        assert "GFLOP/s" in shown
        content = json.loads(paths[0].read_text())
        rows = content["tables"]["inverse"]
        assert [r["engine"] for r in rows] == ["recursion", "primal", "full"]
        assert content["machine"]["threads"] == torch.get_num_threads()
        assert paths[1].read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--json", "no/such/b.json"], "no such folder"),
            (["--png", "b.png", "--masks"], "--preset or --case"),
        ],
    )
    def test_it_fails_before_the_measurement(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        assert main(["benchmark", "--device", "cpu", *arguments]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("case", ["1,2", "0,1,1", "a,b,c", "4,-1,4"])
    def test_a_bad_case_is_refused(
        self, case: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(["benchmark", "--case", case])
        assert exit_.value.code == 2
        assert "--case" in capsys.readouterr().err


class TestOutput:
    def test_json_gives_every_number_back(self) -> None:
        rows = [_row(seconds=1 / 3), _row(engine="dual", block_size=None, ratio=None)]
        machine = _machine()
        content = json.loads(output.to_json(machine, {"inverse": rows}))
        read = [
            inverse.InverseRow(**{**row, "runs": tuple(row["runs"])})
            for row in content["tables"]["inverse"]
        ]
        assert read == rows
        assert output.Machine(**content["machine"]) == machine

    @pytest.mark.parametrize(
        ("changes", "busy"),
        [
            ({"engine": "primal", "cores": 0.55}, True),
            ({"engine": "primal", "cores": 0.95}, False),
            ({"engine": "recursion", "cores": 0.3}, True),
        ],
    )
    def test_missing_processor_time_is_noticed(
        self, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], busy: bool
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        tables = {"inverse": [_row(cores=1.0), _row(**changes)]}
        machine = output.describe_machine(CPU, 1e9, 0.0, "resident", tables)
        assert machine.busy is busy

    def test_a_scaled_figure_is_marked(self) -> None:
        row = _row(weights=100, total_weights=400, seconds=2.0, scaled_seconds=8.0)
        text = output.format_table([row])
        assert "a slice of 100 of 400 weights" in text
        assert "scaled to all (not measured): 8 s" in text
        assert "slice" not in output.format_table([_row()])

    def test_png_without_matplotlib_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        _forbid(monkeypatch, "matplotlib.figure")
        with pytest.raises(
            ConfigurationError, match="--png needs matplotlib.*pip install"
        ):
            output.write_figure([_row()], _machine(), tmp_path / "x.png")


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return list(prunable_parameters(model).values())


def _row(**changes: Any) -> inverse.InverseRow:
    row = inverse.InverseRow(
        case="case",
        num_gradients=10,
        block_size=5,
        weights=100,
        total_weights=100,
        engine="primal",
        how="",
        seconds=2.0,
        scaled_seconds=2.0,
        runs=(2.0,),
        cores=1.0,
        ratio=3.0,
        processor_ratio=2.5,
        floor_seconds=0.5,
        floor_share=0.25,
        peak_bytes=1000,
        error=1e-7,
        update_seconds=None,
    )
    return dataclasses.replace(row, **changes)


def _machine() -> output.Machine:
    return output.Machine("cpu", 2, 2, 0.1, "2.0", 1e9, "resident", False)


def _forbid(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make every import of a module fail."""
    monkeypatch.setitem(sys.modules, module, None)


class TestStructures:
    def test_every_way_is_measured_against_the_gradient_pass(self) -> None:
        pytest.importorskip("torch_pruning")
        done: list[str] = []
        rows = measure_structures(
            ResNet20(4).eval(),
            samples=6,
            batch_size=4,
            image_size=8,
            repeats=2,
            tick=done.append,
        )
        assert len(done) == 3 * len(rows) == 15
        unit, hessian, _, true, sampled = rows
        assert unit.ratio == 1.0
        assert hessian.pair_bytes is None
        assert true.pair_bytes == sampled.pair_bytes == 8 * 6 * unit.structures
        assert {row.squared_bytes for row in rows} == {4 * unit.structures**2}
        # The first convolution of each block: shortcuts that pad bar the others.
        assert unit.structures == 3 * (4 + 8 + 16)
        assert output.format_table(rows).count("\n") == 6

    def test_unknown_networks_are_refused(self) -> None:
        pytest.importorskip("torchvision")
        with pytest.raises(ConfigurationError, match="resnet51"):
            torchvision_network("resnet51")
