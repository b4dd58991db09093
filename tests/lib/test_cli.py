"""Flags made from dataclasses, and bad input ending in one line. Run: python -m pytest tests/test_cli.py"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.cli import BadInput, flag, parse

ROOT = Path(__file__).parent.parent


@dataclass
class Model:
    preset: Literal["small", "large"] = flag("small", "starting point")
    n_layer: int = flag(2, "layers")
    norm: Literal["rms", "layer"] = flag("rms", "norm")
    act: Literal["gelu", "relu"] | None = flag(None, "activation")
    tied: bool = flag(True, "tie the head")
    hidden: int = 7  # no flag


@dataclass
class Train:
    lr: float = flag(0.1, "100% of the learning rate")
    steps: int | None = flag(None, "steps")
    micro_batch: int | Literal["auto"] = flag("auto", "rows")
    source: tuple[str, ...] = flag(("a",), "files")
    sizes: tuple[int, ...] = flag((1,), "sizes")
    run: str | None = flag(None, "name")
    compile: bool | None = flag(None, "compile")


PRESETS = {"small": {}, "large": {"n_layer": 48, "lr": 0.5, "norm": "layer", "tied": False, "hidden": 9}}


def read(*argv):
    (model, train), given = parse((Model, Train), list(argv), "doc", PRESETS)
    return model, train, given


def test_defaults_and_types():
    model, train, given = read()
    assert (model, train, given) == (Model(), Train(), set())
    model, train, given = read("--n_layer", "3", "--lr=1e-3", "--steps", "5", "--run_name", "x", "--norm", "layer",
                               "--act", "relu", "--no-tied")
    assert model == Model(n_layer=3, norm="layer", act="relu", tied=False)
    assert train == Train(lr=0.001, steps=5, run="x")
    assert given == {"n_layer", "lr", "steps", "run", "norm", "act", "tied"}
    assert (read("--compile")[1].compile, read("--no-compile")[1].compile, read()[1].compile) == (True, False, None)


@pytest.mark.parametrize("text, value", [("1e9", 10**9), ("10_000", 10_000), ("1.5e3", 1500), ("-3", -3), ("2.0", 2)])
def test_integers_may_be_written_as_people_do(text, value):
    _, train, _ = read("--steps", text)
    assert train.steps == value and type(train.steps) is int


def test_tuples_and_unions():
    _, train, _ = read("--source", "x", "y z", "--sizes", "1e3", "7")
    assert (train.source, train.sizes) == (("x", "y z"), (1000, 7))
    assert [read("--micro_batch", word)[1].micro_batch for word in ("auto", "8", "1e2")] == ["auto", 8, 100]


def test_presets_are_overridden_by_flags():
    model, train, given = read("--preset", "large")
    assert model == Model(preset="large", n_layer=48, norm="layer", tied=False, hidden=9) and train == Train(lr=0.5)
    assert given == {"preset"}
    model, train, _ = read("--n_layer", "4", "--preset=large", "--tied", "--lr", "0.1")  # also back to the default
    assert model == Model(preset="large", n_layer=4, norm="layer", tied=True, hidden=9) and train.lr == 0.1


@pytest.mark.parametrize("argv, message", [
    (["--n_layers", "3"], r"unknown flag --n_layers: did you mean --n_layer\?"),
    (["--n_laier=3"], r"unknown flag --n_laier: did you mean --n_layer"),
    (["--n", "3"], "unknown flag --n: "),  # no abbreviations
    (["--zzzzzz"], "unknown flag --zzzzzz: see --help"),
    (["--no-tide"], r"unknown flag --no-tide: did you mean --no-tied"),
    (["--hidden", "3"], "unknown flag --hidden"),  # a field, but no flag
    (["stray"], "stray"),
    (["--n_layer", "three"], "--n_layer: invalid integer value: 'three'"),
    (["--n_layer", "2.5"], "--n_layer: invalid integer value: '2.5'"),
    (["--n_layer", "inf"], "--n_layer: invalid integer value: 'inf'"),
    (["--n_layer", "nan"], "--n_layer: invalid integer value"),
    (["--sizes", "1", "x"], "--sizes: invalid integer value: 'x'"),
    (["--n_layer"], "--n_layer: expected one argument"),
    (["--source"], "--source: expected at least one argument"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--norm", "batch"], "--norm: invalid choice: 'batch'.*rms.*layer"),
    (["--act", "tanh"], "--act: invalid choice: 'tanh'.*gelu.*relu"),
    (["--preset", "huge"], "--preset: invalid choice: 'huge'.*small.*large"),
    (["--micro_batch", "some"], "--micro_batch: invalid integer or auto value: 'some'"),
    (["--tied=yes"], "--tied"),
    (["--preset"], "--preset: expected one argument"),
    (["--n_layer", "4", "--preset"], "--preset: expected one argument"),
])
def test_bad_flags_end_in_one_line(argv, message):
    with pytest.raises(BadInput, match=message) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)


JUNK = st.one_of(st.sampled_from(["", "-", "--", "---", "=", "--=", "-1", "3", "1e3", "1e999", "nan", "-inf", "0x1", "1_0",
                                  "auto", "none",
                                  "None", "small", "large", "huge", "rms", "gelu", "a b", "%s", "%(prog)s", "{}", "@file",
                                  "-h5", "\ud800"]),
                 st.text(max_size=6), st.floats().map(repr), st.integers().map(str))
NAMES = ["preset", "n_layer", "norm", "act", "tied", "hidden", "lr", "steps", "micro_batch", "source", "sizes", "run",
         "compile", "debug",
         "help", "no-tied", "no-compile", "no-run", "n_lay"]
WORD = st.one_of(st.sampled_from([f"--{name}" for name in NAMES]), JUNK,
                 st.builds("--{}={}".format, st.sampled_from(NAMES), JUNK))
GOOD = st.sampled_from([["--preset", "large"], ["--preset=small"], ["--n_layer", "1e2"], ["--norm=rms"], ["--act", "relu"],
                        ["--tied"],
                        ["--no-tied"], ["--lr", "nan"], ["--steps", "-3"], ["--micro_batch", "auto"], ["--micro_batch", "4"],
                        ["--source", "a", "b"], ["--sizes", "1", "2.0"], ["--run="], ["--run_name", "x y"], ["--compile"],
                        ["--debug"]])
ARGV = st.lists(st.one_of(GOOD, GOOD, GOOD, st.builds(lambda word: [word], WORD)), max_size=5).map(lambda parts: sum(parts, []))
TYPES = {  # of the fields, once more by hand
    "preset": lambda v: v in ("small", "large"), "n_layer": lambda v: type(v) is int, "norm": lambda v: v in ("rms", "layer"),
    "act": lambda v: v in (None, "gelu", "relu"), "tied": lambda v: type(v) is bool, "hidden": lambda v: v in (7, 9),
    "lr": lambda v: type(v) is float, "steps": lambda v: v is None or type(v) is int,
    "micro_batch": lambda v: v == "auto" or type(v) is int,
    "source": lambda v: type(v) is tuple and v and all(type(part) is str for part in v),
    "sizes": lambda v: type(v) is tuple and v and all(type(part) is int for part in v),
    "run": lambda v: v is None or type(v) is str, "compile": lambda v: v in (None, False, True)}


def fits(argv):
    """Whether `argv` was read, after everything about what came of it was checked."""
    try:
        model, train, given = read(*argv)
    except BadInput as error:
        assert str(error)
        return False
    except SystemExit as stop:
        assert stop.code == 0 and any(word.startswith(("-h", "--help")) for word in argv), argv
        return False
    values = vars(model) | vars(train)
    assert values.keys() == TYPES.keys() and all(TYPES[name](value) for name, value in values.items()), (argv, values)
    assert given <= values.keys() and given == {word.split("=")[0].removeprefix("--").removeprefix("no-") for word in argv
                                                if word.startswith("--") and word not in ("--", "--debug")}, argv
    default = PRESETS[model.preset]
    assert all(values[name] == default.get(name, (vars(Model()) | vars(Train()))[name]) for name in values.keys() - given)
    return True


def test_any_words_are_bad_input_or_values_of_the_right_types(capsys):
    read_well = []

    @settings(derandomize=True, deadline=None, max_examples=400)
    @given(argv=ARGV)
    @example(["--source", "a", "--sizes", "1", "2e0", "--lr=nan", "--tied", "--micro_batch=1_0", "--run="])
    @example(["--preset"])
    @example(["--preset=--"])  # Python before 3.12 makes a list of this
    @example(["--n_layer=--"])
    @example(["--source=--"])
    @example(["--steps=1e999"])
    @example(["--sizes", "1", "inf"])
    @example(["--micro_batch", "nan"])
    @example(["--preset=large", "--preset", "small"])
    def check(argv):
        read_well.append(fits(argv))

    check()
    capsys.readouterr()  # --help
    assert 50 < sum(read_well) < len(read_well) - 50  # the test did see both


def test_help_shows_the_presets_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--preset", "large", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for part in ("layers [48]", "100% of the learning rate [0.5]", "tie the head [off]", "files [a]",
                 "sizes [1]", "rows [auto]"):
        assert part in text, text
    assert "--hidden" not in text


SCRIPT = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import dataclass
from lib.cli import BadInput, flag, parse, run

@dataclass
class Config:
    how: str = flag("fine", "how it ends")

def main(argv):
    (cfg,), _ = parse((Config,), argv)
    print("started", flush=True)
    if cfg.how == "bad":
        raise BadInput("first\\n  second   third")
    if cfg.how == "wait":
        time.sleep(60)
    if cfg.how == "say":
        raise KeyboardInterrupt("half is done")
    if cfg.how == "bug":
        raise ValueError("a bug keeps its traceback")

if __name__ == "__main__":
    run(main)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return lambda *argv, rank="0": subprocess.run([sys.executable, path, *argv], capture_output=True, text=True, timeout=60,
                                                  env=os.environ | {"RANK": rank}, check=False)


def test_a_script_ends_with_the_right_code_and_one_line(script):
    fine = script()
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "started\n", "")
    bad = script("--how", "bad")
    assert (bad.returncode, bad.stderr) == (2, "script.py: error: first second third\n")
    unknown = script("--haw", "bad")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "script.py: error: unknown flag --haw: did you mean --how?\n"
    say = script("--how", "say")
    assert (say.returncode, say.stderr) == (130, "\nhalf is done\n")
    bug = script("--how", "bug")
    assert bug.returncode == 1 and "Traceback" in bug.stderr  # only what the user can mend loses its traceback
    other_rank = script("--how", "bad", rank="3")
    assert (other_rank.returncode, other_rank.stderr) == (2, "")  # under torchrun rank 0 alone says it


def test_ctrl_c_ends_a_script_cleanly(script, tmp_path):
    script()  # writes the file
    process = subprocess.Popen([sys.executable, tmp_path / "script.py", "--how", "wait"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "\ninterrupted\n" and process.returncode == 130


def test_a_reader_that_has_read_enough_is_no_error(tmp_path):
    (tmp_path / "many.py").write_text("from lib import cli\ncli.run(lambda argv: [print('line', i) for i in range(100_000)])\n")
    pipe = f"{sys.executable} many.py 2> err | head -n 1"
    result = subprocess.run(pipe, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.stdout == "line 0\n" and (tmp_path / "err").read_text() == ""
