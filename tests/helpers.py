"""What several test files build their cases from: a tiny model, its data, its checkpoint."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from lib import checkpoint
from train_gpt2 import GPT, GPTConfig, TrainConfig

ROOT = Path(__file__).parent.parent
TINY_FLAGS = ["--preset", "gpt2", "--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "32",
              "--total_batch_size", "256", "--max_steps", "6", "--warmup_steps", "2", "--max_lr", "5e-3",
              "--val_tokens", "330", "--eval_every", "4", "--hellaswag_every", "0", "--sample_every", "0", "--device", "cpu"]


def tiny(**changes):
    """A GPTConfig that runs in milliseconds; 61 ids padded to 64."""
    return GPTConfig(**dict(block_size=16, n_layer=2, n_head=2, n_embd=32, vocab_size=61, vocab_multiple=64) | changes)


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
        ids = [token for text in sentences(60, seed) for token in (tokenizer.eot, *tokenizer.encode(text).tolist())]
        np.save(folder / f"toy_{split}_{index:06d}.npy", np.array(ids, dtype=np.uint16))
    (folder / "tokenizer.json").write_text(tokenizer.spec)
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "tokenizer.json", "vocab_size": tokenizer.vocab_size}))
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
    config = tiny(**dict(vocab_size=tokenizer.vocab_size, vocab_multiple=128, block_size=32) | changes)
    model = GPT(config).eval()
    checkpoint.write(path, {"step": 1, "model": model.state_dict(), "model_config": asdict(config),
                                      "train_config": asdict(TrainConfig()), "tokenizer": tokenizer.spec})
    return model


def read_log(folder):
    """log.txt -> {(step, kind): value}."""
    lines = [line.split() for line in (folder / "log.txt").read_text().splitlines()]
    assert all(len(line) == 3 and line[1] in ("train", "val", "hella") for line in lines)
    return {(int(step), kind): float(value) for step, kind, value in lines}


def write_bin(path, ids, magic, version, count=None):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(ids.tobytes())


def reference(model, context, continuation):
    """Log-likelihood token by token, each piece of the window's length with as much before it as fits."""
    ids, total, window = context + continuation, 0.0, model.config.block_size
    for i in range(len(context), len(ids)):
        piece = (i - len(context)) // window
        end = min(len(context) + (piece + 1) * window, len(ids))
        start = max(end - 1 - window, 0)
        with torch.no_grad():
            total += model(torch.tensor([ids[start:i]]))[0, -1].log_softmax(dim=-1)[ids[i]].item()
    return total
