"""Flags made from dataclasses, their bounds, and errors of one line. Run: python -m pytest
tests/lib/test_cli.py"""

import getpass
import json
import os
import pwd
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from helpers import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib import cli
from lib.cli import BadInput, check, choices_of, flag, launched, parse, path_flag, resolve


@dataclass(frozen=True)
class Model:
    preset: Literal["small", "large"] = flag("small", "starting point")
    n_layer: int = flag(2, "layers", above=0, at_most=1000)
    norm: Literal["rms", "layer"] = flag("rms", "norm")
    act: Literal["gelu", "relu"] | None = flag(None, "activation")
    tied: bool = flag(True, "tie the head")
    hidden: int = flag(7, None, at_least=1)  # no flag


@dataclass(frozen=True)
class Train:
    lr: float = flag(0.1, "100% of the learning rate", above=0)
    dropout: float = flag(0.0, "dropout", at_least=0, below=1)
    steps: int | None = flag(None, "steps", above=0, below=2**31)
    micro_batch: int | Literal["auto"] = flag("auto", "rows", above=0)
    source: tuple[str, ...] = flag(("a",), "files")
    sizes: tuple[int, ...] = flag((1,), "sizes")
    name: str | None = flag(None, "name", short="n")
    compile: bool | None = flag(None, "compile")
    started: float = 0.0  # neither flag nor checked


PRESETS = {
    "small": {},
    "large": {"n_layer": 48, "lr": 0.5, "norm": "layer", "tied": False, "hidden": 9},
}


def read(*argv):
    (model, train), explicit = parse((Model, Train), list(argv), "doc", PRESETS)
    return model, train, explicit


# --------------------------------------------------------------------------------------------------
# Flags


def test_defaults_and_types():
    assert read() == (Model(), Train(), set())
    model, train, explicit = read("--n_layer", "3", "--lr=1e-3", "--steps", "5", "--name", "x",
                                  "--norm", "layer", "--act", "relu", "--no-tied", "--source", "x",
                                  "y z", "--sizes", "1e3", "7", "--source", "w")
    assert model == Model(n_layer=3, norm="layer", act="relu", tied=False)
    assert train == Train(lr=0.001, steps=5, name="x", source=("x", "y z", "w"), sizes=(1000, 7))
    assert explicit == {"n_layer", "lr", "steps", "name", "norm", "act", "tied", "source", "sizes"}


@pytest.mark.parametrize("argv, name, value", [
    ([], "compile", None), (["--compile"], "compile", True), (["--no-compile"], "compile", False),
    (["--micro_batch", "auto"], "micro_batch", "auto"), (["--micro_batch", "8"], "micro_batch", 8),
    (["--micro_batch", "1e2"], "micro_batch", 100),
])
def test_flags_of_several_types(argv, name, value):
    _, train, _ = read(*argv)
    assert getattr(train, name) == value


def test_a_tilde_in_front_of_a_path_is_the_home_folder(monkeypatch, tmp_path):
    @dataclass
    class Paths:
        out: str = path_flag("~/default", "folder")
        data: tuple[str, ...] = path_flag((), "folders")
        prompt: str = flag("x", "text")

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    (config,), _ = parse((Paths,), ["--out=~/a b", "--data", "~/x:3", "y/~", "~", "--prompt=~/x"])
    assert config == Paths(out="/home/me/a b", data=("/home/me/x:3", "y/~", "/home/me"),
                           prompt="~/x")
    with pytest.raises(BadInput,
                       match="--out ~nobody.of.that.name/x: there is no such home folder"):
        parse((Paths,), ["--out", "~nobody.of.that.name/x"])
    (tmp_path / "~mine").mkdir()
    assert parse((Paths,), ["--out", "~mine"])[0][0].out == "~mine"


@pytest.mark.parametrize("text, value", [("1e9", 10**9), ("10_000", 10_000), ("1.5e3", 1500),
                                         ("2.0", 2)])
