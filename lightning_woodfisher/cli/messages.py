"""Errors and warnings of the command line: a few lines, with the nearest valid name."""

from __future__ import annotations

__all__ = [
    "condense_error",
    "explain_error",
    "explain_wandb",
    "require_groups",
    "warn_of_missing_steps",
]

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    PruningError,
    first_line,
    nearest,
)
from lightning_woodfisher.base.keywords import explain_keyword
from lightning_woodfisher.base.printable import printable
from lightning_woodfisher.base.wording import count_of
from lightning_woodfisher.callbacks.structured import (
    HAPPruningCallback,
    SOSPPruningCallback,
    StructuredPruningCallback,
)
from lightning_woodfisher.callbacks.woodfisher import WoodFisherPruningCallback
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.layerwise.config import LayerwiseConfig
from lightning_woodfisher.pruning.config import SelectionConfig, StepConfig
from lightning_woodfisher.pruning.schedule import (
    ConstantSchedule,
    OneShotSchedule,
    PolynomialSchedule,
)
from lightning_woodfisher.structured.config import StructureConfig

# Classes whose short name works in YAML, because they are imported here.
_OUR_CLASSES = (
    WoodFisherPruningCallback,
    StructuredPruningCallback,
    SOSPPruningCallback,
    HAPPruningCallback,
    PolynomialSchedule,
    OneShotSchedule,
    ConstantSchedule,
    FisherConfig,
    SelectionConfig,
    StepConfig,
    LayerwiseConfig,
    StructureConfig,
)

# Lines of jsonargparse that do not say what is wrong.
_NOISE = re.compile(
    r"\s*((- )?Does not validate against any|Subtypes:|Errors:$|- Not a valid subclass of|"
    r"Subclass types expect one of|- an? (class path|dict)|"
    r"- Expected a <class 'NoneType'>|Given value type:|Given value: [\[{])"
)
# What an unknown name looks like in the messages of jsonargparse.
_UNKNOWN = re.compile(
    r"(?:does not accept option|Expected a dot import path string:) '?([\w.]+)'?"
    r"|Option '([\w.]+)' is not accepted"
    r"|Key '([\w.]+)' is not expected"
    r"|unrecognized arguments: --([\w.]+)"
)
_CHOICE = re.compile(
    r"Expected a typing\.Literal\[(?P<known>.*)\]\. Got value: (?P<value>.*)"
    r"|invalid choice: '(?P<word>.*)' \(choose from (?P<words>.*)\)"
)
_OPTIONAL_CHOICE = re.compile(r"(typing\.Literal\[.*\])\n\s*Given value: ")
# Remedies for messages that only say what is missing.
_REMEDIES = {
    r"arguments are required: (?:\w+\.)?model$": (
        "Name your module, as model: package.module.MyModule in the YAML."
    ),
    r"but lightning_woodfisher\.PruningSchedule is abstract$": (
        "Name one, as class_path: PolynomialSchedule, with its settings in init_args."
    ),
}
_CLASS_PATH = re.compile(r"Problem with given class_path '([\w.]+)'")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")


def explain_error(error: BaseException) -> str | None:
    """Return the message for an error that the user can correct.

    Args:
        error: an error of any kind.

    Returns:
        The message of an error of this package or of W&B, also if it is a cause of
        ``error``; None for other errors, which need a traceback.
    """
    ours = _find_own_error(error)
    return explain_wandb(error) if ours is None else str(ours)


def explain_wandb(error: BaseException | None) -> str | None:
    """Explain what to do if W&B is not installed or cannot be reached.

    Args:
        error: the error that the logger raised, or one that it caused.

    Returns:
        The message and the remedy; None if W&B is not the cause.
    """
    while error is not None:
        message = first_line(error)
        if isinstance(error, ModuleNotFoundError) and "wandb" in message:
            return (
                f"WandbLogger: {message}. pip install 'lightning-woodfisher[wandb]', or "
                "use another logger, such as CSVLogger."
            )
        if type(error).__module__.partition(".")[0] == "wandb":
            return (
                f"W&B: {message} Without an account or a connection set "
                "WANDB_MODE=offline (or offline: true of the WandbLogger); `wandb sync` "
                "uploads the run later."
            )
        error = error.__cause__
    return None


def condense_error(message: str) -> str:
    """Shorten a message of the parser, and suggest the nearest valid name.

    Args:
        message: a message of jsonargparse, often a page long.

    Returns:
        The lines that say what is wrong; the whole message if there are none.
    """
    lines = [line for line in message.splitlines() if line.strip()]
    lines = [line for line in lines if not _NOISE.match(line)] or message.splitlines()
    # The choices and the value of an optional setting are on lines of their own.
    lines = _OPTIONAL_CHOICE.sub(r"\1. Got value: ", "\n".join(lines)).splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines]
    levels = sorted(set(indents))
    kept, owner = [], ""
    for line, indent in zip(lines, indents, strict=True):
        path = _CLASS_PATH.search(line)
        owner = path.group(1) if path else owner
        text = line.strip().removeprefix("- ") + _suggest(line, owner)
        kept.append("  " * levels.index(indent) + text)
    return "\n".join(kept)


