"""The scripts that compete in race.py: patched only in length, data and evaluation, and timed by
one clock.

A folder contains the sources of those that run:
    build_nanogpt.py       train_gpt2.py of karpathy/build-nanogpt
    train_gpt_simple.py    records/track_3_optimization/train_gpt_simple.py of
                           KellerJordan/modded-nanogpt
    autoresearch/          train.py and prepare.py of karpathy/autoresearch, branch exp/H100/mar8,
                           and tokenizer/, made by its prepare.py from the training files
                           (8,192 ids; needs rustbpe, so before the race)
"""

import math
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np

VAL_TOKENS = 1_310_720  # losses per GPT-2 token are over the first VAL_TOKENS of the val split

# @NAME@ in a patch is replaced by the setting.
SETTINGS = {
    "build_nanogpt": dict(STEPS=400, WARMUP=40, EVERY=50),
    "train_gpt_simple": dict(STEPS=200, EVERY=25),
    "autoresearch": dict(SECONDS=300, EVERY=200),
}
CLOCK = "from race_contestants import Clock, bits_per_byte\nCLOCK = Clock()\n"
BPB = ("bits_per_byte(model, tokenizer, f'{DATA_DIR}/{VAL_FILENAME}', DEVICE_BATCH_SIZE, "
       "MAX_SEQ_LEN)")
