"""The layout of the code, how it reads, and that plain torchrun takes every flag.

    python -m pytest tests/test_structure.py
"""

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT, TINY_FLAGS, read_log

from posttrain import Config as PostTrainConfig
from train_gpt2 import GPTConfig, TrainConfig

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def files(*patterns):
    """The project's Python files that match, as paths relative to its folder."""
    found = []
    for pattern in patterns:
        found += ROOT.glob(pattern)
    return sorted(str(path.relative_to(ROOT)) for path in found)


# --------------------------------------------------------------------------------------------------
# Imports

# the base of lib/: what each of its modules may import; the others import only what is below them
FLOOR = {
    "lib.startup": set(),
    "lib.cli": {"lib.startup"},
    "lib.files": {"lib.cli"},
    "lib.nodes": {"lib.cli"},
    "lib.kernels": set(),
    "lib.devices": {"lib.cli", "lib.kernels", "lib.nodes"},
}
MODEL = "train_gpt2"  # the one script that other scripts may import


def module_of(file):
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports_of(source, known):
    """The modules among `known` that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found & known


@pytest.fixture
def imports():
    """{module: modules of the project that it imports}, of the scripts and lib/."""
    modules = {module_of(file): file for file in files("*.py", "lib/**/*.py")}
    found = {}
    for module, file in modules.items():
        found[module] = imports_of((ROOT / file).read_text(), set(modules)) - {module}
    return found


def forbidden(module, name):
    """Why `module` must not import `name`; None if it may."""
    if not name.startswith("lib"):
        may = name == MODEL and module != MODEL and not module.startswith("lib")
        return None if may else f"{module} imports the script {name}"
    if module in FLOOR and name not in FLOOR[module] | {"lib"}:
        return f"{module} imports {name}, which is above it"
    inside = not module.startswith("lib") or module.startswith("lib.evals")
    if name.startswith("lib.evals") and not inside:
        return f"{module} imports the evaluation {name}"
    return None


def problems_of(imports):
    """Imports that break the layout in {module: modules it imports}, as text."""
    problems = []
    for module, used in imports.items():
        problems += filter(None, (forbidden(module, name) for name in used))
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        problems.append(f"a cycle: {' <- '.join(error.args[1])}")
    return problems


def test_imports_go_downwards_only(imports):
    assert {"train_gpt2", "fineweb", "lib.cli", "lib.evals.hellaswag"} <= imports.keys()
    assert "lib.cli" in imports["train_gpt2"]
    assert problems_of(imports) == []


@pytest.mark.parametrize("module, source, message", [
    ("lib.decoding", "def sample():\n    from train_gpt2 import GPT", "the script train_gpt2"),
    ("lib.checkpoint", "import lib.run_folder", "a cycle"),
    ("lib.files", "from lib import checkpoint", "lib.checkpoint, which is above it"),
    ("lib.logger", "from lib.evals.scoring import score", "the evaluation lib.evals.scoring"),
    ("train_gpt2", "from fineweb import main", "the script fineweb"),
    ("generate", "if True:\n    import hellaswag", "the script hellaswag"),
])
def test_an_import_that_breaks_the_layout_is_found(module, source, message, imports):
    imports[module] |= imports_of(source, set(imports))
    assert any(message in problem for problem in problems_of(imports))


SIDE_EFFECTS = """
import importlib, os, sys
for script in sys.argv[1:]:
    importlib.import_module(script)
    slow = {"datasets", "transformers", "tensorboard", "lm_eval"} & set(sys.modules)
    assert not slow, (script, slow)
    torch = sys.modules.get("torch")
    assert not (torch and torch.distributed.is_initialized()), script
    assert not (torch and torch.cuda.is_initialized()), script
    assert not os.listdir(), script
"""


def test_importing_a_file_has_no_side_effects(tmp_path):
    """Nothing printed, written or joined, and no slow library loaded that the script may not need.
    """
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", SIDE_EFFECTS, *SCRIPTS], cwd=tmp_path, env=env,
                            capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --------------------------------------------------------------------------------------------------
# Flags

NAMES = ("run_name", "pretokenized")  # of a run, of a dataset on the hub: not paths


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_names_files_or_folders_takes_a_tilde(script):
    """Judged by its help text: a new flag must not make a folder named ~."""
    module = importlib.import_module(script)
    flags = []
    for config in filter(is_dataclass, vars(module).values()):
        flags += [field for field in fields(config) if field.metadata.get("help")]
    for field in flags:
        what = field.metadata["help"].partition(";")[0]
        if "str" not in str(field.type) or field.name in NAMES:
            continue
        if re.search(r"\b(files?|folders?|jsonl|json|checkpoint)\b", what):
            assert field.metadata["path"], f"--{field.name}: {what}"


def test_no_flag_is_an_abbreviation_of_one_of_torchrun():
    """Python 3.11 and older accept abbreviations of torchrun's flags after the script's name, too:
    --run would be torchrun's --run_path there."""
    from torch.distributed.run import get_args_parser

    theirs = set()
    for action in get_args_parser()._actions:
        theirs |= set(action.option_strings)
    ours = {"--debug", "--help"}
    for cls in (TrainConfig, GPTConfig, PostTrainConfig):
        for field in fields(cls):
            ours |= {f"--{field.name}", f"--no-{field.name}"}
    assert {"--nproc_per_node", "--run_path"} <= theirs
    assert "--run_name" in ours
    for flag in ours:
        assert not [option for option in theirs - {flag} if option.startswith(flag)], flag


