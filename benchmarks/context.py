"""How far positions extend: bits per byte by position, at half, 1, 2 and 4 times the context length
of training.

    python benchmarks/context.py --checkpoint log/learned log/rope --data DIR

The same validation tokens are cut into rows of each length. A column is the position of a token in
its row, in training lengths. Rows run across documents, as in training. Learned positions end at
the training length; rotary ones continue as they are (plain), NTK-aware or YaRN-scaled
(lib/rope.py). Later tokens of a text are easier if the model can use the earlier ones.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.cli import BadInput, run
from lib.corpus import split_weight
from lib.devices import autocast, pick_device, to_device
from lib.rope import ContextConfig, extend
from lib.shards import Shards, check_shards, read_validation
from lib.tokenizers import load_tokenizer
from train_gpt2 import load_checkpoint

EDGES = (0, 1 / 4, 1 / 2, 1, 3 / 2, 2, 3, 4)  # of the columns, in training lengths
COLUMNS = list(itertools.pairwise(EDGES))
SCALINGS = {"rope": ("plain", "ntk", "yarn"), "learned": ("plain",)}
BATCH_TOKENS = 8192  # per forward pass


class Checkpoint(NamedTuple):
    path: str
    block_size: int  # of training
    pos: str
    token_bytes: np.ndarray  # (vocab_size,)
    rows: tuple  # inputs and targets, int64


def open_checkpoint(path, data, tokens):
    """-> Checkpoint. Raises BadInput if the data does not fit it."""
    model, tokenizer, state = load_checkpoint(path)
    block_size = model.config.block_size
    longest = round(EDGES[-1] * block_size)
    trained_on = state["train_config"]["data"]
    if not isinstance(trained_on, str):
        trained_on = trained_on[0]
    shards = Shards(data or split_weight(trained_on)[0])
    if load_tokenizer(shards.tokenizer).spec != tokenizer.spec:
        raise BadInput(f"{shards.folder} has tokens of another tokenizer than {path}'s, "
                       f"{tokenizer.name}: name another --data")
    check_shards(shards, tokenizer)
    available = min(tokens, shards.tokens["val"] - 1)
    if available < longest:
        raise BadInput(f"{path} needs rows of {longest:,} validation tokens, and --tokens and "
                       f"{shards.folder} leave {available:,}: raise --tokens, or name another "
                       "--data")
    rows = read_validation(shards, tokens, longest, tokenizer)
    return Checkpoint(path, block_size, model.config.pos, tokenizer.token_bytes(), rows)


@torch.no_grad()
def nats_by_position(model, x, y, device):
    """Tokens x and their targets y, int64 (rows, T) -> the loss of each target in nats, float64
    (rows, T)."""
    losses = []
    n = max(BATCH_TOKENS // x.shape[1], 1)
    for i in range(0, len(x), n):
        with autocast(model):
            logits = model(to_device(x[i:i + n], device))
        targets = to_device(y[i:i + n], device)
        for row, target in zip(logits, targets):  # one row at a time: fp32 copies are large
            losses.append(F.cross_entropy(row, target, reduction="none").cpu())
    return torch.stack(losses).double().numpy()


def bits_per_byte(nats, n_bytes):
    return nats.sum() / math.log(2) / np.maximum(n_bytes.sum(), 1)


def measure(checkpoint, factor, scaling, device):
    """-> cells of the table, for rows of `factor` times the training length."""
    trained = checkpoint.block_size
    length = round(factor * trained)
    model, *_ = load_checkpoint(checkpoint.path, device)
    extend(model, ContextConfig(length, scaling))
    x, y = (part.reshape(-1, length) for part in checkpoint.rows)
    nats = nats_by_position(model, x, y, device)
    n_bytes = checkpoint.token_bytes[y]
    cells = []
    for a, b in COLUMNS:
        if b > factor:
            cells.append("")
            continue
        columns = slice(round(a * trained), round(b * trained))
        cells.append(f"{bits_per_byte(nats[:, columns], n_bytes[:, columns]):.4f}")
    return [*cells, f"{bits_per_byte(nats, n_bytes):.4f}"]


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", required=True)
    parser.add_argument("--data", help="folder of token shards; default: the training data")
    parser.add_argument("--tokens", type=int, default=2**21, help="validation tokens, at most")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    # all are opened, and checked, before the first line of the table
    checkpoints = [open_checkpoint(path, args.data, args.tokens) for path in args.checkpoint]
    ranges = [f"{a:g} to {b:g}" for a, b in COLUMNS]
    print(f"| checkpoint | positions | context | {' | '.join(ranges)} | all |")
    print("|---|---|---:|" + "---:|" * (len(COLUMNS) + 1))
    for checkpoint in checkpoints:
        run_name = Path(checkpoint.path).absolute().parent.name
        longer = itertools.product((2, 4), SCALINGS[checkpoint.pos])
        for factor, scaling in [(0.5, "plain"), (1, "plain"), *longer]:
            positions = checkpoint.pos
            if factor > 1 and positions == "rope":
                positions = f"rope, {scaling}"
            if factor > 1 and checkpoint.pos == "learned":
                cells = ["n/a"] * (len(COLUMNS) + 1)
            else:
                cells = measure(checkpoint, factor, scaling, device)
            context = f"{factor:g}x{checkpoint.block_size:,}"
            print(f"| {run_name} | {positions} | {context} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run(main)
