"""Command lines declared as dataclasses, and one-line errors for invalid input.

Every script declares its flags as dataclass fields made by `flag(default, help, bounds)`, reads
them with `parse` and starts its `main` through `run`:

    @dataclass(frozen=True)
    class Config:
        steps: int = flag(100, "optimizer steps", above=0)

    if __name__ == "__main__":
        run(main)
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import getpass
import json
import operator
import os
import re
import sys
import tempfile
import time
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lib import startup

BOUNDS = {
    "above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le,
}
HF_CACHES = {
    "HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets",
    "HF_MODULES_CACHE": "modules", "HF_XET_CACHE": "xet",
}
EXHAUSTED = {  # error number -> remedy
    errno.ENOSPC: "free some disk space", errno.EDQUOT: "free some disk space",
    errno.EMFILE: "raise `ulimit -n`", errno.ENFILE: "close programs with many open files",
}
PATIENCE = 30  # seconds that rank 0 has to print an error that all processes raise

on_failure: list[Callable[[str], None]] = []  # called with the error that ends a script


class BadInput(Exception):
    """Invalid user input. The message is one line that names the cause and the remedy."""


class RankError(BadInput):
    """A BadInput that a single rank may raise: printed by the rank that raises it."""


# --------------------------------------------------------------------------------------------------
# Flags: declared on dataclass fields


def flag(default: Any, help: str | None, short: str | None = None, path: bool = False,
         choices: Callable | None = None, aliases: dict[str, str] | None = None,
         **bounds: float) -> Any:
    """A dataclass field that `parse` turns into the flag --<name of the field>.

    help: None for a setting without a flag. short: a letter for the short form -<letter>. path: see
    path_flag. choices: a function that returns the allowed names, such as the dict of name -> class
    that the setting selects from; it is called late, so the dict may be defined below the config.
    aliases: other spellings of choices on the command line -> the choice.
    bounds: above, at_least, below, at_most, checked by `check`. Floats must also be finite, and
    integers below 2**63.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    metadata = {"help": help, "short": short, "path": path, "choices": choices, "bounds": bounds,
                "aliases": aliases or {}}
    return dataclasses.field(default=default, metadata=metadata)


def path_flag(default: Any, help: str | None) -> Any:
    """A flag that names files or folders. A leading "~" is expanded: shells leave it in --out=~/x.
    """
    return flag(default, help, path=True)


def choices_of(field: dataclasses.Field, hint: Any) -> tuple:
    """The allowed values of a field; empty if any value is allowed. hint: its type."""
    if field.metadata.get("choices"):
        return tuple(field.metadata["choices"]())
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    kinds = _kinds(hint)
    return choices_of(field, kinds[0]) if len(kinds) == 1 else ()


def _kinds(hint):
    """The types that a union allows besides None; empty for other types."""
    if not _is_union(hint):
        return []
    return [kind for kind in typing.get_args(hint) if kind is not type(None)]


def _is_union(hint):
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


# --------------------------------------------------------------------------------------------------
# Reading a command line


def parse(classes: Sequence[Any], argv: list[str], doc: str | None = None,
          presets: dict[str, dict] | None = None,
          command: str | None = None) -> tuple[list[Any], set[str]]:
    """Read `argv` into one instance of each dataclass.

    Returns (list of instances, set of the names given on the command line). Arguments and errors:
    see `read_flags`.
    """
    given = read_flags(classes, argv, doc, presets, command)
    preset = {}
    if presets:
        preset = presets.get(given.get("preset", classes[0].preset), {})
    return [resolve(cls(), preset, given) for cls in classes], set(given)


def resolve(config: Any, *sources: dict) -> Any:
    """The config, a dataclass, with the settings of each source. Later sources win.

    Names that are not fields of the config are ignored, since a source may serve several configs.
    Raises BadInput like `check`.
    """
    names = {field.name for field in dataclasses.fields(config)}
    changes = {}
    for source in sources:
        changes.update({name: value for name, value in source.items() if name in names})
    resolved = dataclasses.replace(config, **changes)
    check(resolved)
    return resolved


