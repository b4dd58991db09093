r"""Training speed of several configurations side by side, against build-nanogpt's own script.

    python benchmarks/throughput.py --row "--preset gpt2" --row "--preset modern" \
        --baseline ../build-nanogpt/train_gpt2.py

A row is a set of flags of train_gpt2.py, run as the real script on random tokens without
evaluation: --warmup steps, then --steps that are measured. Results are medians over the steps of a
run, then over --rounds. Rounds are interleaved, so that a GPU that slows down as it warms up
affects all rows alike. The baseline is the given script with its constants replaced for the same
batch and model, compiled unless --no-compile, with training steps only. --profile instead shows
where the time of one step goes, by kernel.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2
from lib.devices import peak_flops, pick_device
from lib.logger import read_scalars

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(r"step +\d+ \| loss.*?([\d.]+) ?ms \|")
PEAK = re.compile(r"^peak ([\d.]+) GB", re.M)
GROUPS = {  # kernels by a part of their names; the first match counts
    "attention": r"fmha|flash|attention|sdpa|cudnn::fusion",
    "matmul": r"gemm|nvjet|cutlass|matmul|addmm|\bmm\b|xmma",
    "loss": r"softmax|nll_loss|cross_entropy|gather|scatter",
    "bias gradients": r"triton_red\w*_sum",
    "norm": r"norm",
    "activation": r"gelu|silu|tanh|relu",
    "optimizer": r"adam|foreach|multi_tensor",
    "copies and fills": r"stack|copy|memcpy|memset|fill|zero|cat",
    "other": r"",
}


def random_shards(folder, vocab_size=50257, tokens=4_000_000):
    """Write shards that both scripts read: their content does not change the speed."""
    folder.mkdir(parents=True)
    for split, index, n in (("val", 0, 200_000), ("train", 1, tokens)):
        rng = np.random.default_rng(index)
        ids = rng.integers(0, vocab_size, n, dtype=np.uint16)
        np.save(folder / f"edufineweb_{split}_{index:06d}.npy", ids)


@contextlib.contextmanager
def sigterm_delayed():
    """Handle a SIGTERM that comes inside `with` at its end."""
    received = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
    if received:
        signal.raise_signal(signal.SIGTERM)


def run(command, cwd, env=None):
    """-> (console output, seconds to the first step)."""
    console = []
    first = None
    process = None
    started = time.perf_counter()
    with open(cwd / "stderr", "w+") as errors:
        try:
            with sigterm_delayed():  # an exception inside Popen would lose a started process
                process = subprocess.Popen(command, cwd=cwd, env=os.environ | (env or {}),
                                           text=True, stdout=subprocess.PIPE, stderr=errors,
                                           start_new_session=True)
            for line in process.stdout:
                console.append(line)
                if first is None and STEP.match(line):
                    first = time.perf_counter() - started
            if process.wait():
                errors.seek(0)
                output = f"{''.join(console)[-1000:]}\n{errors.read()[-3000:]}"
                sys.exit(f"{shlex.join(map(str, command))} failed:\n{output}")
        finally:  # however this script ends, nothing may keep using the GPU
            if process:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "".join(console), first


def settings(flags, steps, args):
    """Flags of train_gpt2.py for `steps` training steps and nothing else, then those of the row."""
    return [
        "--data=edu_fineweb10B", f"--max_steps={steps}", "--warmup_steps=1", "--eval_every=0",
        "--hellaswag_every=0", "--sample_every=0", "--save_every=0", "--save_minutes=0",
        "--spike=0", f"--block_size={args.T}", f"--micro_batch={args.B}",
        f"--total_batch_size={args.total}", "--batch_warmup=0", *shlex.split(flags),
    ]


def ours(flags, folder, args):
    """-> the results of a run, from TensorBoard: ms, data (ms per step spent waiting for it), rate,
    mfu, peak, first."""
    steps = args.warmup + args.steps
    launcher = [sys.executable]
    if args.gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"]
    command = [*launcher, ROOT / "train_gpt2.py", *settings(flags, steps, args),
               f"--log_dir={folder / 'runs'}"]
    _, first = run(command, folder, {"PYTHONUNBUFFERED": "1"})
    (log,) = (folder / "runs").iterdir()  # build-nanogpt's script writes to log/
    scalars = read_scalars(log)
    shutil.rmtree(log)  # each has a checkpoint of 1.5 GB
    assert len(scalars["perf/step_ms"]) == steps, f"{len(scalars['perf/step_ms'])} of {steps} steps"

    def median(tag):
        if tag not in scalars:
            return None
        return statistics.median(list(scalars[tag].values())[args.warmup:])

    memory = scalars.get("perf/memory_gb", {})
    return {
        "ms": median("perf/step_ms"),
        "data": median("perf/data_ms"),
        "rate": median("perf/tok_per_sec"),
        "mfu": median("perf/mfu"),
        "peak": max(memory.values(), default=None),
        "first": first,
    }


def patch_baseline(script, args):
    """The source of build-nanogpt's script with other constants."""
    code = script.read_text()
    shape = f"n_layer={args.n_layer}, n_head={args.n_head}, n_embd={args.n_embd}"
    replacements = {
        "total_batch_size = 524288": f"total_batch_size = {args.total}",
        "B = 64": f"B = {args.B}",
        "T = 1024 #": f"T = {args.T} #",
        "use_compile = False": f"use_compile = {args.compile}",
        "max_steps = 19073": f"max_steps = {args.warmup + args.steps}",
        "warmup_steps = 715": "warmup_steps = 1",
        "GPTConfig(vocab_size=50304)": f"GPTConfig(vocab_size=50304, {shape})",
        "if step % 250 == 0 or last_step:": "if False:",
        "if (step % 250 == 0 or last_step)": "if False",
        "if ((step > 0 and step % 250 == 0) or last_step)": "if False",
    }
    for old, new in replacements.items():
        count = code.count(old)
        assert count == 1, f"{script} is another version: it has {old!r} {count} times"
        code = code.replace(old, new)
    if args.fp32:
        code = code.replace("dtype=torch.bfloat16)", "enabled=False)")
    return code + (
        "\nif device_type == 'cuda':\n"
        "    print(f'peak {torch.cuda.max_memory_allocated() / 1e9} GB')\n")


