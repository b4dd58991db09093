"""The scripts that race.py measures us by: patched in length, data and evaluation alone, and timed
by one clock.

A folder holds their sources, as many as are to race:
    build_nanogpt.py       train_gpt2.py of karpathy/build-nanogpt
    train_gpt_simple.py    records/track_3_optimization/train_gpt_simple.py of KellerJordan/modded-nanogpt
    autoresearch/          train.py and prepare.py of karpathy/autoresearch, branch exp/H100/mar8; tokenizer/: what its
                           prepare.py makes of the training files (8,192 ids; needs rustbpe, so before the race)
"""

import math
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np

VAL_TOKENS = 1_310_720  # losses per GPT-2 token are those of the first so many of the val split

# A patch: file, what stands in it exactly once, what takes its place. @NAME@ is filled in from
# SETTINGS.
SETTINGS = {"build_nanogpt": dict(STEPS=400, WARMUP=40, EVERY=50),
            "train_gpt_simple": dict(STEPS=200, EVERY=25),
            "autoresearch": dict(SECONDS=300, EVERY=200)}
CLOCK = "from race_contestants import Clock, bits_per_byte\nCLOCK = Clock()\n"
BPB = "bits_per_byte(model, tokenizer, f'{DATA_DIR}/{VAL_FILENAME}', DEVICE_BATCH_SIZE, MAX_SEQ_LEN)"
BUILD, SIMPLE, TRAIN, PREPARE = "build_nanogpt.py", "train_gpt_simple.py", "train.py", "prepare.py"
PATCHES = {
    "build_nanogpt": (
        # length; one validation more, after the last update
        (BUILD, "warmup_steps = 715\n", "warmup_steps = @WARMUP@\n"),
        (BUILD, "max_steps = 19073 #", "max_steps = @STEPS@ #"),
        (BUILD, "for step in range(max_steps):", "for step in range(max_steps + 1):"),
        (BUILD, "last_step = (step == max_steps - 1)", "last_step = (step == max_steps)"),
        (BUILD, "    # do one step of the optimization\n",
         "    if last_step:\n        break\n    CLOCK.start()\n"),
        (BUILD, "    t1 = time.time()\n", "    CLOCK.stop()\n    t1 = time.time()\n"),
        # compiled, its fastest; that turns off HellaSwag and samples
        (BUILD, "use_compile = False", "use_compile = True"),
        # evaluation: more often (its 20 batches of 64 x 1024 are VAL_TOKENS); nothing to download,
        # no checkpoint
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
        # nothing to download: attention by SDPA, over the whole row in every layer, for
        # FlashAttention 3 with windows
        (TRAIN, "from kernels import get_kernel\n", CLOCK),
        (TRAIN, "cap = torch.cuda.get_device_capability()\n", ""),
        (TRAIN,
         'repo = "varunneal/flash-attention-3" if cap == (9, 0) else "kernels-community/flash-attn3"\n',
         ""),
        (TRAIN, "fa3 = get_kernel(repo).flash_attn_interface\n", ""),
        (TRAIN, "y = fa3.flash_attn_func(q, k, v, causal=True, window_size=window_size)",
         "y = F.scaled_dot_product_attention(*(z.type_as(v).transpose(1, 2) for z in (q, k, v)), is_causal=True)"
         ".transpose(1, 2)"),
        (PREPARE, "import rustbpe\n", ""),
        (PREPARE, "import requests\n", ""),
        # length: its budget leaves out the step that compiles, not eleven
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
        # evaluation: every byte of the val file once, along the way and at the end
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
    files = {}
    for file, old, new in PATCHES[name]:
        path = Path(sources, name if name == "autoresearch" else "", file)
        code = files.setdefault(file, path.read_text())
        if code.count(old) != 1:
            sys.exit(
                f"{path} is not the file this was written for: {old!r} stands in it {code.count(old)} times"
            )
        files[file] = code.replace(
            old, re.sub("@([A-Z]+)@", lambda match: str(SETTINGS[name][match[1]]), new))
    for file, code in files.items():
        compile(code, file, "exec")
        (folder / file).write_text(code)
    env = {"PYTHONPATH": str(Path(__file__).resolve().parent)}
    if name == "train_gpt_simple":  # it is one of several processes, always
        with socket.socket() as free:
            free.bind(("", 0))
            env |= {
                "MASTER_PORT": str(free.getsockname()[1]), "MASTER_ADDR": "127.0.0.1",
                "WORLD_SIZE": "1"
            }
        env |= {"RANK": "0", "LOCAL_RANK": "0"}
    return [sys.executable, PATCHES[name][0][0]], env


def lay_out(name, sources, folder, data, parquet):
    """Put the data where a contestant looks for it: GPT-2 shards in `data`, train-0000[0-8] and val
    in `parquet`."""
    if name == "build_nanogpt":
        (folder / "edu_fineweb10B").symlink_to(data.resolve())
    elif name == "train_gpt_simple":
        (folder / "data/fineweb10B").mkdir(parents=True)
        for path in data.glob("*.npy"):
            tokens, header = np.load(path), np.zeros(256, dtype=np.int32)
            header[:3] = 20240520, 1, len(tokens)
            split = "val" if "_val_" in path.name else "train"
            with open(folder / f"data/fineweb10B/fineweb_{split}_{path.stem[-6:]}.bin",
                      "wb") as file:
                file.write(header.tobytes() + tokens.tobytes())
    else:
        (folder / "cache/data").mkdir(parents=True)
        shutil.copytree(Path(sources, name, "tokenizer"), folder / "cache/tokenizer")
        for i, path in enumerate(sorted(parquet.glob("train-0000[0-8].parquet"))):
            (folder / f"cache/data/shard_{i:05d}.parquet").symlink_to(path.resolve())
        (folder / "cache/data/shard_06542.parquet").symlink_to(
            parquet.resolve() / "val.parquet")  # its validation file


class Clock:
    """In a contestant: device, parameters, the seconds of each step and the val losses, a line each
    in clock.txt."""

    def __init__(self):
        import torch

        gpu = torch.cuda.is_available()
        self.wait = torch.cuda.synchronize if gpu else lambda: None
        self.file = open("clock.txt", "w", buffering=1)  # noqa: SIM115 (open as long as the run)
        self.write("device",
                   f"{torch.cuda.get_device_name() if gpu else 'cpu'}, torch {torch.__version__}")

    def write(self, *words):
        print(*words, file=self.file)

    def parameters(self, model):
        self.write("parameters", sum(p.numel() for p in model.parameters()))

    def start(self):
        self.wait()
        self.began = time.perf_counter()

    def stop(self):
        self.wait()
        self.write("step", time.perf_counter() - self.began)

    def val(self, step, loss):
        """After `step` updates."""
        self.write("val", step, float(loss))


def bits_per_byte(model, tokenizer, parquet, rows, T):
    """autoresearch's model on all documents of a parquet file, in batches (rows, T) -> bits per
    byte.

    Its own evaluation goes through the file several times and drops what its packing cuts off. Here
    every byte counts once: the documents end to end, cut into rows; each row follows a
    begin-of-text token, as in its training.
    """
    import pyarrow.parquet as pq
    import torch

    texts, bos = pq.read_table(parquet,
                               columns=["text"])["text"].to_pylist(), tokenizer.get_bos_token_id()
    ids = np.concatenate([np.asarray(ids) for ids in tokenizer.encode(texts, prepend=bos)])
    y = np.full((-(-len(ids) // (rows * T)) * rows, T), bos)  # whole batches: one shape to compile
    y.flat[:len(ids)] = ids
    x = np.concatenate((np.full((len(y), 1), bos), y[:, :-1]), axis=1)
    y[y == bos] = -1  # not counted, as in its own evaluation
    device, nats = next(model.parameters()).device, 0.0
    with torch.no_grad():
        for i in range(0, len(y), rows):
            inputs, targets = (torch.from_numpy(part[i:i + rows]).to(device) for part in (x, y))
            nats += model(inputs, targets, reduction="none").double().sum().item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)
