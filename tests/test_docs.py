"""README.md and docs/: commands run, flags exist, links lead somewhere.
Run: python -m pytest tests/test_docs.py

Every command in a fenced block must be in COMMANDS, which determines how it is tested. The commands
of a page run in order, in one folder. Those of recipes.md, which need services, are only read.
"""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, hellaswag_items, sentences, write_lines
from torch.distributed.run import get_args_parser

import train_gpt2
from lib import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = ROOT / "docs" / "recipes.md"
RUN_PAGES = [page for page in PAGES if page != RECIPES]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

# How a command is tested. A string contains flags that make it small; the command runs with them.
PARSED = None      # needs the hub, several GPUs, a server or minutes: only its flags are read
NOT_OURS = object()
SLOW = object()    # runs in `make test-slow`, else its flags are read

TINY = ("--preset modern --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --max_steps 4 "
        "--total_batch_size 256 --warmup_steps 1 --val_tokens 330 --save_every 2 --keep 0 "
        "--hellaswag_every 0 --sample_every 0 --device cpu")
MORE = "--total_batch_size 256 --max_steps 6 --sample_every 0 --device cpu"  # of a trained shape
POST = "--max_steps 2 --total_batch_size 256 --sample_every 0 --device cpu"
SHORT = "--max_new_tokens 4 --device cpu"