def test_integers_may_have_exponents_and_underscores(text, value):
    _, train, _ = read("--steps", text)
    assert train.steps == value and type(train.steps) is int


def test_a_short_form_is_the_same_flag():
    for words in (("-n", "x"), ("-nx",), ("--name", "x")):
        _, train, explicit = read(*words)
        assert (train.name, explicit) == ("x", {"name"})


def test_presets_are_overridden_by_flags():
    model, train, explicit = read("--preset", "large")
    assert model == Model(preset="large", n_layer=48, norm="layer", tied=False, hidden=9)
    assert train == Train(lr=0.5)
    assert explicit == {"preset"}
    # also back to the default
    model, train, _ = read("--n_layer", "4", "--preset=large", "--tied", "--lr", "0.1")
    assert model == Model(preset="large", n_layer=4, norm="layer", tied=True, hidden=9)
    assert train.lr == 0.1


def test_later_sources_win_and_foreign_names_are_ignored():
    model = resolve(Model(), PRESETS["large"], {"n_layer": 5, "lr": 0.2}, {"n_layer": 6})
    assert model == Model(n_layer=6, norm="layer", tied=False, hidden=9)
    assert resolve(model) == model
    with pytest.raises(BadInput, match="--n_layer must be above 0"):
        resolve(model, {"n_layer": 0})


LATER: dict = {}


@dataclass(frozen=True)
class Chosen:
    way: str = flag("a", "which way", choices=lambda: LATER)
    other: str | None = flag(None, "which other way", choices=lambda: LATER)


def test_choices_are_the_keys_of_a_dict_that_may_be_filled_later(monkeypatch):
    monkeypatch.setitem(LATER, "a", 1)
    monkeypatch.setitem(LATER, "b", 2)
    (config,), _ = parse((Chosen,), ["--way", "b", "--other", "a"])
    assert config == Chosen("b", "a")
    check(Chosen())
    with pytest.raises(BadInput, match="--way: invalid choice: 'c'"):
        parse((Chosen,), ["--way", "c"])
    with pytest.raises(BadInput, match="--other must be a or b, not c"):
        check(Chosen(other="c"))  # as from a file
    field = Chosen.__dataclass_fields__["way"]
    assert choices_of(field, str) == ("a", "b")