BUILD = "build_nanogpt.py"
SIMPLE = "train_gpt_simple.py"
TRAIN = "train.py"
PREPARE = "prepare.py"
PATCHES = {  # of a contestant: (file, text that it has exactly once, its replacement)
    "build_nanogpt": (
        # length; one more validation, after the last step
        (BUILD, "warmup_steps = 715\n", "warmup_steps = @WARMUP@\n"),
        (BUILD, "max_steps = 19073 #", "max_steps = @STEPS@ #"),
        (BUILD, "for step in range(max_steps):", "for step in range(max_steps + 1):"),
        (BUILD, "last_step = (step == max_steps - 1)", "last_step = (step == max_steps)"),
        (BUILD, "    # do one step of the optimization\n",
         "    if last_step:\n        break\n    CLOCK.start()\n"),
        (BUILD, "    t1 = time.time()\n", "    CLOCK.stop()\n    t1 = time.time()\n"),
        # compiled, which is fastest, and turns off HellaSwag and samples
        (BUILD, "use_compile = False", "use_compile = True"),
        # evaluation: more often (its 20 batches of 64 x 1024 are VAL_TOKENS); no downloads, no
        # checkpoints
        (BUILD, "    if step % 250 == 0 or last_step:", "    if step % @EVERY@ == 0 or last_step:"),
        (BUILD, '            print(f"validation loss: ',
         '            CLOCK.val(step, val_loss_accum)\n            print(f"validation loss: '),
        (BUILD, "from hellaswag import render_example, iterate_examples\n", CLOCK),
        (BUILD, 'enc = tiktoken.get_encoding("gpt2")\n', ""),
        (BUILD, "(step % 5000 == 0 or last_step)", "False"),
        (BUILD, "model.to(device)\n", "model.to(device)\nCLOCK.parameters(model)\n"),
    ),
    "train_gpt_simple": (
        # length
        (SIMPLE, "train_steps = 3250\n", "train_steps = @STEPS@\n"),
        (SIMPLE, "        # --------------- TRAINING SECTION -----------------\n",
         "        CLOCK.start()\n"),
        (SIMPLE, "        model.zero_grad(set_to_none=True)\n",
         "        model.zero_grad(set_to_none=True)\n        CLOCK.stop()\n"),
        # data: from the start again when the files end
        (SIMPLE, "file_iter = iter(files)", 'file_iter = __import__("itertools").cycle(files)'),
        # evaluation: VAL_TOKENS, more often
        (SIMPLE, "val_tokens = 20 * 524288\n", f"val_tokens = {VAL_TOKENS}\n"),
        (SIMPLE, "val_step_freq = 125 if step / train_steps < 0.9 else 25",
         "val_step_freq = @EVERY@"),
        (SIMPLE, "            val_loss /= val_tokens\n",
         "            val_loss /= val_tokens\n            CLOCK.val(step, val_loss)\n"),
        (SIMPLE, "import uuid\n", "import uuid\n" + CLOCK),
        (SIMPLE, "model.compile(dynamic=False)\n",
         "model.compile(dynamic=False)\nCLOCK.parameters(model)\n"),
    ),
    "autoresearch": (
        # no downloads: SDPA over the whole row in every layer instead of FlashAttention 3 with
        # windows
        (TRAIN, "from kernels import get_kernel\n", CLOCK),
        (TRAIN, "cap = torch.cuda.get_device_capability()\n", ""),
        (TRAIN, 'repo = "varunneal/flash-attention-3" if cap == (9, 0) else '
                '"kernels-community/flash-attn3"\n', ""),
        (TRAIN, "fa3 = get_kernel(repo).flash_attn_interface\n", ""),
        (TRAIN, "y = fa3.flash_attn_func(q, k, v, causal=True, window_size=window_size)",
         "y = F.scaled_dot_product_attention(*(z.type_as(v).transpose(1, 2) for z in (q, k, v)), "
         "is_causal=True).transpose(1, 2)"),
        (PREPARE, "import rustbpe\n", ""),
        (PREPARE, "import requests\n", ""),
        # length: its budget leaves out only the step that compiles, not eleven
        (PREPARE, "TIME_BUDGET = 300 ", "TIME_BUDGET = @SECONDS@ "),
        (TRAIN, "    if step > 10:\n", "    if step > 0:\n"),
        (TRAIN, "    if step > 10 and total", "    if step > 0 and total"),
        (TRAIN, "    torch.cuda.synchronize()\n    t0 = time.time()\n",
         "    CLOCK.start()\n    t0 = time.time()\n"),
        (TRAIN, "    torch.cuda.synchronize()\n    t1 = time.time()\n",
         "    CLOCK.stop()\n    t1 = time.time()\n"),
        # data: our files under its names
        (PREPARE, 'CACHE_DIR = os.path.join(os.path.expanduser("~"), ".cache", "autoresearch")',
         'CACHE_DIR = "cache"'),
        # evaluation: every byte of the val file once, during training and at the end
        (TRAIN, "from prepare import MAX_SEQ_LEN,",
         "from prepare import DATA_DIR, VAL_FILENAME, MAX_SEQ_LEN,"),
        (TRAIN, "    step += 1\n",
         "    step += 1\n    if step % @EVERY@ == 0:\n        with autocast_ctx:\n"
         f"            CLOCK.val(step, {BPB})\n"),
        (TRAIN, "    val_bpb = evaluate_bpb(model, tokenizer, DEVICE_BATCH_SIZE)\n",
         f"    val_bpb = {BPB}\n    CLOCK.val(step, val_bpb)\n"),
        (TRAIN, "model = torch.compile(model, dynamic=False)\n",
         "CLOCK.parameters(model)\nmodel = torch.compile(model, dynamic=False)\n"),
    ),
}


def patch(name, sources, folder):
    """Write a contestant's patched files to `folder` -> (command to run there, its environment)."""
    def setting(match):
        return str(SETTINGS[name][match[1]])

    files = {}
    subfolder = name if name == "autoresearch" else ""
    for file, old, new in PATCHES[name]:
        path = Path(sources, subfolder, file)
        code = files.setdefault(file, path.read_text())
        if code.count(old) != 1:
            sys.exit(f"{path} is another version: it has {old!r} {code.count(old)} times")
        files[file] = code.replace(old, re.sub("@([A-Z]+)@", setting, new))
    for file, code in files.items():
        compile(code, file, "exec")
        (folder / file).write_text(code)
    env = {"PYTHONPATH": str(Path(__file__).resolve().parent)}
    if name == "train_gpt_simple":  # always expects to be launched as one of several processes
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1",
                "RANK": "0", "LOCAL_RANK": "0"}
    return [sys.executable, PATCHES[name][0][0]], env


