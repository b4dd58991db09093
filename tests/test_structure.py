"""The layout: imports go downwards only, without a circle; plain torchrun takes every flag.
Run: python -m pytest tests/test_structure.py"""

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
# what the others of lib/ stand on, and what these may import
FLOOR = {
    "lib.startup": set(), "lib.cli": {"lib.startup"}, "lib.files": {"lib.cli"},
    "lib.devices": {"lib.cli"}
}
MODEL = "train_gpt2"  # the one script that other scripts may import


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


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


def graph():
    """{module: project modules that it imports}, of the scripts and lib/."""
    files = {module_of(path): path for path in (*ROOT.glob("*.py"), *ROOT.glob("lib/**/*.py"))}
    return {
        module: imports_of(path.read_text(), set(files)) - {module}
        for module, path in files.items()
    }


def wrong(imports):
    """What breaks the layout in {module: modules it imports}, as text."""
    lines = []
    for module, used in imports.items():
        below = {name for name in used if not name.startswith("lib")}
        if module.startswith("lib"):
            lines += [f"{module} imports the script {name}" for name in below]
            lines += [f"{module} imports {name}, which stands above it"
                      for name in (used - below - {"lib"}) - FLOOR.get(module, used)]
            if not module.startswith("lib.evals"):
                lines += [
                    f"{module} imports the evaluation {name}" for name in used
                    if name.startswith("lib.evals")
                ]
        elif module == MODEL:
            lines += [f"{module} imports the script {name}" for name in below]
        else:
            lines += [f"{module} imports the script {name}" for name in below - {MODEL}]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        lines.append(f"a circle: {' <- '.join(error.args[1])}")
    return lines


def test_imports_go_downwards_only():
    imports = graph()
    assert {"train_gpt2", "fineweb", "hellaswag", "generate",
            "lib.cli", "lib.run_folder", "lib.evals.hellaswag"} <= set(imports)
    assert "lib.cli" in imports["train_gpt2"] and wrong(imports) == []


@pytest.mark.parametrize(
    "module, source, says",
    [("lib.decoding", "def sample():\n    from train_gpt2 import GPT",
      "lib.decoding imports the script train_gpt2"),
     ("lib.checkpoint", "import lib.run_folder", "a circle"),
     ("lib.files", "from lib import checkpoint",
      "lib.files imports lib.checkpoint, which stands above it"),
     ("lib.logger", "from lib.evals.scoring import score",
      "lib.logger imports the evaluation lib.evals.scoring"),
     ("train_gpt2", "from fineweb import main", "train_gpt2 imports the script fineweb"),
     ("generate", "if True:\n    import hellaswag", "generate imports the script hellaswag"), ])
def test_what_would_break_the_layout_is_found(module, source, says):
    imports = graph()
    imports[module] = imports[module] | imports_of(source, set(imports))
    assert any(says in line for line in wrong(imports))


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_file_has_no_side_effects(script, tmp_path):
    """Nothing printed, written or joined, and no slow library loaded that the script may never
    need."""
    code = (f"import sys, {script}\n"
            "assert not {'datasets', 'transformers', 'tensorboard', 'lm_eval'} & set(sys.modules), 'slow imports'\n"
            "torch = sys.modules.get('torch')\n"
            "assert not (torch and (torch.distributed.is_initialized() or torch.cuda.is_initialized()))\n")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_names_files_or_folders_takes_a_tilde(script):
    """By what its help says: a new one must not make a folder named ~."""
    module = importlib.import_module(script)
    configs = [value for value in vars(module).values() if is_dataclass(value)]
    for field in (field for config in configs for field in fields(config)
                  if field.metadata.get("help")):
        says = field.metadata["help"].partition(";")[0]
        names_one = re.search(r"\b(files?|folders?|jsonl|json|checkpoint)\b",
                              says) and "str" in str(field.type)
        is_path = field.metadata["path"] or field.name in ("run_name", "pretokenized"
                                                           )  # a name, an id of the hub
        assert is_path or not names_one, f"--{field.name}: {says}"