@pytest.mark.parametrize("argv, message", [
    (["--n_layers", "3"], "unknown flag --n_layers: did you mean --n_layer"),
    (["--n_laier=3"], "unknown flag --n_laier=3: did you mean --n_layer"),
    (["--n", "3"], "unknown flag --n: "),  # no abbreviations
    (["--zzzzzz"], "unknown flag --zzzzzz: see --help"),
    (["--hidden", "3"], "unknown flag --hidden"),  # a field, but no flag
    (["stray"], "unexpected argument stray: flags are --name or --no-name"),
    (["T", "--n_layer", "2"], "unexpected argument T"),
    (["--", "--n_layer", "2"], "unexpected argument --"),
    (["--lr", "1", "--", "--tied"], "unexpected argument --"),
    (["--n_layer", "2.5"], "--n_layer: invalid integer value: '2.5'"),
    (["--n_layer", "inf"], "--n_layer: invalid integer value: 'inf'"),
    (["--sizes", "1", "x"], "--sizes: invalid integer value: 'x'"),
    (["--n_layer"], "--n_layer: expected one argument"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--act", "tanh"], "--act: invalid choice: 'tanh'.*gelu.*relu"),
    (["--preset", "huge"], "--preset: invalid choice: 'huge'.*small.*large"),
    (["--micro_batch", "some"], "--micro_batch: invalid integer or auto value: 'some'"),
    (["--n_layer", "4", "--preset"], "--preset: expected one argument"),
    (["--name", "a\udcff"], r"--name is not UTF-8 text: 'a\\udcff'"),
    (["--source", "a", "\udcff"], r"--source is not UTF-8 text"),
    (["--name", ""], "--name is empty: name something, or leave it out"),
    (["--\udcff"], "unknown flag"),
])
def test_bad_flags(argv, message):
    with pytest.raises(BadInput, match=message):
        read(*argv)


HUGE = 10**5000  # too many digits for a command line


@pytest.mark.parametrize("name, value, bounds", [
    ("n_layer", 0, "above 0 and at most 1,000"),
    ("n_layer", 1001, "above 0 and at most 1,000"),
    pytest.param("n_layer", HUGE, "above 0", id="huge"),
    ("lr", 0.0, "above 0"),
    ("lr", float("nan"), "above 0"),
    ("lr", float("inf"), "above 0"),
    ("dropout", 1.0, "at least 0 and below 1"),
    ("dropout", -1e-9, "at least 0 and below 1"),
    ("steps", 2**31, "above 0 and below 2,147,483,648"),
    ("micro_batch", 0, "above 0"),
    ("micro_batch", 2**63, "above 0 and below 9,223,372,036,854,775,808"),
])
def test_a_value_outside_its_bounds_is_refused_wherever_it_comes_from(name, value, bounds,
                                                                      monkeypatch):
    says = f"^--{name} must be {bounds}[^\n]{{,100}}$"
    if value != HUGE:
        with pytest.raises(BadInput, match=says):
            read(f"--{name}={value}")
        monkeypatch.setitem(PRESETS, "large", {name: value})
        with pytest.raises(BadInput, match=says):
            read("--preset", "large")
    with pytest.raises(BadInput, match=says):
        check((Model if name == "n_layer" else Train)(**{name: value}))  # as from a checkpoint


def test_bounds_are_inclusive_or_exclusive():
    for word in ("--n_layer=1", "--n_layer=1000", "--dropout=0", "--dropout=0.999",
                 "--steps=2147483647"):
        read(word)


@pytest.mark.parametrize("config, says", [
    (Model(n_layer="3"), "--n_layer must be int, not 3"),
    (Model(n_layer=True), "--n_layer must be int"),
    (Model(n_layer=3.0), "--n_layer must be int"),
    (Model(n_layer=None), "--n_layer must be int"),
    (Model(norm="batch"), "--norm must be rms or layer, not batch"),
    (Model(norm=["rms"]), "--norm must be"),
    (Model(tied=1), "--tied must be bool"),
    (Model(hidden=0), "^hidden must be at least 1, not 0"),
    (Train(lr="fast"), "--lr must be float"),
    (Train(lr=True), "--lr must be float"),
    (Train(steps={}), "--steps must be int"),
    (Train(micro_batch="some"), "--micro_batch must be int or auto"),
    (Train(source=["a"]), "--source must be"),
    (Train(source=("a", 3)), "--source must be"),
    (Train(name=7), "--name must be str"),
    (Train(name="x" * 10**6 + "\ud800"), "--name is not UTF-8 text"),
    (Model(norm="x" * 10**6), "--norm must be"),
])
def test_values_of_another_type_are_refused_in_configurations_from_files(config, says):
    with pytest.raises(BadInput, match=says) as error:
        check(config)
    assert len(str(error.value)) < 200


def test_configurations_from_files_that_are_fine():
    for config in (Model(), Model(act=None, hidden=1), Train(), Train(lr=1),
                   Train(steps=None, micro_batch=4, name="ü")):
        check(config)


def test_help_shows_bounds_and_the_presets_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--preset", "large", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "--hidden" not in text
    for part in ("layers; above 0 and at most 1,000 [48]",
                 "100% of the learning rate; above 0 [0.5]", "tie the head [off]", "files [a]",
                 "rows; above 0 [auto]", "dropout; at least 0 and below 1 [0.0]"):
        assert part in text, text


# --------------------------------------------------------------------------------------------------
# Any words at all

JUNK = st.one_of(
    st.sampled_from([
        "", "-", "--", "---", "=", "--=", "-1", "3", "1e3", "1e999", "nan", "-inf", "0x1", "1_0",
        "auto", "None", "large", "huge", "rms", "a b", "%s", "%(prog)s", "{}", "@file", "-h5",
        "\ud800"
    ]), st.text(max_size=6),
    st.floats().map(repr),
    st.integers().map(str))
NAMES = [
    "preset", "n_layer", "norm", "act", "tied", "hidden", "lr", "dropout", "steps", "micro_batch",
    "source", "sizes", "name", "compile", "debug", "help", "no-tied", "no-compile", "n_lay"
]
WORD = st.one_of(st.sampled_from([f"--{name}" for name in NAMES]), JUNK,
                 st.builds("--{}={}".format, st.sampled_from(NAMES), JUNK))
GOOD = st.sampled_from([["--preset", "large"], ["--n_layer", "1e2"], ["--norm=rms"],
                        ["--act", "relu"], ["--tied"], ["--no-tied"], ["--micro_batch", "auto"],
                        ["--micro_batch", "4"], ["--source", "a", "b"], ["--sizes", "1", "2.0"],
                        ["--name="], ["--name", "x y"], ["--compile"], ["--debug"]])
ARGV = st.lists(st.one_of(GOOD, GOOD, GOOD, st.builds(lambda word: [word], WORD)),
                max_size=5).map(lambda parts: sum(parts, []))


def fits(argv):
    """Whether `argv` can be read. Then its values pass `check`, and others are the preset's."""
    try:
        model, train, explicit = read(*argv)
    except BadInput as error:
        assert str(error)
        return False
    except SystemExit as stop:
        assert stop.code == 0 and any(word.startswith(("-h", "--help")) for word in argv), argv
        return False
    check(model)
    check(train)
    words = [word for word in argv if word.startswith("--") and word not in ("--", "--debug")]
    names = [word.split("=")[0].removeprefix("--").removeprefix("no-") for word in words]
    assert explicit == set(names), argv
    values = vars(model) | vars(train)
    default = vars(Model()) | vars(Train()) | PRESETS[model.preset]
    assert all(values[name] == default[name] for name in values.keys() - explicit)
    return True


def test_any_words_are_bad_input_or_values_of_the_right_types(capsys):
    read_well = []

    @settings(derandomize=True, deadline=None, max_examples=400)
    @given(argv=ARGV)
    @example(["--preset=--"])  # Python before 3.12 makes a list of this
    @example(["--n_layer=--"])
    @example(["--source=--"])
    @example(["--steps=1e999"])
    @example(["--sizes", "1", "inf"])
    @example(["--preset=large", "--preset", "small"])
    def check_words(argv):
        read_well.append(fits(argv))

    check_words()
    capsys.readouterr()  # --help
    assert 50 < sum(read_well) < len(read_well) - 50  # the test did see both


# --------------------------------------------------------------------------------------------------
# Variables of launchers

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
         "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def put(monkeypatch, values):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        if value is not None:
            monkeypatch.setenv(name, value)


def test_a_whole_environment_or_none(monkeypatch):
    put(monkeypatch, {})
    assert launched() is None
    put(monkeypatch, {"LOCAL_WORLD_SIZE": "2"})  # means nothing alone
    assert launched() is None
    put(monkeypatch, WHOLE)
    assert launched() == {"rank": 1, "world_size": 4, "local_rank": 1, "local_world_size": 2}
    assert not cli.is_main_process()
    put(monkeypatch, WHOLE | {"LOCAL_WORLD_SIZE": None})
    assert launched()["local_world_size"] == 4


@pytest.mark.parametrize("name, launcher", cli.RANKS.items())
def test_copies_that_srun_or_mpirun_start_are_refused_and_the_first_runs(
    name, launcher, monkeypatch
):
    put(monkeypatch, {})
    for other in cli.RANKS:
        monkeypatch.delenv(other, raising=False)
    for rank in ("0", "", "x"):
        monkeypatch.setenv(name, rank)
        assert launched() is None
    monkeypatch.setenv(name, "3")
    with pytest.raises(
        BadInput, match=f"{launcher} started .*{name}=3.*start one torchrun per node"
    ):
        launched()
    assert cli.is_main_process()  # which prints it
    put(monkeypatch, WHOLE)  # srun that starts a torchrun per node
    assert launched()["world_size"] == 4


INCONSISTENT = [
    ("MASTER_PORT", None), ("LOCAL_RANK", None), ("RANK", ""), ("RANK", "one"), ("RANK", "-1"),
    ("RANK", "4"), ("RANK", "\u0661"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "1e1"),
    ("WORLD_SIZE", "9" * 5000), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "8"),
    ("MASTER_PORT", "0"), ("MASTER_PORT", "70000"), ("MASTER_ADDR", ""),
]


