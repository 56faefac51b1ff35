"""Mutants of ``sampled_mutants.py`` that no test can kill, each with the reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Equal:
    """A change that leaves what the package does as it is.

    Attributes:
        file: path in the package.
        old: the lines before the change, each with single spaces.
        new: the lines after it.
        reason: why no result, error or message differs.
    """

    file: str
    old: str
    new: str
    reason: str


_SPEED = "Only chooses the quicker of two ways to compute the same."
_SPLIT = (
    "The names of arithmetics sort as float32, float64, split: nothing is above 'split'. "
    "What is then multiplied in float64 has more digits and takes longer."
)

EQUAL = (
    Equal(
        "fisher/full.py",
        'return half_product(rows.unsqueeze(0), self._arithmetic == "split")[0]',
        'return half_product(rows.unsqueeze(0), self._arithmetic > "split")[0]',
        _SPLIT,
    ),
    Equal(
        "fisher/full.py",
        'split = arithmetic == "split"',
        'split = arithmetic > "split"',
        _SPLIT,
    ),
    Equal(
        "fisher/full.py",
        "smallest = self._full(len(self.units) + 1, 1.0)",
        "smallest = self._full(len(self.units) + 2, 1.0)",
        "The place after the units is there for ranks without any; a second one has the "
        "same value.",
    ),
    Equal(
        "fisher/linalg.py",
        "if not _in_strips(rows, rows.shape[-2]):",
        "if not _in_strips(rows, rows.shape[~2]):",
        _SPEED,
    ),
    Equal(
        "fisher/primal.py",
        'single = not final and self._arithmetic(index) == "float32"',
        'single = not final and self._arithmetic(index) <= "float32"',
        "No name of an arithmetic sorts before 'float32'.",
    ),
    Equal(
        "gradients/collect.py",
        'ahead = int(comm.device.type == "cuda")',
        'ahead = int(comm.device.type > "cuda")',
        "Only whether a GPU computes while the host checks.",
    ),
    Equal(
        "gradients/collect.py",
        "if len(started) > 1:",
        "if not len(started) > 1:",
        "Only whether the next rows are computed while these are exchanged.",
    ),
    Equal(
        "gradients/collect.py",
        "if len(unchecked) > ahead:",
        "if len(unchecked) is not ahead:",
        "One was just added, so the number is never below ahead.",
    ),
    Equal(
        "gradients/lockstep.py",
        "args, kwargs = self._waiting[0].rebuild(leaves)",
        "args, kwargs = self._waiting[ -1].rebuild(leaves)",
        "Only the structure of the arguments is used, and all losses have the same.",
    ),
    Equal(
        "gradients/lockstep.py",
        "self, one: Any, other: Any, module: nn.Module, again: bool = False",
        "self, one: Any, other: Any, module: nn.Module, again: bool = True",
        "Compares a tensor with itself. Only one with NaNs differs, and then the losses are "
        "computed one by one.",
    ),
    Equal(
        "pruning/schedule.py",
        'return getattr(schedule, "initial_sparsity", 0.0) > 0.0',
        'return getattr(schedule, "initial_sparsity", -1.0) > 0.0',
        "The default is only compared with 0.",
    ),
    Equal(
        "structured/scores/gates.py",
        "parameter.requires_grad_(False)",
        "parameter.requires_grad_(True)",
        "Only the gates are differentiated. Frozen weights save memory, and the session "
        "restores their flags.",
    ),
    Equal(
        "structured/selection.py",
        "steps = count if config.round_to == 1 else None",
        "steps = count if config.round_to <= 1 else None",
        "round_to is at least 1.",
    ),
    Equal(
        "structured/shrink/files.py",
        "text = json.dumps(plan.to_dict(), indent=1, sort_keys=True)",
        "text = json.dumps(plan.to_dict(), indent= 2, sort_keys=True)",
        "JSON means the same however far it is indented.",
    ),
    Equal(
        "fisher/base.py",
        "self._is_factorized = True",
        "self._is_factorized = False",
        "The factors are computed again each time, with the same result.",
    ),
    Equal(
        "fisher/linalg.py",
        "if size % 2:",
        "if size // 2:",
        _SPEED,
    ),
    Equal(
        "fisher/primal.py",
        'add_half_product(gram, columns, self._products[index] == "split")',
        'add_half_product(gram, columns, self._products[index] >= "split")',
        "No name of an arithmetic sorts after 'split'.",
    ),
    Equal(
        "pruning/schedule.py",
        "start = 0 if known is None else _after(_SHARE_BEFORE_PRUNING, known)",
        "start = 1 if known is None else _after(_SHARE_BEFORE_PRUNING, known)",
        "With neither a length nor an end the plan is refused before it uses the start.",
    ),
    Equal(
        "structured/scores/sosp.py",
        "more = label < classes - 1",
        "more = label < classes + 1",
        "Only keeps the graph in memory after its last use.",
    ),
)