def require_groups(config: Any) -> None:
    """Check that groups of settings, such as ``fisher``, are groups.

    jsonargparse accepts a number or a list for a dataclass, and fails without a reason when
    it makes the object.

    Args:
        config: settings of ``fit``. For any other value, ConfigurationError is raised.
    """
    trainer = config["trainer"]
    _require_group("trainer", trainer, "max_epochs: 90")
    given = trainer.get("callbacks") or []
    for callback in given if isinstance(given, list) else [given]:
        class_name = callback["class_path"].rpartition(".")[2]
        cls = {cls.__name__: cls for cls in _OUR_CLASSES}.get(class_name)
        settings = callback.get("init_args") or {}
        for name, parameter in inspect.signature(cls).parameters.items() if cls else ():
            group = parameter.default
            if name in settings and dataclasses.is_dataclass(group):
                known = vars(group).items()
                numbers = [f"{key}: {v}" for key, v in known if type(v) is int]
                example = numbers[0] if numbers else "exclude: [head]"
                _require_group(name, settings[name], example)


def _require_group(name: str, value: object, example: str) -> None:
    if not hasattr(value, "keys"):
        raise ConfigurationError(
            f"{name}={value!r} is not a group of settings; write {name}: {{{example}}}."
        )


def _find_own_error(error: BaseException | None) -> BaseException | None:
    """Return the error of this package among the causes: jsonargparse wraps errors."""
    while error is not None and not isinstance(
        error, ConfigurationError | PruningError
    ):
        for other in _errors_of_union(error):
            ours = _find_own_error(other)
            if ours is not None:
                return ours
        # Not __context__: an error in the handler of ours is a bug of other code.
        error = error.__cause__
    return error


def _errors_of_union(error: BaseException) -> list[BaseException]:
    """Return the errors of a union's types, of which jsonargparse names one as cause."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_code.co_name != "raise_union_unexpected_value":
        return []
    found = last.tb_frame.f_locals.get("exceptions", ())
    # The first one is the cause.
    return [each for each in found[1:] if isinstance(each, BaseException)]


def _suggest(line: str, owner: str) -> str:
    """Return the nearest valid name or the remedy for a line of a message.

    Args:
        line: a line of a message.
        owner: import path of the class that the line is about.
    """
    hint = ""
    if unknown := _UNKNOWN.search(line):
        name = next(group for group in unknown.groups() if group)
        module, _, owner_name = owner.rpartition(".")
        cls = getattr(sys.modules.get(module), owner_name, None)
        known = [*_parameters(cls), *_known_names()]
        # In a dotted name, the first unknown part is the misspelled one.
        parts = [part for part in name.split(".") if part not in known]
        if parts:
            hint = nearest(parts[0], known)
        elif cls in _OUR_CLASSES:
            return explain_keyword(cls, name.rpartition(".")[2])
    elif choice := _CHOICE.search(line):
        known = re.findall(r"[\w.-]+", choice["known"] or choice["words"])
        hint = nearest(choice["value"] or choice["word"], known)
    elif absent := _NO_ATTRIBUTE.search(line):
        module, name = absent.groups()
        hint = nearest(name, dir(sys.modules.get(module)))
    for pattern, remedy in _REMEDIES.items():
        if re.search(pattern, line):
            hint = f" {remedy}"
    return f".{hint}" if hint else ""


def _parameters(cls: Any) -> Iterator[str]:
    for base in inspect.getmro(cls) if inspect.isclass(cls) else ():
        if "__init__" in vars(base) and base is not object:
            yield from inspect.signature(vars(base)["__init__"]).parameters


def _known_names() -> Iterator[str]:
    yield from ("seed_everything", "trainer", "model", "data", "ckpt_path")
    yield from ("class_path", "init_args", "dict_kwargs")
    yield from _parameters(pl.Trainer)
    yield from pl.callbacks.__all__
    for cls in _OUR_CLASSES:
        yield cls.__name__
        yield from _parameters(cls)


def warn_of_missing_steps(path: Path, steps_left: int) -> None:
    """Print a warning that a checkpoint is not at the target sparsity.

    Args:
        path: path of the checkpoint.
        steps_left: planned pruning steps that were not done when it was saved.
    """
    sys.stderr.write(
        f"warning: {printable(str(path))} was saved before "
        f"{count_of(steps_left, 'planned pruning step')}, so it is not at the target "
        "sparsity.\n"
    )