def baseline(script, folder, args):
    """The same figures of build-nanogpt's script, without data; MFU by our formula."""
    (folder / "baseline.py").write_text(patch_baseline(script, args))
    console, first = run([sys.executable, "-u", "baseline.py"], folder,
                         {"PYTHONPATH": str(script.parent)})
    steps = [float(ms) for ms in STEP.findall(console)]
    assert len(steps) == args.warmup + args.steps, f"{len(steps)} steps in\n{console[-2000:]}"
    ms = statistics.median(steps[args.warmup:])
    rate = args.total / ms * 1e3
    peak = PEAK.search(console)
    flops = peak_flops(pick_device("auto"))
    config = train_gpt2.GPTConfig(block_size=args.T, n_layer=args.n_layer, n_head=args.n_head,
                                  n_embd=args.n_embd)
    with torch.device("meta"):
        model = train_gpt2.GPT(config)
    return {
        "ms": ms,
        "data": None,
        "rate": rate,
        "mfu": rate * model.flops_per_token() / flops if flops else None,
        "peak": float(peak[1]) if peak else None,
        "first": first,
    }


def profile(flags, folder, args):
    """One step -> (its milliseconds, {group of kernels: (milliseconds, calls)}, the slowest kernels
    as (name, milliseconds, calls))."""
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch.profiler import ProfilerActivity, profile
import train_gpt2
from lib.run_folder import RunFolder
cuda = torch.cuda.is_available()
steps, prof = [], profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
# the first and the last call of a step
get_batch, log_step = train_gpt2.ShardLoader.next, RunFolder.log_step
def begin(stream, n):
    steps.append(n)
    if len(steps) == {args.warmup} + 1:
        prof.start()
    return get_batch(stream, n)
def end(run, step, scalars, seconds):
    if step == {args.warmup}:
        torch.cuda.synchronize() if cuda else None
        prof.stop()
        time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
        kernels = [(e.key, getattr(e, time_of) / 1e3, e.count) for e in prof.key_averages()]
        print("PROFILE" + json.dumps([seconds * 1e3, kernels]))
    log_step(run, step, scalars, seconds)
