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
    collection,
    inverse,
    masks,
    output,
    passes,
    recursion,
    scaling,
    timing,
)
from lightning_woodfisher.benchmark.cases import (
    PRESETS,
    Case,
    custom_case,
    preset_cases,
    slice_case,
)
from lightning_woodfisher.benchmark.networks import (
    ResNet20,
    make_resnet20,
    random_images,
)
from lightning_woodfisher.benchmark.recursion import (
    KERNELS,
    Plan,
    choose_plan,
    invert_by_recursion,
    merge_units,
    read_diagonal,
)
from lightning_woodfisher.benchmark.step import measure_step
from lightning_woodfisher.benchmark.structures import (
    load_torchvision_network,
    measure_structures,
)
from lightning_woodfisher.cli.main import main
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.resources.network_shapes import SHAPES
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.partition import make_partition

CPU = torch.device("cpu")


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the actions that the progress bar has shown."""
    done: list[str] = []

    class Bar(timing.tqdm):  # type: ignore[misc]
        def set_description(
            self, desc: str | None = None, refresh: bool = True
        ) -> None:
            done.append(str(desc))

    monkeypatch.setattr(timing, "tqdm", Bar)
    return done


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
        runs = merge_units(make_partition([11, 12], 4, 1))
        inverses = invert_by_recursion(rows, runs, 0.1, Plan(kernel, blocks_at_once))
        for run, blocks in zip(runs, inverses, strict=True):
            for index, block in enumerate(blocks):
                start = run.start + index * run.size
                expected = dense_inverse(rows[:, start : start + run.size], 0.1)
                torch.testing.assert_close(block, expected, rtol=1e-9, atol=1e-12)
        diagonal = read_diagonal(inverses)
        assert diagonal.shape == (23,)
        expected = dense_inverse(rows[:, 4:8], 0.1).diagonal()
        torch.testing.assert_close(diagonal[4:8], expected)

    def test_runs_cover_what_the_partition_covers(self) -> None:
        partition = make_partition([1000, 7, 1003], 10, 1)
        runs = merge_units(partition)
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

        monkeypatch.setattr(recursion, "_seconds_per_block", seconds)
        rows = torch.randn(20, 13_000)
        runs = merge_units(make_partition([13_000], 10, 1))
        assert choose_plan(rows, runs, 0.1) == Plan("mixed", 512)
        assert {plan.kernel for plan in tried} == set(KERNELS)
        # From a part of the blocks that fits a small cache to all 1300.
        assert {plan.blocks_at_once for plan in tried} == {256, 512, 1024, 1300}

    def test_every_plan_can_be_tried(self) -> None:
        rows = torch.randn(20, 130)
        runs = merge_units(make_partition([130], 10, 1))
        assert choose_plan(rows, runs, 0.1).blocks_at_once == 13


class TestFloor:
    def test_counts_of_small_products_by_hand(self) -> None:
        def count(*sizes: Any) -> float:
            return inverse.count_floor_operations(custom_case(*sizes))

        # One block of 3 weights and 5 rows: 5·3·3 for half of GᵀG, 3³ for the factors.
        assert count(5, 3, 3) == 45 + 27
        # Two such blocks cost twice as much.
        assert count(5, 3, 6) == 2 * (45 + 27)
        # Two rows, a block of 7: GGᵀ by halves is 2·2·7, the triangular solve 2·2·7.
        assert count(2, 7, 7) == 28 + 28
        assert count(2, None, 7) == 28 + 28

    def test_rate_counts_multiplications_and_additions(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ticks = iter(range(100))
        monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
        # Every product takes "one second".
        assert inverse.measure_gemm_rate(CPU, size=8) == 2 * 8**3

    def test_the_floor_is_that_of_the_rate(self) -> None:
        # One second of work at 2e9 operations a second.
        row = _row(case=custom_case(1000, None, 1000), timing=_timing(4.0))
        row = inverse.add_floor(row, 2e9)
        assert (row.floor_seconds, row.floor_share) == (1.0, 0.25)


class TestRows:
    def test_scale_and_repeatability(self) -> None:
        rows = inverse.draw_rows(400, 500, CPU)
        assert torch.equal(rows, inverse.draw_rows(400, 500, CPU))
        # The median row has the scale 1e-3, and the factors spread by e.
        spread = rows.std(dim=1).log()
        assert abs(float(spread.median()) - math.log(1e-3)) < 0.2
        assert abs(float(spread.std()) - 1.0) < 0.15

    def test_half_of_the_variance_is_common(self) -> None:
        rows = inverse.draw_rows(400, 500, CPU).double()
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
        self, sizes: tuple[int, int, int], names: list[str], progress: list[str]
    ) -> None:
        rows = inverse.measure_case(
            custom_case(*sizes),
            repeats=2,
            engines=("auto", names[2]),  # type: ignore[arg-type]
            with_update=True,
        )
        assert [row.engine for row in rows] == names
        assert progress == names * 2
        for row in rows:
            assert row.case == custom_case(*sizes)
            assert row.error < 1e-4
            assert len(row.timing.runs) == 2
            seconds = row.timing.seconds
            assert row.ratio == pytest.approx(rows[0].timing.seconds / seconds)
            assert row.processor_ratio is not None
            assert (row.update_seconds is None) == (row.engine == "recursion")

    def test_the_full_fisher_has_one_engine_and_no_recursion(self) -> None:
        (row,) = inverse.measure_case(
            custom_case(10, None, 60), repeats=1, engines=("primal", "dual")
        )
        assert row.engine == "full"
        assert row.ratio is None
        assert row.error < 1e-5

    @pytest.mark.parametrize("block_size", [5, None])
    def test_error_sees_a_wrong_diagonal(self, block_size: int | None) -> None:
        case = custom_case(12, block_size, 20)
        rows = inverse.draw_rows(12, 20, CPU)
        partition = make_partition([20], 5, 1)
        whole = dense_inverse(rows, inverse.DAMPING).diagonal()
        blocks = torch.cat(
            [dense_inverse(g, inverse.DAMPING).diagonal() for g in rows.split(5, dim=1)]
        )
        right = whole if block_size is None else blocks
        errors = inverse.measure_errors(
            rows, partition, case, {"right": right, "wrong": right * 1.25}
        )
        assert errors["right"] < 1e-7
        assert errors["wrong"] == pytest.approx(0.25)


class TestPresets:
    def test_resnet20_is_the_network_that_is_measured(self) -> None:
        shapes = [tuple(p.shape) for p in prunable_parameters(ResNet20()).values()]
        assert shapes == list(SHAPES["resnet20"].values())

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_slice_is_about_as_large_as_asked(self, preset: str) -> None:
        for whole in preset_cases(preset):
            case = slice_case(whole, 300_000)
            assert case.total_weights == whole.weights
            assert case.weights <= 450_000
            if preset not in {"headline", "resnet20"}:
                assert case.weights >= 250_000
                assert case.total_weights == _count_weights(SHAPES[preset])

    def test_without_a_limit_everything_is_measured(self) -> None:
        (case,) = preset_cases("bert_base")
        assert case.weights == case.total_weights == _count_weights(SHAPES["bert_base"])

    def test_a_slice_has_whole_blocks_of_every_tensor(self) -> None:
        case = Case("case", 1, 10, (1000, 50, 3), 1053)
        assert slice_case(case, 300).segments == (280, 10, 3)
        assert slice_case(case, 2000) == case


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
        if timing.describe_memory_measure(CPU).startswith("not"):
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

    def test_warm_up_is_not_measured(self, progress: list[str]) -> None:
        runs: list[int] = []
        timings = timing.measure_alternately(
            {"a": lambda: runs.append(1)}, 2, CPU, warm_up=3, track_memory=False
        )
        assert len(runs) == len(progress) == 5
        assert len(timings["a"].runs) == 2
        assert timings["a"].peak_bytes is None


class TestTraining:
    def test_collection_measures_every_method(self) -> None:
        rows = collection.measure_collection(
            make_resnet20(CPU, 2), random_images(3, 8), repeats=1
        )
        methods = ["batched", "loop", "vmap", "collect_gradients"]
        assert [row.method for row in rows] == methods
        assert rows[0].ratio == 1.0
        assert {row.samples for row in rows} == {3}

    def test_the_methods_give_the_same_gradients(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The unit's gradient is the mean of the rows of the loop, and of vmap's."""
        data = random_images(4, 8)
        model = ResNet20(2).eval()
        seen: list[Any] = []
        grad = torch.autograd.grad

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append(grad(*args, **kwargs))
            return seen[-1]

        rows = torch.empty(4, sum(p.numel() for p in _weights(model)))
        collection.collect_by_loop(model, data, rows)
        monkeypatch.setattr(torch.autograd, "grad", spy)
        collection.run_batches(model, data, 4, _weights(model))
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
        collection._collect_by_vmap(model, data)
        (per_sample,) = outputs
        flat = torch.cat([g.mean(dim=0).reshape(-1) for g in per_sample.values()])
        torch.testing.assert_close(flat, mean, rtol=1e-4, atol=1e-6)

    def test_the_published_step_gives_the_same_mask_and_weights(self) -> None:
        rows = measure_step(make_resnet20(CPU, 2), random_images(24, 8), 12, repeats=1)
        assert [row.method for row in rows] == [
            "loop + recursion",
            "ours, independent",
            "ours, joint",
        ]
        assert rows[0].ratio == rows[0].equal_mask == 1.0
        assert all(row.equal_mask > 0.99 for row in rows)

    def test_steps_are_compared_with_passes_over_their_samples(
        self, monkeypatch: pytest.MonkeyPatch, progress: list[str]
    ) -> None:
        samples: list[int] = []
        run, prune = passes.run_batches, passes.prune

        def counted_run(model: nn.Module, data: Any, *others: Any) -> None:
            samples.append(len(data))
            run(model, data, *others)

        def counted_prune(*args: Any, fisher: Any, **options: Any) -> Any:
            samples.append(fisher.num_gradients * fisher.gradient_batch_size)
            return prune(*args, fisher=fisher, **options)

        monkeypatch.setattr(passes, "run_batches", counted_run)
        monkeypatch.setattr(passes, "prune", counted_prune)
        model = make_resnet20(CPU, 2)
        before = [weight.clone() for weight in _weights(model)]
        rows = passes.measure_passes(
            "tiny", model, random_images(24, 8), FisherConfig(8, 3), repeats=1
        )
        assert samples == [24] * 6
        assert progress == ["plain passes", "step of prune()", "step in training"] * 2
        assert all(map(torch.equal, before, _weights(model)))
        plain, *steps = rows
        assert (plain.passes, plain.processor_passes) == (1.0, 1.0)
        assert plain.batchnorm_passes == 0.0
        for row in steps:
            assert (row.num_gradients, row.gradient_batch_size, row.block_size) == (
                8,
                3,
                256,
            )
            assert row.passes == row.timing.seconds / plain.timing.seconds
            assert 0.0 < row.batchnorm_passes < row.passes

    def test_masks_are_applied_in_half_of_the_steps_and_alone(
        self, monkeypatch: pytest.MonkeyPatch, progress: list[str]
    ) -> None:
        calls: list[str] = []
        for name in ("apply_to_gradients", "apply"):
            real = getattr(Masks, name)

            def counted(self: Masks, real: Any = real, name: str = name) -> None:
                calls.append(name)
                real(self)

            monkeypatch.setattr(Masks, name, counted)
        model = nn.Linear(6, 10)
        before = model.weight.detach().clone()
        networks = {"tiny": (model, torch.randn(4, 6))}
        (row,) = masks.measure_masks(networks, 2)
        assert (row.network, row.masked, row.steps) == ("tiny", 1, 2)
        steps = 2 + masks._WARM_UP_STEPS
        assert progress == ["plain", "masked", "masks"] * steps
        # Both passes in each step with masks, and once more alone.
        assert calls == ["apply_to_gradients", "apply"] * 2 * steps
        assert row.ratio == pytest.approx(row.masked_seconds / row.plain_seconds)
        assert 0 < row.mask_seconds < row.masked_seconds
        assert not torch.equal(model.weight, before)