@pytest.mark.parametrize("values", [
    {"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "0"},
    {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    *(WHOLE | {name: value} for name, value in INCONSISTENT),
], ids=range(5 + len(INCONSISTENT)))
def test_incomplete_or_inconsistent_environments_are_refused_and_printed(values, monkeypatch):
    put(monkeypatch, values)
    with pytest.raises(BadInput, match="start with torchrun, which sets them all, or unset them"):
        launched()
    assert cli.is_main_process()


# --------------------------------------------------------------------------------------------------
# Scripts

SCRIPT = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import dataclass
from lib.cli import BadInput, RankError, flag, parse, run

@dataclass
class Config:
    how: str = flag("fine", "how it ends")

def main(argv):
    (cfg,), _ = parse((Config,), argv)
    print("started", cfg.how, flush=cfg.how == "wait")
    if cfg.how == "bad":
        raise BadInput("first\\n  second   third")
    if cfg.how == "rank":
        raise RankError("only here")
    if cfg.how == "wait":
        time.sleep(60)
    if cfg.how == "files":
        raise OSError(24, "Too many open files")
    if cfg.how == "say":
        raise KeyboardInterrupt("half is done")
    if cfg.how == "bug":
        raise ValueError("a bug keeps its traceback")
    if cfg.how == "many":
        for i in range(100_000):
            print("line", i)

if __name__ == "__main__":
    run(main)
"""


@pytest.fixture
def script(tmp_path):
    """script("--how bad", RANK="1") runs the script above in a shell -> CompletedProcess (text)."""
    (tmp_path / "script.py").write_text(SCRIPT)
    clean = {name: value for name, value in os.environ.items() if name not in WHOLE}
    return lambda words="", seconds=600, **env: subprocess.run(
        f"exec {shlex.quote(sys.executable)} script.py {words}",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=clean | env,
        check=False,
    )


FULL_DISK = "script.py: error: cannot continue (No space left on device): free some disk space\n"


@pytest.mark.parametrize(
    "words, env, code, out, err",
    [
        ("", {}, 0, "started fine\n", ""),
        ("--how bad", {}, 2, "started bad\n", "script.py: error: first second third\n"),
        ("--how bad", {"RANK": "1"}, 2, "started bad\n",
         "script.py: error: first second third\n"),  # half a launcher
        ("--how bad", WHOLE, 2, "started bad\n", ""),  # rank 0 says it
        ("--how rank", WHOLE, 2, "started rank\n", "script.py: error: only here\n"),
        ("--haw bad", {}, 2, "", "script.py: error: unknown flag --haw: did you mean --how?\n"),
        ("--how files", {}, 2, "started files\n",
         "script.py: error: cannot continue (Too many open files): raise `ulimit -n`\n"),
        ("--how say", {}, 130, "started say\n", "\nhalf is done\n"),
        ("--how $(printf 'a\\377')", {}, 2, "",
         "script.py: error: --how is not UTF-8 text: 'a\\udcff'\n"),
        ("--how ü", {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, 0, "started \\xfc\n", ""),
        ("--how many | head -n 1", {}, 0, "started many\n", ""),  # a reader that has read enough
        ("--how fine >&-", {}, 0, "", ""),
        ("--how bad 2>&-", {}, 2, "started bad\n", ""),
        ("--how fine > /dev/full", {"PYTHONUNBUFFERED": ""}, 2, "", FULL_DISK),
        ("--how many > /dev/full", {"PYTHONUNBUFFERED": ""}, 2, "", FULL_DISK),
        ("--how fine > /dev/full", {"PYTHONUNBUFFERED": "1"}, 2, "", FULL_DISK),
        ("--how bad > /dev/full", {"PYTHONUNBUFFERED": ""
                                   }, 2, "", "script.py: error: first second third\n"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("--") else "")
def test_a_script_ends_with_its_code_and_one_line(words, env, code, out, err, script):
    result = script(words, **env)
    assert (result.returncode, result.stderr) == (code, err) and result.stdout == out


@pytest.mark.parametrize(
    "rank, patience, is_printed", [("0", 60, True), ("1", 60, False), ("1", 0, True)]
)
def test_rank_0_reports_common_errors_and_other_ranks_only_their_own(
    rank, patience, is_printed, script, tmp_path
):
    """Under torchrun, which ends the others (here: this test) as soon as one has failed."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"import lib.cli\nlib.cli.PATIENCE = {patience}\n"
    )
    env = WHOLE | {
        "RANK": rank,
        "TORCHELASTIC_ERROR_FILE": str(tmp_path / "report"),
        "PYTHONPATH": str(tmp_path),
    }
    line = "script.py: error: first second third"
    if is_printed:
        result = script("--how bad", **env)
        assert (result.returncode, result.stderr) == (2, f"{line}\n")
        assert json.loads((tmp_path / "report").read_text())["message"] == line
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            script("--how bad", seconds=2, **env)
        assert not (tmp_path / "report").exists()


NOTEBOOK = """
import runpy, sys

class OutStream:
    def __init__(self, stream):
        self.write, self.flush = stream.write, stream.flush

sys.stdout, sys.stderr = OutStream(sys.stdout), OutStream(sys.stderr)
sys.argv = ["script.py", "--how", sys.argv[1]]
runpy.run_path("script.py", run_name="__main__")
"""


def test_a_script_runs_where_a_notebook_has_put_its_own_streams(script, tmp_path):
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    for how, code, out, err in (
        ("fine", 0, "started fine\n", ""),
        ("bad", 2, "started bad\n", "script.py: error: first second third\n"),
    ):
        done = subprocess.run(
            [sys.executable, "notebook.py", how],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_a_bug_keeps_its_traceback_and_debug_shows_that_of_bad_input(script):
    for words, code in (("--how bug", 1), ("--how bad --debug", 2)):
        result = script(words)
        assert result.returncode == code and "Traceback" in result.stderr


def test_ctrl_c_ends_a_script_cleanly(script, tmp_path):
    process = subprocess.Popen([sys.executable, tmp_path / "script.py", "--how", "wait"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started wait\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=600)[1] == "\ninterrupted\n" and process.returncode == 130


def test_a_user_without_a_name_and_a_home_to_write_to(monkeypatch, tmp_path):
    """As with `docker --user` and OpenShift: libraries get a user name, and folders for their
    caches."""
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HF_HOME", "XDG_CACHE_HOME",
                 *cli.HF_CACHES):
        monkeypatch.setenv(name, "x")  # so that what is set here is undone
        monkeypatch.delenv(name)
    (tmp_path / "file").touch()
    for home, is_writable in ((str(tmp_path), True), (f"{tmp_path}/file/home", False), ("~",
                                                                                        False)):
        monkeypatch.setenv("HOME", home)
        if home == "~":
            monkeypatch.delenv("HOME")
        cli.run(lambda argv: None)
        assert getpass.getuser() == f"uid_{os.getuid()}"
        assert (cli.HF_CACHES.keys() <= os.environ.keys()) is not is_writable
        for name in cli.HF_CACHES:
            assert is_writable or os.path.isabs(os.environ.pop(name))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    (tmp_path / ".cache" / "huggingface" / "hub").mkdir(
        parents=True)  # what is cached is found, also where it is read-only
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    cli.complete_environment()
    assert "HF_HUB_CACHE" not in os.environ and "HF_DATASETS_CACHE" in os.environ