train_gpt2.ShardLoader.next, RunFolder.log_step = begin, end
train_gpt2.main(sys.argv[1:])
"""
    console, _ = run([sys.executable, "-c", code, *settings(flags, args.warmup + 2, args)], folder)
    wall, kernels = json.loads(re.search("^PROFILE(.*)$", console, re.M)[1])
    kernels.sort(key=lambda kernel: -kernel[1])
    groups = dict.fromkeys(GROUPS, (0.0, 0))
    for name, ms, calls in kernels:
        group = next(group for group, words in GROUPS.items() if re.search(words, name, re.I))
        total_ms, total_calls = groups[group]
        groups[group] = (total_ms + ms, total_calls + calls)
    return wall, groups, kernels[:args.kernels]


def print_profile(row, folder, args):
    wall, groups, kernels = profile(row, folder, args)
    total = sum(ms for ms, _ in groups.values())
    print(f"\n`{row}`: {total:.1f} ms of kernels in a step of {wall:.1f} ms\n\n"
          "| kernels | ms | calls |\n|---|---:|---:|")
    for group, (ms, calls) in groups.items():
        print(f"| {group} | {ms:.1f} | {calls} |")
    for name, ms, count in kernels:
        print(f"    {ms:9.2f} ms {count:6} x {name[:120]}")


def median_of(runs, key, form):
    """The median of a figure as text; n/a if a run lacks it."""
    values = [figures[key] for figures in runs]
    if None in values:
        return "n/a"
    return form.format(statistics.median(values))


def print_table(results, rounds):
    rates = {}
    for row, runs in results.items():
        rates[row] = statistics.median(figures["rate"] for figures in runs)
    first = next(iter(rates))
    print(f"\n| medians of {rounds} rounds | ms per step (all) | of them waiting for data | "
          f"tok/s | MFU | against {first} | peak GB | seconds to the first step |\n"
          "|---|---|---:|---:|---:|---:|---:|---|")
    for row, runs in results.items():
        all_ms = ", ".join(f"{figures['ms']:.1f}" for figures in runs)
        starts = ", ".join(f"{figures['first']:.0f}" for figures in runs)
        print(f"| `{row}` | {median_of(runs, 'ms', '{:.1f}')} ({all_ms}) | "
              f"{median_of(runs, 'data', '{:.2f}')} | {rates[row]:,.0f} | "
              f"{median_of(runs, 'mfu', '{:.1%}')} | {rates[row] / rates[first]:.3f} | "
              f"{median_of(runs, 'peak', '{:.1f}')} | {starts} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", default=[],
                        help="flags of train_gpt2.py; may be given several times")
    parser.add_argument("--baseline", type=Path, help="build-nanogpt's train_gpt2.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3,
                        help="steps before them; the first one compiles")
    parser.add_argument("-B", type=int, default=64, help="sequences per forward pass")
    parser.add_argument("-T", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--total", type=int, default=524_288, help="tokens per step")
    parser.add_argument("--gpus", type=int, default=1,
                        help="for our rows, with torchrun; tok/s is their total")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="of the baseline")
    parser.add_argument("--fp32", action="store_true",
                        help="run the baseline without autocast, as ours does on a CPU")
    for name, size in (("n_layer", 12), ("n_head", 12), ("n_embd", 768)):
        parser.add_argument(f"--{name}", type=int, default=size, help="of the baseline")
    parser.add_argument("--profile", action="store_true", help="instead of timing")
    parser.add_argument("--kernels", type=int, default=25, help="kernels to list with --profile")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        random_shards(folder / "edu_fineweb10B")
        if args.profile:
            for row in args.row:
                print_profile(row, folder, args)
            return
        measures = {}
        if args.baseline:
            measures["build-nanogpt"] = partial(baseline, args.baseline.resolve(), folder, args)
        for row in args.row:
            measures[row] = partial(ours, row, folder, args)
        results = {row: [] for row in measures}
        for _ in range(args.rounds):
            for row, measure in measures.items():
                results[row].append(measure())
                print(f"{row}: {results[row][-1]}", file=sys.stderr, flush=True)
    print_table(results, args.rounds)


if __name__ == "__main__":
    main()
