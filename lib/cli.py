"""Command lines made from dataclasses, and bad input that ends in one line.

Every script declares its flags as dataclass fields made by `flag(default, help, bounds)`, reads
them with `parse` and starts its `main` through `run`:

    @dataclass
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

from lib import startup

BOUNDS = {
    "above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le
}
HF_CACHES = {"HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets",
             "HF_MODULES_CACHE": "modules", "HF_XET_CACHE": "xet"}
EXHAUSTED = {errno.ENOSPC: "free some disk space", errno.EDQUOT: "free some disk space",
             errno.EMFILE: "raise `ulimit -n`", errno.ENFILE: "end what holds so many files open"}
PATIENCE = 30  # seconds that rank 0 has to print what all processes meet


class BadInput(Exception):
    """What the user gave cannot work. The message is one line that names the cause and the remedy.
    """


class RankError(BadInput):
    """A BadInput that one process of several may meet alone: printed by the one that meets it."""


def flag(default, help, short=None, path=False, choices=None, **bounds):
    """A dataclass field that `parse` turns into the flag --<name of the field>;
    without a help text (None), a setting without a flag.

    short: a letter, for the same flag as -<letter>. path: see path_flag.
    choices: a function that returns the allowed names, such as the dict of name -> class that the
    setting selects from. It is called late: the classes may be defined below the config.
    bounds: above, at_least, below, at_most. `check` compares numbers with them. Floats must also be
    finite, integers below 2**63.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    metadata = {"help": help, "short": short, "path": path, "choices": choices, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


def path_flag(default, help):
    """A flag that names files or folders. A leading "~" is the home folder: a shell leaves it in
    --out=~/x."""
    return flag(default, help, path=True)


def run(main):
    """Call a script's `main`. BadInput becomes one line on stderr and exit code 2, Ctrl-C its
    message and 130.

    With --debug among the flags, BadInput shows where it was raised, too.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun then closes with the error of the process that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        return record(_run)(main)
    return _run(main)


def _run(main):
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
        # an odd character must not end a run on a console without UTF-8
        with contextlib.suppress(AttributeError):  # a notebook's streams take any character
            getattr(sys, name).reconfigure(errors="backslashreplace")
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
        _fail(f"{script}: error: cannot go on ({error.strerror}): {remedy}")
    _end()


def _end():
    """Exit with code 0, a GPU's process without what takes Python seconds at its end: it frees the
    device's memory piece by piece and waits for the compiler's idle workers."""
    torch = sys.modules.get("torch")
    interactive = sys.flags.interactive or "IPython" in sys.modules
    if startup.is_script() and not interactive and torch and torch.cuda.is_initialized():
        sys.stderr.flush()
        os._exit(0)


def complete_environment():
    """Set what libraries take for granted and a container may lack (docker --user, OpenShift).

    A name for the user: torch 2.11 and 2.12 call their caches after it. Where HOME is missing or
    read-only, other folders for Hugging Face's caches; one that is there already is used.
    """
    user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "user"
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # by Python's version and system
        os.environ["LOGNAME"] = user
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    home = os.path.expanduser(home)
    for name, folder in HF_CACHES.items():
        if name not in os.environ and not _can_make(os.path.join(home, folder)):
            os.environ[name] = os.path.join(tempfile.gettempdir(), f"huggingface_{user}", folder)


def _can_make(folder):
    """Whether a folder is there, or can be made."""
    if os.path.isdir(folder):
        return True
    while not os.path.exists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return os.path.isabs(folder) and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _fail(line, alone=True):
    """Exit with code 2 and this line, on stderr and in the report with which torchrun closes.

    alone: False if every process of several meets this error. Rank 0 then prints it, whereupon
    torchrun ends the others. One that is still there after PATIENCE seconds has met it alone.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not alone and not is_main_process():
        if report is None:  # not torchrun: nobody ends this process
            _leave(2)
        time.sleep(PATIENCE + launched()["rank"])  # one after another: the first ends the rest
    print(line, file=sys.stderr)
    if report:  # torchrun itself takes no notice of a SystemExit
        with contextlib.suppress(OSError), open(report, "w") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)
    _leave(2)


def _leave(code):
    """Exit with this code; Python itself would end with another, and a traceback, if what is left
    to print cannot be."""
    if is_broken(sys.stdout):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def is_broken(stream):
    """Whether what was printed to a stream cannot be written: its disk is full, or its reader gone.
    """
    try:
        stream.flush()
    except (OSError, ValueError):
        return True
    return False


RANKS = {  # of launchers other than torchrun; 0 in the shell of an allocation
    "SLURM_PROCID": "srun", "OMPI_COMM_WORLD_RANK": "mpirun", "PMIX_RANK": "mpirun",
    "PMI_RANK": "mpirun", "MV2_COMM_WORLD_RANK": "mpirun", "PALS_RANKID": "mpiexec",
    "FLUX_TASK_RANK": "flux"}


