"""What the settings of a sweep have given, and which is the best for each sparsity."""

from __future__ import annotations

__all__ = ["TARGET", "SweepReport", "SweepResult"]

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.pruning.report import format_table

#: Name of the target sparsity in a setting.
TARGET = "target_sparsity"
# Stages of the names of metrics that are better when smaller.
_SMALLER_IS_BETTER = ("loss", "err", "perplexity", "ppl", "mse", "mae", "nll")


@dataclass(frozen=True)
class SweepResult:
    """What became of one setting.

    Attributes:
        setting: value of every swept name that makes a difference, among them
            ``target_sparsity``.
        metrics: what the evaluation gave; empty when the step failed.
        sparsity: share of the selected weights that was zero.
        predicted_increase: rise of the loss by the quadratic model; None without one.
        measured_increase: on the samples of the gradients; None when not measured.
        seconds: of the pruning step.
        error: why the step failed; None when it did not.
    """

    setting: Mapping[str, Any]
    metrics: Mapping[str, float]
    sparsity: float | None = None
    predicted_increase: float | None = None
    measured_increase: float | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class SweepReport:
    """What a sweep found.

    Attributes:
        dense: metrics of the network as it was given.
        results: one for each setting, in the order of the grid.
        collections: how many times gradients were collected to be shared.
    """

    dense: Mapping[str, float]
    results: tuple[SweepResult, ...]
    collections: int

    def best(
        self, metric: str | None = None, larger_is_better: bool | None = None
    ) -> tuple[SweepResult, ...]:
        """Find the best setting for each sparsity.

        Args:
            metric: by which; None for the first one.
            larger_is_better: None goes by the metric's name: a loss or an error is better
                when it is smaller.

        Returns:
            One result for each target sparsity, in rising order.
        """
        metric = self.choose_metric(metric)
        if larger_is_better is None:
            larger_is_better = not any(p in metric.lower() for p in _SMALLER_IS_BETTER)
        sign = 1.0 if larger_is_better else -1.0
        found: dict[float, SweepResult] = {}
        for result in self.results:
            if (
                metric not in result.metrics
                or result.metrics[metric] != (result.metrics[metric])
            ):
                continue
            target = float(result.setting[TARGET])
            other = found.get(target)
            if other is None or sign * result.metrics[metric] > (
                sign * other.metrics[metric]
            ):
                found[target] = result
        return tuple(found[target] for target in sorted(found))

    def choose_metric(self, metric: str | None = None) -> str:
        """Check the name of a metric.

        Args:
            metric: None for the first one.

        Returns:
            A metric that every evaluation gives.

        Raises:
            ConfigurationError: for one that the evaluation does not give.
        """
        if metric is None:
            return next(iter(self.dense))
        if metric not in self.dense:
            raise ConfigurationError(
                f"the evaluation gives no metric {metric!r} but {', '.join(self.dense)}."
                f"{nearest(metric, self.dense)}"
            )
        return metric

    def to_table(
        self, metric: str | None = None, larger_is_better: bool | None = None
    ) -> str:
        """Draw the results as a text table, the best of each sparsity with a star.

        Args:
            metric: see :meth:`best`; all metrics are shown.
            larger_is_better: see :meth:`best`.

        Returns:
            Lines of equal width, and a line for each setting that failed.
        """
        best = self.best(metric, larger_is_better)
        names = [TARGET, *self.varying(TARGET)]
        head = ("", *names, *self.dense, "measured rise", "predicted rise", "seconds")
        nothing = ("–",) * 3
        rows: list[tuple[str, ...]] = [
            ("dense", *[""] * len(names), *map(_number, self.dense.values()), *nothing)
        ]
        for result in self.results:
            rows.append(
                (
                    "best" if any(result is one for one in best) else "",
                    *(str(result.setting.get(name, "–")) for name in names),
                    *(_number(result.metrics.get(name)) for name in self.dense),
                    _number(result.measured_increase),
                    _number(result.predicted_increase),
                    "–" if result.seconds is None else f"{result.seconds:.1f}",
                )
            )
        failed = [
            f"failed: {_describe(result.setting, names)}: {result.error}"
            for result in self.results
            if result.error is not None
        ]
        return "\n".join([format_table(head, rows), *failed])

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON.

        Returns:
            Nested dicts, lists, numbers, strings and None.
        """
        return {
            "dense": dict(self.dense),
            "collections": self.collections,
            "results": [
                {
                    **dataclasses.asdict(result),
                    "setting": dict(result.setting),
                    "metrics": dict(result.metrics),
                }
                for result in self.results
            ],
        }

    def varying(self, *but: str) -> list[str]:
        """List the names that have several values.

        Args:
            but: names to leave out.

        Returns:
            Names in the order of the grid.
        """
        names = dict.fromkeys(name for r in self.results for name in r.setting)
        return [
            name
            for name in names
            if name not in but
            and len({repr(r.setting[name]) for r in self.results if name in r.setting})
            > 1
        ]


def _describe(setting: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={setting[name]}" for name in names if name in setting)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
