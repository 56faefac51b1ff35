"""Explain keyword arguments that a public class or function does not have.

Settings are grouped (``fisher=FisherConfig(num_gradients=8)``), so that a name is easily given
in the wrong place. The answer of Python names the wrong place only.
"""

from __future__ import annotations

__all__ = ["explain_keyword", "explain_keywords"]

import difflib
import functools
import inspect
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T", bound=Callable[..., Any])

# Public classes and functions in order of definition, each with the argument that takes an
# object of the class ("" for none).
_OWNERS: list[tuple[Callable[..., Any], str]] = []
# Names that have another meaning elsewhere, with what may be meant.
_OTHER_NAMES = {
    "batch_size": ["gradient_batch_size"],
    "sparsity": ["target_sparsity", "target"],
    "target": ["target_sparsity"],
    "target_sparsity": ["target"],
}


def explain_keywords(argument: str = "") -> Callable[[T], T]:
    """Let a public class or function answer a misplaced keyword with its place.

    Args:
        argument: name of the argument that takes an object of the class, such as
            ``"fisher"``.

    Returns:
        A decorator.
    """

    def decorate(owner: T) -> T:
        called: Any = owner
        _OWNERS.append((called, argument))
        function = called.__init__ if inspect.isclass(owner) else called

        @functools.wraps(function)
        def explained(*args: Any, **keywords: Any) -> Any:
            _require_known(called, keywords)
            return function(*args, **keywords)

        if not inspect.isclass(owner):
            return cast("T", explained)
        called.__init__ = explained
        return owner

    return decorate


def explain_keyword(
    called: Callable[..., Any], name: str, form: str = "{0}.{2}"
) -> str:
    """Say where a keyword belongs that a class or function does not have.

    Args:
        called: the class or function.
        name: the keyword.
        form: how to give it: {0} is the argument, {1} the class, {2} the name.

    Returns:
        The end of a sentence: its place, the name that is spelled most like it, or a stop.
    """
    known = _parameters(called)
    nested = {
        parameter: form.format(argument, _name(owner), parameter)
        for owner, argument in _OWNERS
        if argument in known
        for parameter in _parameters(owner)
    }
    owners = [*_owners_of(name)]
    for owner, argument in owners:
        if argument in known:
            place = form.format(argument, owner, name)
            return f": it is a setting of {owner}. Give {place}."
    nested |= {parameter: repr(parameter) for parameter in known}
    other = [known_as for known_as in _OTHER_NAMES.get(name, ()) if known_as in nested]
    if owners and not other:
        return f": it is an argument of {', '.join(owner for owner, _ in owners)}."
    close = other or difflib.get_close_matches(name, nested, n=1)
    return f". Did you mean {nested[close[0]]}?" if close else "."


def _require_known(called: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` for the first keyword that is no parameter."""
    known = _parameters(called)
    for name, value in keywords.items():
        if name not in known:
            shown = reprlib.repr(value).replace("{", "{{").replace("}", "}}")
            place = explain_keyword(called, name, f"{{0}}={{1}}({{2}}={shown})")
            raise TypeError(f"{_name(called)} has no argument {name!r}{place}")


def _owners_of(name: str) -> Iterator[tuple[str, str]]:
    for owner, argument in _OWNERS:
        if name in _parameters(owner):
            yield _name(owner), argument


def _name(called: Callable[..., Any]) -> str:
    return called.__name__ + "()" * (not inspect.isclass(called))


@functools.cache
def _parameters(called: Callable[..., Any]) -> list[str]:
    """Return the names of all keywords, also of those that a class passes to its base."""
    found: list[str] = []
    classes = inspect.getmro(called) if inspect.isclass(called) else (called,)
    for owner in classes:
        function = vars(owner).get("__init__") if inspect.isclass(owner) else owner
        if function is None:
            continue
        parameters = inspect.signature(function).parameters.values()
        found += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in found if name != "self"]