def launched():
    """What torchrun tells its processes: dict of rank, world_size, local_rank, local_world_size;
    None without a launcher.

    Raises BadInput if the variables are not whole and sane: half of them would train on half of
    each batch without a word. Likewise in a process that is not the first of another launcher:
    each would train a model of its own, on the first GPU.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        for name, launcher in RANKS.items():
            rank = os.environ.get(name, "")
            if rank.isdecimal() and int(rank) > 0:
                raise BadInput(
                    f"{launcher} started another copy of the script ({name}={rank}), which would run "
                    f"alone: start one torchrun per node, or unset {name} for separate runs")
        return None
    remedy = "start with torchrun, which sets them all, or unset them"
    if missing := [name for name in names if name not in found]:
        raise BadInput(
            f"{', '.join(found)} set in the environment, {', '.join(missing)} not: {remedy}")
    numbers = {name: os.environ.get(name, default) for name, default in (
        ("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", None),
        ("LOCAL_WORLD_SIZE", found["WORLD_SIZE"]), ("MASTER_PORT", None))}
    sane = all(re.fullmatch(r"[0-9]{1,6}", number) for number in numbers.values())
    rank, world_size, local_rank, local_world_size, port = map(
        int, numbers.values()) if sane else (0,) * 5
    if not (sane and rank < world_size and local_rank < local_world_size <= world_size
            and 0 < port < 2**16 and found["MASTER_ADDR"]):
        told = ", ".join(f"{name}={value}" for name, value in (found | numbers).items())
        raise BadInput(f"the environment does not describe a process of several ({told}): {remedy}")
    return {
        "rank": rank, "world_size": world_size, "local_rank": local_rank,
        "local_world_size": local_world_size
    }


def is_main_process():
    """Whether this process is the one that speaks for all: rank 0 of several, or the only one."""
    try:
        return (launched() or {"rank": 0})["rank"] == 0
    except BadInput:
        return True


def note(line):
    """Print a line on stderr, from the main process alone."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)


