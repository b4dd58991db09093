"""Command lines made from dataclasses, and bad input that ends in one line.

Every script here declares its flags as dataclass fields made by `flag(default, help)`, reads them with `parse`
and starts its `main` through `run`:

    @dataclass
    class Config:
        seed: int = flag(1337, "seed of everything random")

    if __name__ == "__main__":
        run(main)
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import traceback
import types
import typing


class BadInput(Exception):
    """What the user gave cannot work. The message is one line that names the cause and the remedy."""


class RankError(BadInput):
    """A BadInput that one process of several may meet alone: said by whichever meets it."""


def flag(default, help):
    """A dataclass field that `parse` turns into the flag --<name of the field>."""
    return dataclasses.field(default=default, metadata={"help": help})


def run(main):
    """Call a script's `main`. BadInput becomes one line on stderr and exit code 2, Ctrl-C its message and 130.

    With --debug among the flags, BadInput shows where it was raised, too.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun then closes with the error of the process that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        return record(_run)(main)
    return _run(main)


def _run(main):
    for stream in (sys.stdout, sys.stderr):  # a sample's odd character must not end a run on a console without UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except BadInput as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        if rank == "0" or isinstance(error, RankError):  # under torchrun every process meets the same: say it once
            print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


def parse(classes, argv, doc=None, presets=None):
    """Read `argv` into one instance of each dataclass.

    The first class may have a field `preset`; `presets` then maps its values to overrides of the defaults, which any
    flag overrides in turn. Fields without help are not flags and keep their defaults.

    Returns (list of instances, set of the names given on the command line).
    Raises BadInput on an unknown flag (naming the nearest ones), a value of the wrong type or outside the choices.
    """
    overrides = {}
    if presets:
        first = _Parser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=classes[0].preset)
        named = first.parse_known_args(argv)[0].preset
        overrides = presets.get(named, {}) if isinstance(named, str) else {}

    parser = _Parser(usage="%(prog)s [flags]", description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for cls in classes:
        group, hints = parser.add_argument_group(cls.__name__), typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if "help" in field.metadata:
                default = overrides.get(field.name, field.default)
                shown = field.metadata["help"] + ("" if default is None else f" [{_show(default)}]")
                group.add_argument(f"--{field.name}", help=shown.replace("%", "%%"), **_argument(hints[field.name]))
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    given = vars(parser.parse_args(argv))
    given.pop("debug", None)  # read by run()
    if empty := [name for name, value in given.items() if value in ([], ())]:  # argparse drops a value of "--"
        raise BadInput(f"--{empty[0]}: expected one argument")

    values = {**overrides, **given}
    names = [{field.name for field in dataclasses.fields(cls)} for cls in classes]
    return [cls(**{k: v for k, v in values.items() if k in own}) for cls, own in zip(classes, names)], set(given)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        options = list(self._option_string_actions)
        for word in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else ():
            near = difflib.get_close_matches(word, options, n=2)
            raise BadInput(f"unknown flag {word}" + (f": did you mean {' or '.join(near)}?" if near else ": see --help"))
        raise BadInput(message.removeprefix("argument "))


def _show(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _argument(hint):
    """The keyword arguments of `add_argument` for a field's type."""
    if hint is bool or hint == bool | None:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:  # tuple[str, ...]
        return {"nargs": "+", "type": _scalar(typing.get_args(hint)[0]), "action": _Tuple}
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(kinds) == 1:  # str | None, Literal[...] | None
            return _argument(kinds[0])
        return {"type": _union(kinds)}  # int | Literal["auto"]
    return {"type": _scalar(hint)}


def _scalar(kind):
    return _integer if kind is int else kind


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


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
    words = [w for kind in kinds if typing.get_origin(kind) is typing.Literal for w in typing.get_args(kind)]
    plain = [kind for kind in kinds if kind in (int, float, str)]

    def convert(text):
        return text if text in words else _scalar(plain[0])(text)

    convert.__name__ = " or ".join([_scalar(kind).__name__ for kind in plain] + words)
    return convert
