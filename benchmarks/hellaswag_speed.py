"""HellaSwag on a checkpoint: the batches of hellaswag.py against build-nanogpt's loop over single
items, on the same model.

    python benchmarks/hellaswag_speed.py --checkpoint log/<run> --baseline ../build-nanogpt
        --file hellaswag_val.jsonl

The loop calls build-nanogpt's render_example and get_most_likely_row, imported from its files.
--limit shortens the loop only.
"""

import argparse
import ast
import contextlib
import functools
import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.devices import Processes, autocast
from lib.evals import hellaswag
from train_gpt2 import load_checkpoint


def baseline_functions(folder):
    """-> build-nanogpt's render_example and get_most_likely_row.

    Importing its train_gpt2.py would train, so the function is extracted.
    """
    spec = importlib.util.spec_from_file_location("baseline_hellaswag", folder / "hellaswag.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = ast.parse((folder / "train_gpt2.py").read_text())
    tree.body = [
        node for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "get_most_likely_row"
    ]
    names = {"torch": torch, "F": F}
    exec(compile(tree, "train_gpt2.py", "exec"), names)
    return module.render_example, names["get_most_likely_row"]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--baseline", type=Path, required=True, help="folder of build-nanogpt")
    parser.add_argument("--file", required=True, help="hellaswag_val.jsonl")
    parser.add_argument("--limit", type=int, help="items of the loop")
    parser.add_argument("--rounds", type=int, default=3, help="of ours")
    parser.add_argument("--fp32", action="store_true",
                        help="no autocast, so that rounding cannot change an answer")
    args = parser.parse_args()
    processes = Processes("auto")
    device = processes.device
    model, tokenizer, _ = load_checkpoint(args.checkpoint, device)
    items = hellaswag.load(args.file)
    precision = functools.partial(autocast, model)
    if args.fp32:
        precision = contextlib.nullcontext
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    print("| | items | seconds | items/s | acc_norm |\n|---|---:|---:|---:|---:|")
    for _ in range(args.rounds):
        started = time.perf_counter()
        questions = hellaswag.render(items, tokenizer)
        rendered = time.perf_counter()
        with precision():
            n, _, correct, _ = hellaswag.count_correct(model, questions, processes)
        seconds = time.perf_counter() - started
        print(f"| hellaswag.py, {rendered - started:.2f} s of it tokenization | {n} | "
              f"{seconds:.2f} | {n / seconds:.0f} | {correct} |", flush=True)

    render_example, get_most_likely_row = baseline_functions(args.baseline)
    n = args.limit or len(items)
    correct = 0
    started = time.perf_counter()
    with open(args.file) as file:
        for line in itertools.islice(file, n):
            _, tokens, mask, label = render_example(json.loads(line))
            with precision():
                logits = model(tokens.to(device))
            correct += get_most_likely_row(tokens.to(device), mask.to(device), logits) == label
    synchronize()
    seconds = time.perf_counter() - started
    with precision():
        _, _, ours, _ = hellaswag.count_correct(model, questions[:n], processes)
    print(f"| build-nanogpt's loop; on these items hellaswag.py has {ours} right | "
          f"{n} | {seconds:.2f} | {n / seconds:.0f} | {correct} |")


if __name__ == "__main__":
    main()