def read_flags(classes: Sequence[Any], argv: list[str], doc: str | None = None,
               presets: dict[str, dict] | None = None,
               command: str | None = None) -> dict[str, Any]:
    """Read the flags in `argv`, which are fields of `classes` -> {name: value}.

    If the first class has a field `preset`, `presets` maps its values to overrides of the defaults,
    which --help shows. Fields without help are not flags. doc: the text of --help. command: a
    subcommand, for its usage line.

    Raises BadInput on an unknown flag (suggesting similar ones) and on a value of the wrong type or
    outside the choices. Bounds are checked by `resolve`.
    """
    overrides = _preset_of(argv, classes[0].preset, presets) if presets else {}
    usage = f"%(prog)s {command} [flags]" if command else "%(prog)s [flags]"
    parser = _Parser(usage=usage, description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     argument_default=argparse.SUPPRESS)
    paths = set()
    for cls in classes:
        group = parser.add_argument_group(cls.__name__)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not field.metadata.get("help"):
                continue
            if field.metadata["path"]:
                paths.add(field.name)
            names = [f"--{field.name}"]
            if field.metadata["short"]:
                names.insert(0, f"-{field.metadata['short']}")
            default = overrides.get(field.name, field.default)
            group.add_argument(*names, help=_help(field, default),
                               **_argument(field, hints[field.name]))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

    given = vars(parser.parse_args(argv))
    given.pop("debug", None)  # read by run()
    for name, value in given.items():
        if value in ([], ()):  # argparse drops a value of "--"
            raise BadInput(f"--{name}: expected one argument")
        if name in paths:
            given[name] = _expand(name, value)
    return given


def _preset_of(argv, default, presets):
    """The overrides of the preset that `argv` names; {} if there is no such preset."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=default)
    name = parser.parse_known_args(argv)[0].preset
    return presets.get(name, {}) if isinstance(name, str) else {}


def _help(field, default):
    text = field.metadata["help"]
    if field.metadata["bounds"]:
        text += f"; {_range(field.metadata['bounds'])}"
    if default is not None:
        text += f" [{_show(default)}]"
    return text.replace("%", "%%")


def _show(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _expand(name, value):
    """The value of a path flag with a leading "~" expanded. Raises BadInput if there is no such
    home folder."""
    if isinstance(value, tuple):
        return tuple(_expand(name, part) for part in value)
    expanded = os.path.expanduser(value)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise BadInput(f"--{name} {value}: there is no such home folder; write the path out, "
                       f"or ./{value} for such a name")
    return expanded


def subcommand(argv: list[str], commands: dict[str, Callable],
               doc: str | None) -> tuple[Callable, list[str]]:
    """(the function in `commands` named by the first word, the words after it). Raises BadInput if
    there is none."""
    word, *flags = argv or [""]
    if word in ("-h", "--help"):
        print(doc)
        sys.exit()
    if word in commands:
        return commands[word], flags
    problem = f"{word} is neither" if word else "see --help"
    raise BadInput(f"the first word must be {' or '.join(commands)}: {problem}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        if not message.startswith("unrecognized"):
            raise BadInput(message.removeprefix("argument "))
        word = message.partition(": ")[2].partition(" ")[0]
        known = list(self._option_string_actions)
        # after a "--", flags are read as plain arguments
        if not word.startswith("--") or word == "--" or word in known:
            raise BadInput(f"unexpected argument {word}: flags are --name or --no-name, see --help")
        near = difflib.get_close_matches(word.partition("=")[0], known, n=2)
        remedy = f"did you mean {' or '.join(near)}?" if near else "see --help"
        raise BadInput(f"unknown flag {word}: {remedy}")


def _argument(field, hint):
    """The keyword arguments of `add_argument` for a field's type."""
    if hint is bool or hint == bool | None:
        return {"action": argparse.BooleanOptionalAction}
    choices = choices_of(field, hint)
    if choices:
        aliases = field.metadata.get("aliases", {})
        return {"choices": choices, "type": lambda word: aliases.get(word, word)}
    if typing.get_origin(hint) is tuple:  # tuple[str, ...]
        return {"nargs": "+", "type": _scalar(typing.get_args(hint)[0]), "action": _Extend}
    if not _is_union(hint):
        return {"type": _scalar(hint)}
    kinds = _kinds(hint)
    if len(kinds) == 1:  # str | None
        return _argument(field, kinds[0])
    return {"type": _union(kinds)}  # int | Literal["auto"]


class _Extend(argparse.Action):
    """`--source a b` and `--source a --source b` are the same."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def _scalar(kind):
    return _integer if kind is int else kind


def _integer(text):
    """An integer; 1e9 and 10_000 are integers, too."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():  # also inf and nan
            raise ValueError(text) from None
        return int(value)


