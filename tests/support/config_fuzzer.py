"""Draw random valid and invalid configurations for the fuzz tests.

Each draw starts from a valid configuration and replaces a few settings. Most of the values
are valid, some are not. Every configuration must either prune or be refused with a
:class:`ConfigurationError` before any weight changes.
"""

from __future__ import annotations

import math
import random
from typing import Any

# Values that a user may pass to any setting by mistake.
JUNK: tuple[Any, ...] = (
    None, True, False, "", "0.5", "auto", -1, 0, 1.5, math.nan, math.inf, -math.inf,
    10**30, [], [1], {}, {"a": 1}, (0.5,), object(), b"x", 1j, [None], "3 GiB", 2**70,
)  # fmt: skip

FISHER: dict[str, tuple[Any, ...]] = {
    "num_gradients": (1, 2, 3, 7, 16, 24, 500),
    "gradient_batch_size": (1, 2, 3, 99),
    "block_size": (None, 1, 2, 5, 8, 64, 10**6),
    "damping": (1e-12, 1e-4, 1e-2, 1.0, 1e6, 1, 5e-324, 1e308),
    "model_mode": ("eval", "train", "test"),
    "engine": ("auto", "primal", "dual", "full"),
    "precision": ("auto", "float32", "float64", "half"),
    "offload_rows": (False, True),
    "memory_budget": (None, "1GB", 2**30, "1 kB", 1, "x GB", "-1GB"),
    "collection": ("auto", "loop", "vmap"),
    "row_dtype": ("float32", "bfloat16", "float16"),
    "first_order_samples": (None, 1, 4, 30, 10**6),
    "sample_labels": (False, True, "drawn"),
    "centered": (False, True),
    "repeat_samples": (False, True),
    "max_nonfinite": (0, 1, 5, 10**6),
}
SELECTION: dict[str, tuple[Any, ...]] = {
    "scope": ("global", "layer", "local"),
    "include": ((), ["body"], ["Linear"], ["nothing.like.it"], ["("], "body", [".*"]),
    "exclude": ((), ["head"], ["body"], [".*"], ["["], [3]),
    "pattern": (
        "unstructured", "unstructured", "unstructured", "2:4", "1:2", "4:2", "0:4", "2:3",
        "block2", "block4", "block5", "block0", "block", "rows", "columns", "99999:100000",
    ),
    "layer_targets": (
        {}, {}, {"head": 0.3}, {"head": 0.0, "body": 0.6}, {".*": 0.5}, {"body": 1.0},
        {"(": 0.5}, {"absent": 0.1}, {"head": "0.3"}, {3: 0.3}, {"head": math.nan},
    ),
    "max_layer_sparsity": (None, None, 0.5, 0.9, 1.0, 1, 0.0, 1.1, 1e-9),
    "flops_power": (0.0, 0.0, 0.5, 1, 2.0, -1.0, math.inf, 1e300),
}  # fmt: skip
PRUNING: dict[str, tuple[Any, ...]] = {
    "target_sparsity": (0.0, 0, 0.1, 0.5, 0.9, 0.99, 1 - 1e-12, 1.0, 1, 90, -0.1, 1e-300),
    "criterion": (
        "woodfisher", "woodfisher", "woodtaylor", "kfac", "diagonal_fisher",
        "hessian_diagonal", "magnitude", "random", "",
    ),
    "flops_target": (None, None, None, 0.5, 0.9, 1.0, 0.0, 1e-6, 1.5),
}  # fmt: skip
STEP: dict[str, tuple[Any, ...]] = {
    "update": ("joint", "independent", "none", "all", None),
    "recompute_steps": (1, 1, 2, 3, 0),
    "measure_loss": (True, True, False),
    "local_model_points": (0, 0, 2, 1, 5, -1),
    "seed": (0, 1, -1, 2**31, 2**63, 2**64 + 1),
    "line_search": (False, False, True),
    "update_scale": (1.0, 0.5, 0.0, 1, -0.1, 1.1),
    "recompute_spacing": ("geometric", "linear", "polynomial", "cubic"),
    "reuse_gradients": (False, False, True),
    "trust_ratio": (None, None, 1.0, 2, 1e-9, 0.0, -1.0, math.inf),
    "batchnorm_recalibration_batches": (0, 0, 1, 3, -1),
}  # fmt: skip
SCHEDULES: dict[str, dict[str, tuple[Any, ...]]] = {
    "ConstantSchedule": {},
    "OneShotSchedule": {"epoch": (0, 1, 5, -1, 1.5), "step": (0, 1, 7, -2, "1")},
    "PolynomialSchedule": {
        "start_epoch": (0, 1, 3, -1, 0.5),
        "end_epoch": (0, 1, 2, 9, -1),
        "every_n_epochs": (1, 2, 100, 0, -1),
        "degree": (1, 3.0, 0.5, 1e-300, 1e300, 0, -1.0, math.nan, math.inf),
        "initial_sparsity": (0.0, 0.1, 0.6, 1.0, -0.1, math.nan, 0),
        "start_step": (0, 2, -1),
        "end_step": (1, 2, 8, -5),
        "every_n_steps": (1, 3, 0),
    },
}
EXTRA: dict[str, tuple[Any, ...]] = {
    "loss_method": (None, "compute_loss", "no_such_method", 3),
    "report_path": (None, None, "report.json"),
    "weight_decay_off_after_last_step": (False, True, None, "yes"),
}


def draw(
    chance: random.Random, settings: dict[str, tuple[Any, ...]], junk: float
) -> dict[str, Any]:
    """Choose values for some of the settings; with probability ``junk`` a wrong one."""
    share = chance.choice((0.02, 0.07, 0.2))
    chosen = {}
    for name, values in settings.items():
        if chance.random() < junk:
            chosen[name] = chance.choice(JUNK)
        elif chance.random() < share:
            chosen[name] = chance.choice(values)
    return chosen


def draw_step(chance: random.Random, junk: float = 0.005) -> dict[str, Any]:
    """Draw arguments of ``prune``; ``fisher``, ``selection`` and ``step`` as plain dicts."""
    fisher = {"num_gradients": 8, "gradient_batch_size": 2}
    return {
        "target_sparsity": 0.5,
        **draw(chance, PRUNING, junk),
        "step": draw(chance, STEP, junk),
        "fisher": {**fisher, **draw(chance, FISHER, junk)},
        "selection": draw(chance, SELECTION, junk),
    }


def draw_schedule(chance: random.Random, junk: float = 0.05) -> dict[str, Any]:
    """Draw a schedule in the form that LightningCLI reads from YAML."""
    kind = chance.choice(list(SCHEDULES))
    return {"class_path": kind, "init_args": draw(chance, SCHEDULES[kind], junk)}


def draw_callback(chance: random.Random, junk: float = 0.005) -> dict[str, Any]:
    """Draw arguments of the callback; the schedule is that of :func:`draw_schedule`."""
    settings = {**draw_step(chance, junk), **draw(chance, EXTRA, junk)}
    if chance.random() < 0.8:
        settings["schedule"] = draw_schedule(chance)
    return settings