def check(config):
    """Compare every flag's value with its field's type and bounds. Raises BadInput naming the flag.

    The one place that does: for command lines, presets, and configurations that come out of files.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if field.metadata:
            _check(field, getattr(config, field.name), hints[field.name])


def choices_of(field, hint):
    """The values that a field allows, a tuple; empty if they are not listed. hint: its type."""
    if field.metadata.get("choices"):
        return tuple(field.metadata["choices"]())
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return choices_of(field, kinds[0]) if len(kinds) == 1 else ()


def _check(field, value, hint):
    name = f"--{field.name}" if field.metadata["help"] else field.name
    choices = field.metadata["choices"] and choices_of(field, hint)
    known = not choices or value is None or value in choices
    if not _is_a(value, hint) or not known:
        allowed = " or ".join(choices) if choices else _describe(hint)
        raise BadInput(f"{name} must be {allowed}, not {_short(value)}")
    if value == "" and _is_a(
            None, hint
    ):  # what can be left out says nothing when it is empty: an unset variable of a shell
        raise BadInput(f"{name} is empty: name something, or leave it out")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not _is_utf8(text):
            raise BadInput(f"{name} is not UTF-8 text: {ascii(text)[:80]}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        bounds = field.metadata["bounds"]
        if isinstance(value, int) and value >= 2**63 and not {"below", "at_most"} & bounds.keys():
            bounds = bounds | {"below": 2**63}  # beyond it, tensors and TensorBoard overflow
        if not (abs(value) <= sys.float_info.max  # nan fails, too
                and all(BOUNDS[kind](value, bound) for kind, bound in bounds.items())):
            raise BadInput(f"{name} must be {_range(bounds) or 'finite'}, not {_short(value)}")


def _is_a(value, hint):
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint) and not isinstance(value, (float, list, dict))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_is_a(value, kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(
            _is_a(part,
                  typing.get_args(hint)[0]) for part in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _describe(hint):
    if isinstance(hint, str):
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind not in (type(None), ...)]
    return " or ".join(map(_describe, kinds)) if kinds else hint.__name__


def _short(value):
    text = str(value) if not isinstance(value, int) or abs(value) < 10**30 else "a larger number"
    return text if len(text) < 60 else text[:57] + "..."


def _range(bounds):
    return " and ".join(f"{kind.replace('_', ' ')} {bound:,}" for kind, bound in bounds.items())


def _is_utf8(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse(classes, argv, doc=None, presets=None, command=None):
    """Read `argv` into one instance of each dataclass.

    Returns (list of instances, set of the names given on the command line). Takes and raises what
    `read_flags` does.
    """
    given = read_flags(classes, argv, doc, presets, command)
    preset = presets[given.get("preset", classes[0].preset)] if presets else {}
    return [resolve(cls(), preset, given) for cls in classes], set(given)


def resolve(config, *sources):
    """A config dataclass with the settings of each source, a dict. Later sources win.

    A source may name settings of other configs, too; they are left out. Raises BadInput as `check`
    does.
    """
    names = {field.name for field in dataclasses.fields(config)}
    merged = {}
    for source in sources:
        merged.update(source)
    resolved = dataclasses.replace(config, **{n: v for n, v in merged.items() if n in names})
    check(resolved)
    return resolved


def read_flags(classes, argv, doc=None, presets=None, command=None):
    """Read `argv` into {name: value} of the flags that it gives, fields of any of `classes`.

    The first class may have a field `preset`; `presets` then maps its values to overrides of the
    defaults, for --help. Fields without help are not flags.

    Raises BadInput on an unknown flag (naming the nearest ones) and on a value of the wrong type or
    outside the choices; bounds are checked by `resolve`.
    """
    overrides = {}
    if presets:
        first = _Parser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=classes[0].preset)
        named = first.parse_known_args(argv)[0].preset
        overrides = presets.get(named, {}) if isinstance(named, str) else {}

    parser = _Parser(usage=f"%(prog)s {f'{command} ' if command else ''}[flags]", description=doc,
                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                     argument_default=argparse.SUPPRESS)
    for cls in classes:
        group = parser.add_argument_group(cls.__name__)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.metadata.get("help"):
                default = overrides.get(field.name, field.default)
                short = [f"-{field.metadata['short']}"] if field.metadata["short"] else []
                group.add_argument(*short, f"--{field.name}", help=_help(field, default),
                                   **_argument(field, hints[field.name]))
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    given = vars(parser.parse_args(argv))
    given.pop("debug", None)  # read by run()
    empty = [name for name, value in given.items() if value in ([], ())]
    if empty:  # argparse drops a value of "--"
        raise BadInput(f"--{empty[0]}: expected one argument")

    for cls in classes:
        for field in dataclasses.fields(cls):
            if field.metadata.get("path") and field.name in given:
                given[field.name] = _expand(field.name, given[field.name])
    return given


def _help(field, default):
    text = field.metadata["help"]
    if field.metadata["bounds"]:
        text += f"; {_range(field.metadata['bounds'])}"
    if default is not None:
        text += f" [{_show(default)}]"
    return text.replace("%", "%%")


def _expand(name, value):
    """The value of a path flag with the home folder for a leading "~". Raises BadInput if there is
    none."""
    if isinstance(value, tuple):
        return tuple(_expand(name, part) for part in value)
    expanded = os.path.expanduser(value)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise BadInput(f"--{name} {value}: there is no such home folder; write the path out, "
                       f"or ./{value} for such a name")
    return expanded


def subcommand(argv, commands, doc):
    """The function that the first word names, of `commands`, {name: function}, and the flags behind
    it. Raises BadInput if none."""
    word, *flags = argv or [""]
    if word in ("-h", "--help"):
        print(doc)
        sys.exit()
    if word not in commands:
        raise BadInput(f"say what to do first, {' or '.join(commands)}"
                       + (f": {word} is neither" if word else ": see --help"))
    return commands[word], flags


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        if message.startswith("unrecognized"):
            word, known = message.partition(": ")[2].partition(" ")[0], list(
                self._option_string_actions)
            if not word.startswith(
                    "--") or word == "--" or word in known:  # behind a "--", flags are none
                raise BadInput(
                    f"unexpected argument {word}: flags are --name or --no-name, see --help")
            near = difflib.get_close_matches(word.partition("=")[0], known, n=2)
            raise BadInput(f"unknown flag {word}"
                           + (f": did you mean {' or '.join(near)}?" if near else ": see --help"))
        raise BadInput(message.removeprefix("argument "))


def _show(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _argument(field, hint):
    """The keyword arguments of `add_argument` for a field's type."""
    if hint is bool or hint == bool | None:
        return {"action": argparse.BooleanOptionalAction}
    choices = choices_of(field, hint)
    if choices:
        return {"choices": choices}
    if typing.get_origin(hint) is tuple:  # tuple[str, ...]
        return {"nargs": "+", "type": _scalar(typing.get_args(hint)[0]), "action": _Extend}
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(kinds) == 1:  # str | None, Literal[...] | None
            return _argument(field, kinds[0])
        return {"type": _union(kinds)}  # int | Literal["auto"]
    return {"type": _scalar(hint)}


def _scalar(kind):
    return _integer if kind is int else kind


class _Extend(argparse.Action):
    """`--source a b` and `--source a --source b` are the same."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def _integer(text):
    """An integer; 1e9 and 10_000 are integers too."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():  # also inf and nan
            raise ValueError(text) from None
        return int(value)


_integer.__name__ = "integer"  # argparse names it in its messages


def _union(kinds):
    words = [
        w for kind in kinds if typing.get_origin(kind) is typing.Literal
        for w in typing.get_args(kind)
    ]
    plain = [kind for kind in kinds if kind in (int, float, str)]

    def convert(text):
        return text if text in words else _scalar(plain[0])(text)

    convert.__name__ = " or ".join([_scalar(kind).__name__ for kind in plain] + words)
    return convert