COMMANDS = {
    # set-up
    "make train": PARSED,
    'make train ARGS="--max_steps 100"': PARSED,
    "source .venv/bin/activate": NOT_OURS,
    "cd /workspace && git clone URL && cd REPO": NOT_OURS,
    "cd /workspace/REPO": NOT_OURS,
    "ssh -L 6006:localhost:6006 HOST": NOT_OURS,
    "ssh -L 8000:localhost:8000 HOST": NOT_OURS,
    "tensorboard --logdir log": NOT_OURS,
    "curl http://127.0.0.1:8000/v1/chat/completions "
    """-d '{"model": "RUN", "messages": [{"role": "user", "content": "Hi"}]}'""": NOT_OURS,
    # data
    "python fineweb.py": PARSED,
    "python fineweb.py --preset fineweb-edu-100BT": PARSED,
    "python fineweb.py --preset wikipedia --name 20231101.de --dedup": PARSED,
    "python fineweb.py --source some/dataset --text_column body --out other": PARSED,
    "python fineweb.py --docstrings --tokenizer bpe:4096": PARSED,
    "python fineweb.py --pretokenized fineweb-edu-10BT --shards 20": PARSED,
    "python fineweb.py --pretokenized some/dataset:folder --max_tokens 2e9": PARSED,
    "python fineweb.py --tokenizer o200k_base --out edu_o200k": PARSED,
    'python fineweb.py --source a.parquet more/ "*.jsonl.zst" --out mine': "--tokenizer bpe:284",
    "python fineweb.py --source book.txt --tokenizer bpe:4096 --out mine": "--tokenizer bpe:284",
    "python fineweb.py --source a.parquet --tokenizer bpe32k/tokenizer.json --out mine32k": "",
    "python fineweb.py --source mine.jsonl --tokenizer bpe:16384 --out mine16k":
        "--tokenizer bpe:284",
    "python tokenizer.py train --source a.parquet --vocab_size 32768 --out bpe32k":
        "--vocab_size 284",
    "python tokenizer.py compare --source val.parquet --tokenizer gpt2 o200k_base bpe32k "
    "--width 768": PARSED,  # would download o200k_base
    # training
    "torchrun --standalone --nproc_per_node=8 train_gpt2.py --run_name first": PARSED,
    "torchrun --standalone --nproc_per_node=gpu --max_restarts=3 train_gpt2.py --run_name first "
    "--tensorboard 6006": PARSED,
    "torchrun --standalone --nproc_per_node=2 train_gpt2.py --size gpt2-xl --parallel fsdp "
    "--checkpoint_activations": PARSED,
    "torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500 "
    "--nproc_per_node=gpu --max_restarts=3 train_gpt2.py --run_name first": PARSED,
    "torchrun --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500 "
    "--nproc_per_node=gpu --max_restarts=3 train_gpt2.py --run_name first": PARSED,
    "tmux new -d -s train '.venv/bin/torchrun --standalone --nproc_per_node=gpu --max_restarts=3 "
    "train_gpt2.py --run_name first 2>&1 | tee -a first.out'": PARSED,
    "python train_gpt2.py --run_name first": TINY,
    "python train_gpt2.py --run_name first --sync 'rclone copy --local-no-check-updated "
    "--ignore-size {folder} box:runs/{name}'": f"{TINY} --sync true",
    "rclone copy box:runs/first log/first": NOT_OURS,
    "python train_gpt2.py --run_name first --on_end "
    """'curl -d "$RUN_NAME: $RUN_OUTCOME" "$NOTIFY"'""": f"{TINY} --on_end true",
    "python train_gpt2.py --data mine --run_name first": TINY,
    "python train_gpt2.py --preset tiny --data mine": f"{TINY} --preset tiny --run_name mine",
    "python train_gpt2.py --preset modern --mlp gelu --no-emb_norm --run_name second":
        f"{TINY} --data mine",
    "python train_gpt2.py --follow --run_name early": TINY,
    "python train_gpt2.py --data wiki:3 books:1": f"{TINY} --run_name mixed",
    "python train_gpt2.py --data wiki --curriculum baby --curriculum_steps 500":
        f"{TINY} --curriculum_steps 2 --run_name curriculum",
    "python train_gpt2.py --dtype fp16": f"{TINY} --run_name fp16",
    "python train_gpt2.py --plan --tok_per_sec 556274 --price_per_hour 2": "",
    "python train_gpt2.py --doctor --price_per_hour 2": PARSED,  # has tests of its own
    "python train_gpt2.py --resume auto": TINY,
    "python train_gpt2.py --resume log/first/ckpt_05000.pt":
        "--resume log/first/ckpt_00002.pt --device cpu",
    "python train_gpt2.py --resume log/first": "--device cpu",
    "python train_gpt2.py --resume log/first --run_name second": MORE,
    "python train_gpt2.py --init_from log/first --max_lr 1e-4 --run_name third": MORE,
    "python train_gpt2.py --config log/first --run_name again": "--device cpu",
    "python train_gpt2.py --eval_tasks arc_easy,piqa --eval_tasks_every 1000": PARSED,
    "python train_gpt2.py --preset speedrun --n_experts 8 --n_active 2":
        f"{TINY} --preset speedrun --batch_warmup 0",
    "python train_gpt2.py --preset tiny --no-token_shift --no-value_residual "
    "--no-residual_scalars --bigram 0 --softcap 0 --no-qk_norm --run_name second":
        f"{TINY} --preset tiny --data edu_fineweb10B",
    # evaluation and text
    "python loss.py --checkpoint log/first log/second --model gpt2 --text book.txt more/": PARSED,
    "python loss.py --checkpoint log/first --text edu_fineweb10B book.txt --by_file --by_position":
        "--val_tokens 330 --device cpu",
    "python eval_harness.py --checkpoint log/first": PARSED,
    "python eval_harness.py --checkpoint log/first --tasks hellaswag,arc_easy": PARSED,
    "python eval_harness.py --checkpoint log/first --tasks winogrande,boolq,wikitext "
    "--output log/first/eval_STEP_more.json": PARSED,
    "python eval_harness.py --checkpoint log/first --tasks arc_easy --data_dir DIR": PARSED,
    "python eval_harness.py --model gpt2": PARSED,
    "python eval_harness.py --compare log/first log/hf_gpt2": PARSED,
    "torchrun --standalone --nproc_per_node=gpu eval_harness.py --checkpoint log/first": PARSED,
    "python hellaswag.py --checkpoint log/first": "--file hellaswag_val.jsonl --device cpu",
    "python hellaswag.py --model gpt2": PARSED,
    'python generate.py --checkpoint log/first --prompt "Once upon a time" --samples 1': SHORT,
    'python generate.py --checkpoint log/first --prompt "One" "Another, longer" --top_p 0.9 '
    '--stop "." --max_new_tokens 200': SHORT,
    'python generate.py --checkpoint log/first --prompt "Once upon a time" --context 4096 '
    "--rope_scaling ntk": f"{SHORT} --context 64",
    # post-training and chat
    "python posttrain.py --checkpoint log/first --data instructions.jsonl --run_name chat": POST,
    "python posttrain.py --model gpt2 --data instructions.jsonl": PARSED,
    "python posttrain.py --checkpoint log/first --data chats.parquet more/ --replay 0.1": POST,
    "python posttrain.py --checkpoint log/first --data book.txt --epochs 1":
        "--run_name book --total_batch_size 256 --sample_every 0 --device cpu",
    "torchrun --standalone --nproc_per_node=8 posttrain.py --checkpoint log/first "
    "--data instructions.jsonl": PARSED,
    "python chat.py --checkpoint log/chat": PARSED,
    'python chat.py --checkpoint log/chat -p "What is a cat?" --temperature 0': SHORT,
    "python chat.py --checkpoint log/chat --serve": PARSED,
    "python chat.py --checkpoint log/chat --serve --host 0.0.0.0 --api_key SECRET": PARSED,
    # export
    "python export_hf.py --checkpoint log/first/ckpt_05000.pt --out weights_05000.pt "
    "--dtype bf16": "--checkpoint log/first/ckpt_00002.pt",
    "python export_hf.py --checkpoint log/first --out exported": SLOW,
    "python export_hf.py --checkpoint log/first --out exported --check": SLOW,
    "python export_hf.py --checkpoint log/second --out second_exported": SLOW,
    "python export_hf.py --checkpoint log/chat --out chat_exported": PARSED,
    "python export_hf.py --checkpoint log/chat --out chat_exported --dtype bf16": PARSED,
    "transformers serve chat_exported": NOT_OURS,
    "transformers chat chat_exported http://localhost:8000": NOT_OURS,
    "vllm serve chat_exported": NOT_OURS,
    "vllm chat": NOT_OURS,
    "python export_gguf.py --checkpoint log/chat --out chat.gguf":
        "--checkpoint log/first",
    "ollama create chat -f chat.Modelfile": NOT_OURS,
    "ollama run chat": NOT_OURS,
    "lms import chat.gguf --copy --user-repo me/chat": NOT_OURS,
    "lms chat": NOT_OURS,
    "python train_gpt2.py --preset tiny --mlp swiglu --no-token_shift --no-value_residual "
    "--no-residual_scalars --bigram 0 --softcap 0 --run_name third":
        f"{TINY} --preset tiny --data edu_fineweb10B",
    "python train_gpt2.py --preset speedrun --size auto --minutes 10": PARSED,
    "python train_gpt2.py --preset speedrun --size auto --dollars 3 --price_per_hour 2": PARSED,
    # results
    "python results.py": "",
    "python results.py --sort seconds --price_per_hour 2": "",
    "python results.py --json": "",
    # experiments
    "python ablate.py --price_per_hour 2 -- --preset speedrun --data mine --n_layer 8 "
    "--max_steps 280": PARSED,
    "python ablate.py --changes mine.txt --seeds 1 2 3 -- --preset modern --data mine "
    "--minutes 2": PARSED,
    'python ablate.py --grid "max_lr .02 .03 .04" --grid "cooldown .4 .7" -- --preset speedrun '
    "--data mine --n_layer 8 --max_steps 280": PARSED,
    "python ablate.py --changes mine.txt -- --preset gpt2 --data mine --epochs 0.5": PARSED,
    "python ablate.py --changes winners.txt --out log/seconds -- --preset gpt2 --data mine "
    "--minutes 1": PARSED,
}
# pages with Python code, which other tests run
PYTHON = {"data.md", "export.md", "post-training-and-chat.md", "streams.md"}