def test_plain_torchrun_takes_the_flags(data, tmp_path):
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--standalone", "--nproc_per_node=2", ROOT / "train_gpt2.py", *TINY_FLAGS,
               "--data", data, "--no-shuffle", "--seed=3", "--run_name", "x"]
    done = subprocess.run([str(word) for word in command], cwd=tmp_path, text=True, check=False,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    steps = [step for step, kind in read_log(tmp_path / "log" / "x") if kind == "train"]
    assert steps == list(range(6))


# --------------------------------------------------------------------------------------------------
# Readability: the rules of DESIGN.md and CONTRIBUTING.md that a parser can check

COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
CODE = files("*.py", "lib/**/*.py")


def long_lines(source):
    lines = enumerate(source.splitlines(), 1)
    return [f"line {i}: {len(line)} columns" for i, line in lines if len(line) > 100]


def inside(node):
    return [part for part in ast.walk(node) if part is not node]


def nested(source):
    """Comprehensions inside a comprehension, and ternaries inside a ternary."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        for kinds, name in ((COMPREHENSIONS, "comprehension"), (ast.IfExp, "ternary")):
            if isinstance(node, kinds) and any(isinstance(part, kinds) for part in inside(node)):
                problems.append(f"line {node.lineno}: a {name} inside a {name}")
    return problems


def toggles_read(source):
    """Flags read in `forward`, and environment variables used as flags.

    Branches belong in constructors: forward may only test for a missing argument, and for training.
    """
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
            problems.append(f"line {node.lineno}: an environment variable is not a flag")
        if not isinstance(node, ast.FunctionDef) or node.name != "forward":
            continue
        for branch in inside(node):
            if isinstance(branch, (ast.If, ast.IfExp)):
                test = ast.unparse(branch.test)
                if not test.endswith(" is None") and test != "self.training":
                    problems.append(f"line {branch.lineno}: forward depends on `{test}`")
    return problems


@pytest.mark.parametrize("file", files("*.py", "lib/**/*.py", "tests/**/*.py", "benchmarks/*.py"))
def test_files_keep_to_the_rules_of_readability(file):
    source = (ROOT / file).read_text()
    problems = long_lines(source)
    if file in CODE:
        problems += nested(source)
    if file == "train_gpt2.py":
        problems += toggles_read(source)
    assert problems == []


def test_no_flag_is_called_use_or_enable():
    flags = [*TrainConfig.__annotations__, *GPTConfig.__annotations__]
    assert not [name for name in flags if name.startswith(("use_", "enable_"))]


@pytest.mark.parametrize("rule, source, message", [
    (long_lines, "x = 1  # " + "y" * 100, "109 columns"),
    (nested, "[[a for a in b] for b in c]", "comprehension"),
    (nested, "(a if b else c) if d else e", "ternary"),
    (nested, "a if b else (c if d else e)", "ternary"),
    (toggles_read, "def forward(self, x):\n    if self.config.bias:\n        x = 1", "config.bias"),
    (toggles_read, "import os\nfast = os.environ['FAST']", "environment"),
])
def test_code_that_breaks_a_rule_is_found(rule, source, message):
    [problem] = rule(source)
    assert message in problem


# --------------------------------------------------------------------------------------------------
# git


def test_git_ignores_every_output_folder_and_nothing_of_the_project(tmp_path):
    def git(*words, cwd=tmp_path):
        done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=True)
        return done.stdout.split()

    outputs = [
        "edu_fineweb10B/a.npy", "mine/meta.json", "bpe32k/tokenizer.json", "exported/config.json",
        "hellaswag/hellaswag_val.jsonl", "log/a/log.txt", "log/ablation/ablation.md",
        ".venv/bin/python"
    ]
    git("init", "-q")
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    for name in (*outputs, "lib/new.py", "log/.gitkeep"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    untracked = git("ls-files", "--others", "--exclude-standard")
    assert untracked == [".gitignore", "lib/new.py", "log/.gitkeep"]
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard", cwd=ROOT) == []
