"""Shell scripts that complete a command line, written from tables of its options."""

from __future__ import annotations

__all__ = ["SHELLS", "Command", "Option", "to_script"]

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHELLS = ("bash", "zsh")

# What a shell can compare and offer without quotes.
_PLAIN = re.compile(r"[\w.+:-]+")


@dataclass(frozen=True)
class Option:
    """What may follow an option, or stand in a place of its own.

    Attributes:
        names: of the option, with their dashes; empty for an argument without one.
        takes: how many values: "none", "one" or "many".
        words: values to offer.
        files: what else is offered: "" for nothing, "file" or "folder".
    """

    names: tuple[str, ...]
    takes: str = "one"
    words: tuple[str, ...] = ()
    files: str = ""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        options: its own.
        shared: whether it takes the options that the subcommands of Lightning share.
    """

    options: tuple[Option, ...]
    shared: bool = False


# It runs in bash (3.2 and later) and in zsh; found, files and takes are its result.
_BODY = """\
_lightning_woodfisher_values() {
    # After option $2 of command $1.
    found="" files="" takes=one
    case "$1 $2" in
@own@
    *)
        case "$2" in
@shared@
        esac
        ;;
    esac
}

_lightning_woodfisher_find() {
    # $1 is the word under the cursor, the others are those before it.
    local current="$1" command="" option="" since=0 more="" word
    shift
    for word in "$@"; do
        case "$word" in
        -*) option="$word" since=0 ;;
        *)
            since=$((since + 1))
            if [ -z "$command" ]; then
                case "$option $since" in
                "-c 1" | "--config 1") continue ;;
                esac
                case " @commands@ " in
                *" $word "*) command="$word" option="" since=0 ;;
                esac
            fi
            case "${option%+} $word" in
@classes@
            esac
            ;;
        esac
    done
    found="" files=""
    if [ -n "$option" ]; then
        _lightning_woodfisher_values "$command" "$option"
        case "$takes $since $current" in
        many*\\ -* | none*) ;;
        many* | one\\ 0*) return ;;
        esac
    fi
    found="" files=""
    case "$current" in
    -*) ;;
    *)
        _lightning_woodfisher_values "$command" ""
        if [ -n "$found$files" ]; then return; fi
        ;;
    esac
    files=""
    case "$command" in
@options@
    esac
    found="$found$more"
}
"""

_BASH = """\
# Completion of lightning-woodfisher for bash; `lightning-woodfisher completion bash`.

@body@
_lightning_woodfisher() {
    local found files takes index word current="" prefix=""
    local -a before=()
    # bash may cut --option=value at the sign.
    for ((index = 1; index <= COMP_CWORD; index++)); do
        word="${COMP_WORDS[index]}"
        current="$word" prefix=""
        case "$word" in
        =) current="" ;;
        -*=*)
            before+=("${word%%=*}")
            prefix="${word%%=*}=" current="${word#*=}"
            ;;
        esac
        if [ "$index" -lt "$COMP_CWORD" ] && [ "$word" != "=" ]; then
            before+=("$current")
        fi
    done
    _lightning_woodfisher_find "$current" "${before[@]}"
    COMPREPLY=($(compgen -P "$prefix" -W "$found" -- "$current"))
    if [ "${#COMPREPLY[@]}" -eq 0 ]; then
        # Within a completion readline finds them; it knows about spaces and ~.
        case "$files" in
        file) compopt -o default 2>/dev/null ||
            COMPREPLY=($(compgen -P "$prefix" -f -- "$current")) ;;
        folder) compopt -o dirnames 2>/dev/null ||
            COMPREPLY=($(compgen -P "$prefix" -d -- "$current")) ;;
        esac
    fi
}

complete -F _lightning_woodfisher lightning-woodfisher
"""

_ZSH = """\
#compdef lightning-woodfisher
# Completion of lightning-woodfisher for zsh; `lightning-woodfisher completion zsh`.

@body@
_lightning_woodfisher() {
    local found files takes word current="${words[CURRENT]}"
    local -a before
    for word in "${(@)words[2,CURRENT-1]}"; do
        case "$word" in
        -*=*) before+=("${word%%=*}" "${word#*=}") ;;
        *) before+=("$word") ;;
        esac
    done
    case "$current" in
    -*=*)
        before+=("${current%%=*}")
        current="${current#*=}"
        compset -P '*='
        ;;
    esac
    _lightning_woodfisher_find "$current" "${before[@]}"
    compadd -- ${=found}
    case "$files" in
    file) _files ;;
    folder) _files -/ ;;
    esac
}

if [ "${funcstack[1]}" = _lightning-woodfisher ]; then
    # Loaded from a folder of fpath, as the function of the name of the file.
    _lightning_woodfisher "$@"
elif [ -n "${functions[compdef]}" ]; then
    compdef _lightning_woodfisher lightning-woodfisher
fi
"""


def to_script(
    shell: str,
    commands: Mapping[str, Command],
    shared: Sequence[Option],
    classes: Mapping[tuple[str, str], Sequence[Option]],
) -> str:
    """Write a script that completes the command without running it.

    Args:
        shell: one of :data:`SHELLS`.
        commands: by name; the options before any subcommand are under "".
        shared: options of the subcommands of Lightning.
        classes: options that a class brings with it, by the option that takes the class
            and the name of the class.

    Returns:
        The script, which defines functions and registers one of them.
    """
    inherited = [*shared, *(each for options in classes.values() for each in options)]
    parts = {
        "commands": " ".join(name for name in commands if name),
        "own": _cases(
            {
                f"{name} {flag}": option
                for name, command in commands.items()
                for option in command.options
                for flag in option.names or ("",)
            },
            4,
        ),
        "shared": _cases(_merge(inherited), 8),
        "options": "\n".join(
            f"    {_quote(name)}) found={_quote(_names(command, shared))} ;;"
            for name, command in commands.items()
        ),
        "classes": "\n".join(
            f'            {_quote(f"{option} {name}")}) more="$more {_flags(options)}" ;;'
            for (option, name), options in classes.items()
        ),
    }
    body = _BODY
    for name, text in parts.items():
        body = body.replace(f"@{name}@", text)
    return {"bash": _BASH, "zsh": _ZSH}[shell].replace("@body@", body)


def _quote(text: str) -> str:
    return f'"{text}"'


def _flags(options: Sequence[Option]) -> str:
    return " ".join(dict.fromkeys(name for each in options for name in each.names))


def _names(command: Command, shared: Sequence[Option]) -> str:
    return _flags([*command.options, *(shared if command.shared else ())])


def _merge(options: Sequence[Option]) -> dict[str, Option]:
    """Bring together what several classes say about an option of the same name."""
    merged: dict[str, Option] = {}
    for option in options:
        for name in option.names:
            other = merged.get(name, option)
            merged[name] = Option(
                (name,),
                option.takes,
                tuple(dict.fromkeys((*other.words, *option.words))),
                option.files or other.files,
            )
    return merged


def _cases(options: Mapping[str, Option], indent: int) -> str:
    """Write a branch for all options that want the same."""
    patterns: dict[str, list[str]] = {}
    for pattern, option in options.items():
        words = " ".join(word for word in option.words if _PLAIN.fullmatch(word))
        result = f'found="{words}" files="{option.files}" takes={option.takes}'
        patterns.setdefault(result, []).append(_quote(pattern))
    before = " " * indent
    return "\n".join(
        f"{before}{' | '.join(alike)}) {result} ;;"
        for result, alike in patterns.items()
        if result != 'found="" files="" takes=one'
    )