_integer.__name__ = "integer"  # argparse names it in its messages


def _union(kinds):
    """A function that reads one of several types: a word of a Literal, or a number."""
    words = []
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            words += typing.get_args(kind)
    plain = [_scalar(kind) for kind in kinds if kind in (int, float, str)]

    def convert(text):
        return text if text in words else plain[0](text)

    convert.__name__ = " or ".join([kind.__name__ for kind in plain] + words)
    return convert


# --------------------------------------------------------------------------------------------------
# Checking values


def check(config: Any) -> None:
    """Check every value against its type, choices and bounds. Raises BadInput naming the flag.

    This is the only such check, for command lines, presets, and configs read from files.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if field.metadata:
            _check(field, getattr(config, field.name), hints[field.name])


def _check(field, value, hint):
    name = f"--{field.name}" if field.metadata["help"] else field.name
    _check_type(field, name, value, hint)
    if value == "" and _is_a(None, hint):  # an unset variable of a shell
        raise BadInput(f"{name} is empty: name something, or leave it out")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not _is_utf8(text):
            raise BadInput(f"{name} is not UTF-8 text: {ascii(text)[:80]}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_bounds(name, value, field.metadata["bounds"])


def _check_type(field, name, value, hint):
    allowed = _describe(hint)
    fits = _is_a(value, hint)
    if fits and field.metadata["choices"] and value is not None:
        choices = choices_of(field, hint)
        allowed = " or ".join(choices)
        fits = value in choices
    if not fits:
        raise BadInput(f"{name} must be {allowed}, not {_short(value)}")


def _check_bounds(name, value, bounds):
    if isinstance(value, int) and value >= 2**63 and not {"below", "at_most"} & bounds.keys():
        bounds = bounds | {"below": 2**63}  # tensors and TensorBoard overflow there
    finite = abs(value) <= sys.float_info.max  # false for NaN, too
    if not finite or not all(BOUNDS[kind](value, bound) for kind, bound in bounds.items()):
        raise BadInput(f"{name} must be {_range(bounds) or 'finite'}, not {_short(value)}")


def _is_a(value, hint):
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint) and not isinstance(value, (float, list, dict))
    if _is_union(hint):
        return any(_is_a(value, kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        part_hint = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_is_a(part, part_hint) for part in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _describe(hint):
    if isinstance(hint, str):
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind not in (type(None), ...)]
    return " or ".join(map(_describe, kinds)) if kinds else hint.__name__


def _short(value):
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a larger number"
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _range(bounds):
    return " and ".join(f"{kind.replace('_', ' ')} {bound:,}" for kind, bound in bounds.items())


def _is_utf8(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --------------------------------------------------------------------------------------------------
# Running a script: exit codes, errors of one line


def run(main: Callable[[list[str]], Any]) -> None:
    """Call a script's `main`. BadInput becomes one line on stderr and exit code 2; Ctrl-C becomes
    its message and exit code 130.

    With --debug among the flags, BadInput also shows where it was raised.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun then reports the process that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        record(_run)(main)
    else:
        _run(main)


def _run(main):
    _open_streams()
    complete_environment()
    script = os.path.basename(sys.argv[0])
    try:
        startup.imported()
        main(sys.argv[1:])
        sys.stdout.flush()
    except BadInput as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        message = " ".join(str(error).split())
        _fail(f"{script}: error: {message}", alone=isinstance(error, RankError))
    except BrokenPipeError:  # `| head` has read enough
        _leave(1)
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
        _leave(130)
    except OSError as error:
        if "--debug" in sys.argv or not (error.errno in EXHAUSTED or is_broken(sys.stdout)):
            raise
        remedy = EXHAUSTED.get(error.errno, "see where the output goes")
        _fail(f"{script}: error: cannot continue ({error.strerror}): {remedy}")
    _end()


