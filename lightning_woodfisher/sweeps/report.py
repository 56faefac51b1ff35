"""The results of a sweep, and the best setting for each sparsity."""

from __future__ import annotations

__all__ = ["TARGET", "SweepReport", "SweepResult"]

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.base.text_table import format_number, format_table

#: Name of the target sparsity in a setting.
TARGET = "target_sparsity"
# Parts of the names of metrics that are better when smaller.
_SMALLER_IS_BETTER = ("loss", "err", "perplexity", "ppl", "mse", "mae", "nll")


@dataclass(frozen=True)
class SweepResult:
    """The result of one setting.

    Attributes:
        setting: value of every swept name that makes a difference, among them
            ``target_sparsity``.
        metrics: metrics of the evaluation; empty if the step failed.
        sparsity: share of zeros among the selected weights after the step.
        predicted_increase: loss increase of the quadratic model; None without a model.
        measured_increase: loss increase on the samples of the gradients; None if it was
            not measured.
        seconds: seconds of the pruning step.
        error: message of the error if the step failed; None otherwise.
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
    """The results of a sweep.

    Attributes:
        before: metrics of the given network, before any step.
        results: one result for each setting, in the order of the grid.
        collections: number of times that shared gradients were collected.
    """

    before: Mapping[str, float]
    results: tuple[SweepResult, ...]
    collections: int

    def best(
        self, metric: str | None = None, larger_is_better: bool | None = None
    ) -> tuple[SweepResult, ...]:
        """Find the best setting for each sparsity.

        Args:
            metric: name of the metric; None for the first one.
            larger_is_better: None decides by the metric's name: a loss or an error is
                better when it is smaller.

        Returns:
            One result for each target sparsity, in rising order; settings whose metric
            is NaN or missing are ignored.
        """
        metric = self.choose_metric(metric)
        if larger_is_better is None:
            larger_is_better = not any(p in metric.lower() for p in _SMALLER_IS_BETTER)
        sign = 1.0 if larger_is_better else -1.0
        found: dict[float, list[SweepResult]] = {}
        for result in self.results:
            if not math.isnan(result.metrics.get(metric, math.nan)):
                found.setdefault(float(result.setting[TARGET]), []).append(result)
        return tuple(
            # The first one of equals.
            max(found[target], key=lambda result: sign * result.metrics[metric])
            for target in sorted(found)
        )

    def choose_metric(self, metric: str | None = None) -> str:
        """Check the name of a metric.

        Args:
            metric: name of the metric; None for the first one.

        Returns:
            The name.

        Raises:
            ConfigurationError: if the evaluation does not return this metric.
        """
        if metric is None:
            return next(iter(self.before))
        if metric not in self.before:
            raise ConfigurationError(
                f"the evaluation has no metric {metric!r}; it has {', '.join(self.before)}."
                f"{nearest(metric, self.before)}"
            )
        return metric

    def to_table(
        self, metric: str | None = None, larger_is_better: bool | None = None
    ) -> str:
        """Format the results as a text table that marks the best of each sparsity.

        Args:
            metric: see :meth:`best`; the table has all metrics.
            larger_is_better: see :meth:`best`.

        Returns:
            Lines of equal width, and a line for each setting that failed.
        """
        best = self.best(metric, larger_is_better)
        names = list(dict.fromkeys([TARGET, *self.varying()]))
        head = ("", *names, *self.before, "measured rise", "predicted rise", "seconds")
        metrics = (format_number(value, ".4g") for value in self.before.values())
        rows = [("before", *[""] * len(names), *metrics, *["–"] * 3)]
        rows += [
            (
                "best" if any(result is one for one in best) else "",
                *(str(result.setting.get(name, "–")) for name in names),
                *(
                    format_number(result.metrics.get(name), ".4g")
                    for name in self.before
                ),
                format_number(result.measured_increase, ".4g"),
                format_number(result.predicted_increase, ".4g"),
                format_number(result.seconds, ".1f"),
            )
            for result in self.results
        ]
        failed = [
            f"failed: {_format_setting(result.setting, names)}: {result.error}"
            for result in self.results
            if result.error is not None
        ]
        return "\n".join([format_table(head, rows), *failed])

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON.

        Returns:
            Nested dicts, tuples, numbers, strings and None.
        """
        return dataclasses.asdict(self)

    def varying(self) -> list[str]:
        """List the names that have several values.

        Returns:
            Names in the order of the grid.
        """
        values: dict[str, set[str]] = {}
        for result in self.results:
            for name, value in result.setting.items():
                values.setdefault(name, set()).add(repr(value))
        return [name for name, distinct in values.items() if len(distinct) > 1]


def _format_setting(setting: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={setting[name]}" for name in names if name in setting)
