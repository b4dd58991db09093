"""How far positions reach: bits per byte by position, at half, 1, 2 and 4 times the length a
checkpoint was trained with.

    python benchmarks/context.py --checkpoint log/learned/ckpt_<step>.pt log/rope/ckpt_<step>.pt --data DIR

The same validation tokens are cut into rows of each length; a column is where in its row a token
stands, in training lengths. Rows run across documents, as in training. Learned positions end with
the training length; rotary ones go on as they are (plain), NTK-aware or YaRN-scaled (lib/rope.py).
A text's later tokens are easier, if the model can use what came before them.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

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


@torch.no_grad()
def nats_by_position(model, x, y, device):
    """Tokens x and their targets y, int64 (rows, T) -> the loss of each target in nats, float64
    (rows, T)."""
    rows, at_once = [], max(8192 // x.shape[1], 1)
    for i in range(0, len(x), at_once):
        with autocast(device):
            logits = model(to_device(x[i:i + at_once], device))
        targets = to_device(y[i:i + at_once], device)
        rows.append(torch.cat([F.cross_entropy(row, target, reduction="none")[None]
                               for row, target in zip(logits, targets)]).cpu())
    return torch.cat(rows).double().numpy()


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", required=True)
    parser.add_argument("--data", help="folder of token shards; without it, the one trained on")
    parser.add_argument("--tokens", type=int, default=2**21, help="validation tokens, at most")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    columns = list(itertools.pairwise(EDGES))
    found = []  # what is wrong with any of them is told before the first line
    for path in args.checkpoint:
        model, tokenizer, state = load_checkpoint(path)
        trained, sizes, kind = model.config.block_size, tokenizer.token_bytes(), model.config.pos
        data, longest = state["train_config"]["data"], round(EDGES[-1] * trained)
        shards = Shards(args.data or split_weight(data if isinstance(data, str) else data[0])[0])
        if load_tokenizer(shards.tokenizer).spec != tokenizer.spec:
            raise BadInput(f"{shards.folder} holds tokens of another tokenizer than {path}'s, {tokenizer.name}: "
                           "name another --data")
        check_shards(shards, tokenizer)
        if (there := min(args.tokens, shards.tokens["val"] - 1)) < longest:
            raise BadInput(f"{path} is tried on rows of {longest:,} validation tokens, and --tokens and {shards.folder} leave "
                           f"{there:,}: raise --tokens, or name another --data")
        found.append(
            (path, trained, sizes, kind, read_validation(shards, args.tokens, longest, tokenizer)))
    print("| checkpoint | positions | context | "
          + " | ".join(f"{a:g} to {b:g}" for a, b in columns) + " | all |")
    print("|---|---|---:|" + "---:|" * (len(columns) + 1))
    for path, trained, sizes, kind, rows in found:
        scalings = ("plain", "ntk", "yarn") if kind == "rope" else ("plain",)
        for factor, scaling in [(0.5, "plain"), (1, "plain"), *itertools.product((2, 4), scalings)]:
            name = f"{kind}, {scaling}" if factor > 1 and kind == "rope" else kind
            start = f"| {Path(path).absolute().parent.name} | {name} | {factor:g}x{trained:,} "
            if factor > 1 and kind != "rope":
                print(start + "| n/a " * (len(columns) + 1) + "|", flush=True)
                continue
            length = round(factor * trained)
            model = extend(load_checkpoint(path, device)[0], ContextConfig(length, scaling))
            x, y = (part.reshape(-1, length) for part in rows)
            nats, n_bytes = nats_by_position(model, x, y, device), sizes[y]

            def bits(a, b):
                in_bits = nats[:, a:b].sum() / math.log(2)  # noqa: B023 (called here)
                return in_bits / np.maximum(n_bytes[:, a:b].sum(), 1)  # noqa: B023

            cells = [
                f"{bits(round(a * trained), round(b * trained)):.4f}" if b <= factor else ""
                for a, b in columns
            ]
            print(
                start + "".join(f"| {cell} " for cell in [*cells, f"{bits(0, length):.4f}"]) + "|",
                flush=True)


if __name__ == "__main__":
    run(main)