def _open_streams():
    """Make stdout and stderr writable, and able to print any character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
        with contextlib.suppress(AttributeError):  # a notebook's streams take any character
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _end():
    """Exit with code 0. If a GPU was used, skip Python's own shutdown: freeing device memory piece
    by piece and waiting for idle compiler workers takes seconds."""
    torch = sys.modules.get("torch")
    interactive = sys.flags.interactive or "IPython" in sys.modules
    if startup.is_script() and not interactive and torch and torch.cuda.is_initialized():
        sys.stderr.flush()
        os._exit(0)


def complete_environment() -> None:
    """Set what libraries need and a container may lack (docker --user, OpenShift).

    That is a user name, after which torch 2.11 and 2.12 name their caches, and other folders for
    Hugging Face's caches if HOME is missing or read-only, except for caches that already exist.
    """
    user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "user"
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # which one depends on Python's version and system
        os.environ["LOGNAME"] = user
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    home = os.path.expanduser(home)
    for name, folder in HF_CACHES.items():
        if name not in os.environ and not _can_make(os.path.join(home, folder)):
            os.environ[name] = os.path.join(tempfile.gettempdir(), f"huggingface_{user}", folder)


def _can_make(folder):
    """Whether a folder exists or can be made."""
    if os.path.isdir(folder):
        return True
    while not os.path.exists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return os.path.isabs(folder) and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _fail(line, alone=True) -> NoReturn:
    """Exit with code 2 and this line, on stderr and in the report that torchrun prints at its end.

    alone: False if every rank raises this error. Rank 0 then prints it, and torchrun ends the
    others; one that is still running after PATIENCE seconds was alone after all.
    """
    for tell in on_failure:
        tell(line.partition(": error: ")[2])
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not alone and not is_main_process():
        if report is None:  # not torchrun: nobody ends this process
            _leave(2)
        rank = (launched() or {"rank": 0})["rank"]
        time.sleep(PATIENCE + rank)  # not all at once: torchrun ends the rest after the first
    print(line, file=sys.stderr)
    if report:  # torchrun ignores a SystemExit
        with contextlib.suppress(OSError), open(report, "w") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)
    _leave(2)


def _leave(code) -> NoReturn:
    """Exit with this code, even if buffered output cannot be written; Python itself would then exit
    with another code and a traceback."""
    if is_broken(sys.stdout):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def is_broken(stream: Any) -> bool:
    """Whether a stream's output cannot be written: its disk is full, or its reader is gone."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return True
    return False


# --------------------------------------------------------------------------------------------------
# Several processes

# rank variables of launchers other than torchrun; 0 in the shell of an allocation
RANKS = {
    "SLURM_PROCID": "srun", "OMPI_COMM_WORLD_RANK": "mpirun", "PMIX_RANK": "mpirun",
    "PMI_RANK": "mpirun", "MV2_COMM_WORLD_RANK": "mpirun", "PALS_RANKID": "mpiexec",
    "FLUX_TASK_RANK": "flux",
}
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> dict[str, int] | None:
    """torchrun's rank, world_size, local_rank and local_world_size; None without a launcher.

    Raises BadInput unless its variables are complete and consistent: otherwise a part of each batch
    could silently be left out. Also raises it in all but the first process of another launcher:
    each would train a model of its own, on the first GPU.
    """
    found = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    if not found:
        _refuse_other_launchers()
        return None
    remedy = "start with torchrun, which sets them all, or unset them"
    missing = [name for name in TORCHRUN if name not in found]
    if missing:
        raise BadInput(f"{', '.join(found)} set in the environment, {', '.join(missing)} not: "
                       f"{remedy}")
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE", found["WORLD_SIZE"])
    words = found | {"LOCAL_WORLD_SIZE": local_world_size}
    address = words.pop("MASTER_ADDR")
    numbers = {name.lower(): int(word) for name, word in words.items()
               if re.fullmatch(r"[0-9]{1,6}", word)}
    if len(numbers) < len(words) or not address or not _is_consistent(**numbers):
        values = ", ".join(f"{name}={value}" for name, value in (found | words).items())
        raise BadInput("the environment does not describe one process of several "
                       f"({values}): {remedy}")
    del numbers["master_port"]
    return numbers


def _is_consistent(rank, world_size, local_rank, local_world_size, master_port):
    return (rank < world_size and local_rank < local_world_size <= world_size
            and 0 < master_port < 2**16)


def _refuse_other_launchers():
    for name, launcher in RANKS.items():
        rank = os.environ.get(name, "")
        if rank.isdecimal() and int(rank) > 0:
            raise BadInput(f"{launcher} started another copy of the script ({name}={rank}), which "
                           "would train alone: start one torchrun per node, or unset "
                           f"{name} for separate runs")


def is_main_process() -> bool:
    """Whether this process prints for all: rank 0, or the only process."""
    try:
        processes = launched()
    except BadInput:
        return True
    return processes is None or processes["rank"] == 0


def note(line: str) -> None:
    """Print a line on stderr, only from the main process."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)