class TestScaling:
    @pytest.mark.slow
    def test_two_processes(self) -> None:
        rows = scaling.measure_scaling(
            2, make_resnet20(CPU, 2), random_images(6, 8), 40, repeats=1
        )
        assert [row.world_size for row in rows] == [1, 2]
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
        none = comm.exchange(rows[:0].double(), [1, 3, 2], [1, 0, 0]).wait()
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
        full = custom_case(10, None, 100)
        rows = [_row(timing=_timing(1 / 3)), _row(engine="dual", case=full, ratio=None)]
        machine = _machine()
        content = json.loads(output.to_json(machine, {"inverse": rows}))
        for row, plain in zip(rows, content["tables"]["inverse"], strict=True):
            case = Case(
                plain["case"],
                plain["num_gradients"],
                plain["block_size"],
                tuple(plain["segments"]),
                plain["total_weights"],
            )
            timing_ = timing.Timing(
                tuple(plain["runs"]), plain["cores"], plain["peak_bytes"]
            )
            names = {field.name for field in dataclasses.fields(row)}
            others = {name: plain[name] for name in names - {"case", "timing"}}
            assert inverse.InverseRow(case=case, timing=timing_, **others) == row
            assert plain["seconds"] == row.timing.seconds
            assert plain["weights"] == row.case.weights
        assert output.Machine(**content["machine"]) == machine

    @pytest.mark.parametrize(
        ("engine", "cores", "busy"),
        [
            ("primal", 0.55, True),
            ("primal", 0.95, False),
            ("recursion", 0.3, True),
        ],
    )
    def test_missing_processor_time_is_noticed(
        self, monkeypatch: pytest.MonkeyPatch, engine: str, cores: float, busy: bool
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        rows = [_row(), _row(engine=engine, timing=_timing(2.0, cores))]
        machine = output.describe_machine(CPU, 1e9, 0.0, rows)
        assert machine.busy is busy

    def test_a_scaled_figure_is_marked(self) -> None:
        row = _row(case=Case("case", 10, 5, (100,), 400))
        text = output.format_rows([row])
        assert "a slice of 100 of 400 weights" in text
        assert "scaled to all (not measured): 8 s" in text
        assert "slice" not in output.format_rows([_row()])

    def test_png_without_matplotlib_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(["benchmark", "--device", "cpu", "--png", "x.png"]) == 2
        assert "pip install" in capsys.readouterr().err


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return list(prunable_parameters(model).values())


def _count_weights(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _timing(seconds: float, cores: float = 1.0) -> timing.Timing:
    return timing.Timing((seconds,), cores, 1000)


def _row(**changes: Any) -> inverse.InverseRow:
    row = inverse.InverseRow(
        case=custom_case(10, 5, 100),
        engine="primal",
        plan="",
        timing=_timing(2.0),
        ratio=3.0,
        processor_ratio=2.5,
        error=1e-7,
        update_seconds=None,
        floor_seconds=0.5,
        floor_share=0.25,
    )
    return dataclasses.replace(row, **changes)


def _machine() -> output.Machine:
    return output.Machine("cpu", 2, 2, 0.1, "2.0", 1e9, "resident", False)


class TestStructures:
    def test_every_method_is_measured_against_the_gradient_pass(
        self, progress: list[str]
    ) -> None:
        pytest.importorskip("torch_pruning")
        rows = measure_structures(
            make_resnet20(CPU, 4), random_images(6, 8), batch_size=4, repeats=2
        )
        assert len(progress) == 3 * len(rows) == 15
        unit, hessian, _, true, sampled = rows
        assert unit.ratio == 1.0
        assert hessian.pair_bytes is None
        assert true.pair_bytes == sampled.pair_bytes == 8 * 6 * unit.structures
        assert {row.squared_bytes for row in rows} == {4 * unit.structures**2}
        # The first convolution of each block: shortcuts that pad bar the others.
        assert unit.structures == 3 * (4 + 8 + 16)
        assert output.format_rows(rows).count("\n") == 6

    def test_unknown_networks_are_refused(self) -> None:
        pytest.importorskip("torchvision")
        with pytest.raises(ConfigurationError, match="resnet51"):
            load_torchvision_network("resnet51")