def test_no_flag_is_an_abbreviation_of_one_of_torchrun():
    """Python 3.11 and older look for abbreviations behind the script's name, too:
    --run would be torchrun's --run_path there."""
    from torch.distributed.run import get_args_parser

    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    ours = {
        f"--{no}{field.name}" for cls in (TrainConfig, GPTConfig, PostTrainConfig)
        for field in fields(cls) for no in ("", "no-")
    } | {"--debug", "--help"}
    assert "--nproc_per_node" in theirs and "--run_name" in ours and any(
        option.startswith("--run") for option in theirs)
    assert not [(flag, option)
                for flag in ours
                for option in theirs
                if option != flag and option.startswith(flag)]


def test_plain_torchrun_takes_the_flags(data, tmp_path):
    command = [
        Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node=2",
        ROOT / "train_gpt2.py", *TINY_FLAGS, "--data", data, "--no-shuffle", "--seed=3",
        "--run_name", "x"
    ]
    done = subprocess.run([str(word) for word in command], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len([kind for _, kind in read_log(tmp_path / "log" / "x") if kind == "train"]) == 6


# What makes the script readable (DESIGN.md's shape of train_gpt2.py), as far as a parser can tell

COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def hard_to_read(source):
    """What breaks the rules of the script in its source, as text, with line numbers."""
    lines = [
        f"line {i}: {len(line)} columns" for i, line in enumerate(source.splitlines(), 1)
        if len(line) > 100
    ]
    for node in ast.walk(ast.parse(source)):
        inner = [part for part in ast.walk(node) if part is not node]
        if isinstance(node, COMPREHENSIONS) and any(
                isinstance(part, COMPREHENSIONS) for part in inner):
            lines.append(f"line {node.lineno}: a comprehension inside a comprehension")
        arms = (*ast.walk(node.body), *ast.walk(node.test)) if isinstance(node, ast.IfExp) else ()
        if any(isinstance(part, ast.IfExp) for part in arms):
            lines.append(f"line {node.lineno}: a ternary inside a ternary")
        if isinstance(node, ast.FunctionDef) and node.name == "forward":
            conditions = [part.test for part in inner if isinstance(part, (ast.If, ast.IfExp))]
            lines += [
                f"line {test.lineno}: forward depends on `{ast.unparse(test)}`"
                for test in conditions
                if not ast.unparse(test).endswith(" is None")
                and ast.unparse(test) != "self.training"
            ]
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
            lines.append(f"line {node.lineno}: an environment variable is no flag")
    return lines


def test_the_script_keeps_to_the_rules_of_readability():
    """Branches stand in constructors: forward may ask for an argument that was left out, or for
    training, alone."""
    assert hard_to_read((ROOT / "train_gpt2.py").read_text()) == []
    flags = [*TrainConfig.__annotations__, *GPTConfig.__annotations__]
    assert not [name for name in flags if name.startswith(("use_", "enable_"))]


@pytest.mark.parametrize("source, says",
                         [("x = 1  # " + "y" * 100, "columns"),
                          ("[[a for a in b] for b in c]", "comprehension"),
                          ("(a if b else c) if d else e", "ternary"),
                          ("def forward(self, x):\n    if self.config.n_experts:\n        return x",
                           "self.config.n_experts"),
                          ("import os\nfast = os.environ['FAST']", "environment"), ])
def test_what_breaks_the_rules_is_found(source, says):
    assert any(says in line for line in hard_to_read(source)), hard_to_read(source)


def test_git_ignores_every_output_folder_and_nothing_of_the_project(tmp_path):
    def git(*words, cwd=tmp_path):
        return subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True,
                              check=True).stdout.split()

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
    assert git("ls-files", "--others",
               "--exclude-standard") == [".gitignore", "lib/new.py", "log/.gitkeep"]
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard", cwd=ROOT) == []