# flags of services in recipes.md, from the source of vastai 1.9.1 and of runpodctl (July 2026), and
# from sbatch's manual
SERVICES = {
    "vastai": {"--interruptible", "--order", "--image", "--disk", "--ssh", "--direct",
               "--bid_price", "--onstart"},
    "runpodctl": {"--name", "--image", "--gpu-id", "--gpu-count", "--min-cuda-version",
                  "--container-disk-in-gb", "--volume-in-gb", "--volume-mount-path"},
    "#SBATCH": {"--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task",
                "--time", "--signal", "--open-mode"},
}

# flags of other programs, in the text of the pages
OTHERS = {"--signal", "--signals-to-handle", "--nproc_per_node", "--standalone", "--max_restarts",
          "--logdir", "--jinja", "--nnodes", "--node_rank", "--master_addr", "--local_addr",
          "--rdzv_backend", "--rdzv_endpoint", "--rdzv_conf"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The command lines of a page, without comments, continued lines joined."""
    lines = []
    for language, block in blocks(page):
        if language != "python":
            lines += block.replace("\\\n", " ").splitlines()
    uncommented = (re.sub(r"(^|\s+)# .*", "", line) for line in lines)
    return [" ".join(line.split()) for line in uncommented if line.strip()]


# --------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    """A run folder, which most pages need."""
    log = tmp_path_factory.mktemp("log")
    flags = [*TINY.split(), "--data", str(data), "--log_dir", str(log), "--run_name", "first"]
    train_gpt2.main(flags)
    return log / "first"


@pytest.fixture
def place(page, tmp_path, monkeypatch, data, first, datasets_cache):
    """The working folder of a page, with the files that its commands name."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    for name in ("edu_fineweb10B", "wiki", "books", "baby"):
        shutil.copytree(data, name)
    makes_first = [line for line in commands(page) if "train_gpt2.py" in line and "first" in line]
    if not any(line.startswith("python") for line in makes_first):
        shutil.copytree(first, "log/first")
    texts = sentences(80)
    for name in ("a.parquet", "val.parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), name)
    pairs = [{"instruction": text, "output": text} for text in texts[:30]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), "chats.parquet")
    write_lines(Path("instructions.jsonl"), pairs)
    rows = [{"text": text} for text in texts]
    Path("more").mkdir()
    for path in (Path("more/b.jsonl"), Path("mine.jsonl")):
        write_lines(path, rows)
    with pyarrow.CompressedOutputStream("c.jsonl.zst", "zstd") as file:
        file.write(Path("mine.jsonl").read_bytes())
    Path("book.txt").write_text("\n".join(texts))
    write_lines(Path("hellaswag_val.jsonl"), hellaswag_items(4))


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page(page, place):
    for command in commands(page):
        check(command, slow=False)


WITH_SLOW = [page for page in RUN_PAGES
             if any(COMMANDS.get(line) is SLOW for line in commands(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_SLOW, ids=lambda page: page.stem)
def test_the_slow_commands_of_a_page(page, place):
    for command in commands(page):
        check(command, slow=True)


def check(command: str, slow: bool):
    """Run a command, or only read its flags, depending on COMMANDS."""
    assert command in COMMANDS, f"say in COMMANDS how this is tested: {command}"
    how = COMMANDS[command]
    if how is NOT_OURS:
        return
    if how is SLOW and slow:
        how = ""
    if how in (PARSED, SLOW):
        read_flags(command)
        return
    python, script, *flags = shlex.split(command)
    assert python == "python"
    main_of(script)([*flags, *how.split()])


def main_of(script: str):
    return importlib.import_module(script.removesuffix(".py")).main


class Parsed(Exception):
    """Raised instead of running a script, once its flags are read."""


def read_flags(command: str):
    """Let the programs of a command read its flags. Raises BadInput if a flag does not exist."""
    program, *words = shlex.split(command)
    if program == "tmux":
        program, *words = words[-1].partition(" 2>&1")[0].split()
    if program == "make":
        target, *arguments = words
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
        for argument in arguments:
            read_flags(f"python train_gpt2.py {argument.removeprefix('ARGS=')}")
        return
    if program.endswith("torchrun"):
        launcher = get_args_parser().parse_args(words)
        words = [launcher.training_script, *launcher.training_script_args]
    else:
        assert program == "python"
    script, *flags = words
    if "--" in flags:  # the base of ablate.py
        base = flags[flags.index("--") + 1:]
        read_flags(shlex.join(["python", "train_gpt2.py", *base]))
    main = main_of(script)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        main(flags)


PARSE_ARGS = argparse.ArgumentParser.parse_args


def parse_and_stop(*args, **kwargs):
    PARSE_ARGS(*args, **kwargs)
    raise Parsed


@pytest.mark.parametrize("command", [
    "python train_gpt2.py --n_layers 2", "torchrun --nproc_per_node=8 posttrain.py --replays 1",
    "python ablate.py -- --presets gpt2", "python tokenizer.py train --vocab 300",
    'make train ARGS="--max_step 1"'])
def test_a_flag_that_does_not_exist_is_found(command):
    with pytest.raises(cli.BadInput, match="unknown flag"):
        read_flags(command)


def test_each_entry_is_a_command_of_a_page():
    shown = {line for page in RUN_PAGES for line in commands(page)}
    assert set(COMMANDS) - shown == set()


# --------------------------------------------------------------------------------------------------
# Recipes

ENDS = {"&&", "||", ";", "|", "&", ">>", ">"}  # of a command in a line of shell


def commands_in(line: str) -> list[list[str]]:
    """The commands in a line of shell, as words."""
    found: list[list[str]] = [[]]
    for word in shlex.split(line.removeprefix("!").replace("; }", " ;")):
        if word in ENDS:
            found.append([])
        else:
            found[-1].append(word)
    return found


def test_recipes_have_flags_that_exist():
    read = []
    for _, block in blocks(RECIPES):
        for line in block.replace("\\\n", " ").splitlines():
            for words in commands_in(line):
                read += read_recipe(words)
    assert (read.count("train_gpt2.py"), read.count("fineweb.py")) == (8, 5)
    assert set(SERVICES) <= set(read)


def read_recipe(words: list[str]) -> list[str]:
    """Check the flags of a command -> [the script or the service], or []."""
    if words[:1] == ["srun"]:
        words = words[1:]
    program = Path(words[0]).name if words else ""
    if program in SERVICES:
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= SERVICES[program], words
        return [program]
    if program == "make":
        read_flags(shlex.join(words))
    scripts = [word for word in words if word in {f"{script}.py" for script in SCRIPTS}]
    if program in ("python", "torchrun") and scripts:
        read_flags(shlex.join([program, *words[1:]]))
        return scripts
    assert not scripts, f"how is this run? {words}"
    return []


@pytest.mark.parametrize("program", ["vastai", "runpodctl", "#SBATCH", "make", "torchrun"])
def test_a_flag_that_does_not_exist_is_found_in_a_recipe(program):
    words = {"make": ["train", "ARGS=--step 1"], "torchrun": ["train_gpt2.py", "--step", "1"]}
    with pytest.raises((AssertionError, cli.BadInput)):
        read_recipe([program, *words.get(program, ["create", "--step"])])


def test_recipes_are_shell_and_yaml():
    for language, block in blocks(RECIPES):
        if language == "yaml":
            task = yaml.safe_load(block)
            block = task["setup"] + task["run"]
        if language in ("bash", "yaml"):
            done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------
# Text


def test_flags_in_the_text_exist():
    known = set(OTHERS)
    for script in SCRIPTS:
        for words in ([], ["train"], ["compare"]) if script == "tokenizer" else ([],):
            known |= flags_of(script, words)
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for flag in re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", prose):
            assert flag in known, f"{page.name}: {flag}"


def flags_of(script: str, words: list[str]) -> set[str]:
    """The option strings of a script's parsers."""
    found = set()

    def note(self, *args, **kwargs):
        found.update(self._option_string_actions)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises((Parsed, cli.BadInput, SystemExit)):
        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        main_of(script)([*words, *(["--"] if script == "ablate" else [])])
    return found


def test_links_lead_somewhere():
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "lib" / "README.md",
             *(ROOT / "benchmarks").glob("**/*.md")]
    for page in pages:
        text = page.read_text()
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)", text, re.M)
        for link in links:
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_indexes_are_complete():
    scripts, modules, results = ((ROOT / folder / "README.md").read_text()
                                 for folder in ("", "lib", "benchmarks"))
    for script in SCRIPTS:
        assert f"| `{script}.py` |" in scripts
    there = {path.name for path in (ROOT / "lib").rglob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", modules)) == there
    for path in (ROOT / "benchmarks").glob("*.md"):
        assert path.name == "README.md" or f"({path.name}" in results, path.name
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert f"`{path.name}`" in results, path.name


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_python_code_names_what_exists():
    for page in PAGES:
        for language, block in blocks(page):
            if language != "python":
                continue
            assert page.name in PYTHON, f"let a test run the code of {page.name}, and say so here"
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, name.name) for name in node.names)