def lay_out(name, sources, folder, data, parquet):
    """Put the data where a contestant expects it. data: folder of GPT-2 shards. parquet: folder of
    train-0000[0-8] and val."""
    if name == "build_nanogpt":
        (folder / "edu_fineweb10B").symlink_to(data.resolve())
    elif name == "train_gpt_simple":
        shards = folder / "data/fineweb10B"
        shards.mkdir(parents=True)
        for path in data.glob("*.npy"):
            tokens = np.load(path)
            header = np.zeros(256, dtype=np.int32)
            header[:3] = 20240520, 1, len(tokens)  # magic, version, tokens
            split = "val" if "_val_" in path.name else "train"
            binary = shards / f"fineweb_{split}_{path.stem[-6:]}.bin"
            binary.write_bytes(header.tobytes() + tokens.tobytes())
    else:
        (folder / "cache/data").mkdir(parents=True)
        shutil.copytree(Path(sources, name, "tokenizer"), folder / "cache/tokenizer")
        for i, path in enumerate(sorted(parquet.glob("train-0000[0-8].parquet"))):
            (folder / f"cache/data/shard_{i:05d}.parquet").symlink_to(path.resolve())
        its_val_file = folder / "cache/data/shard_06542.parquet"
        its_val_file.symlink_to(parquet.resolve() / "val.parquet")


class Clock:
    """Runs inside a contestant. Writes device, parameters, the seconds of each step and the val
    losses to clock.txt, one per line."""

    def __init__(self):
        import torch

        on_cuda = torch.cuda.is_available()
        self.wait = torch.cuda.synchronize if on_cuda else lambda: None
        self.file = open("clock.txt", "w", buffering=1)  # noqa: SIM115 (open as long as the run)
        device = torch.cuda.get_device_name() if on_cuda else "cpu"
        self.write("device", f"{device}, torch {torch.__version__}")

    def write(self, *words):
        print(*words, file=self.file)

    def parameters(self, model):
        self.write("parameters", sum(p.numel() for p in model.parameters()))

    def start(self):
        self.wait()
        self.started = time.perf_counter()

    def stop(self):
        self.wait()
        self.write("step", time.perf_counter() - self.started)

    def val(self, step, loss):
        """The loss after `step` steps."""
        self.write("val", step, float(loss))


def bits_per_byte(model, tokenizer, parquet, rows, T):
    """Bits per byte of autoresearch's model on all documents of a parquet file, in batches
    (rows, T).

    Its own evaluation reads the file several times and drops what its packing cuts off. Here every
    byte counts once: documents are concatenated and cut into rows, each after a begin-of-text
    token, as in its training.
    """
    import pyarrow.parquet as pq
    import torch

    texts = pq.read_table(parquet, columns=["text"])["text"].to_pylist()
    bos = tokenizer.get_bos_token_id()
    ids = np.concatenate([np.asarray(ids) for ids in tokenizer.encode(texts, prepend=bos)])
    n_batches = -(-len(ids) // (rows * T))
    y = np.full((n_batches * rows, T), bos)  # full batches: one shape to compile
    y.flat[:len(ids)] = ids
    x = np.concatenate((np.full((len(y), 1), bos), y[:, :-1]), axis=1)
    y[y == bos] = -1  # not counted, as in its own evaluation
    device = next(model.parameters()).device
    nats = 0.0
    with torch.no_grad():
        for i in range(0, len(y), rows):
            inputs = torch.from_numpy(x[i:i + rows]).to(device)
            targets = torch.from_numpy(y[i:i + rows]).to(device)
            nats += model(inputs, targets, reduction="none").double().sum().item()
    n_bytes = sum(len(text.encode()) for text in texts)
    return nats / math.log(2) / n_bytes
