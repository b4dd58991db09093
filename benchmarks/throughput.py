"""Training speed of several configurations side by side, against build-nanogpt's own script.

    python benchmarks/throughput.py --row "--preset gpt2" --row "--preset modern" --baseline ../build-nanogpt/train_gpt2.py

A row is a set of flags of train_gpt2.py. A run of it is the real script on random tokens, without
evaluation: --warmup steps, then --steps that count; its figures are their medians, a row's figures
the medians over --rounds. Rounds are interleaved, so that a card that slows down as it warms hurts
all rows alike. The baseline is the script given, with its constants replaced for the same batch and
model, compiled unless --no-compile, and nothing but training steps. With --profile, where the time
of one step goes, by kernel.
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
GROUPS = {  # kernels by a part of their names, the first that fits
    "attention": r"fmha|flash|attention|sdpa|cudnn::fusion",
    "matmul": r"gemm|nvjet|cutlass|matmul|addmm|\bmm\b|xmma",
    "loss": r"softmax|nll_loss|cross_entropy|gather|scatter",
    "bias gradients": r"triton_red\w*_sum", "norm": r"norm", "activation": r"gelu|silu|tanh|relu",
    "optimizer": r"adam|foreach|multi_tensor",
    "copies and fills": r"stack|copy|memcpy|memset|fill|zero|cat", "other": r""
}


def random_shards(folder, vocab_size=50257, tokens=4_000_000):
    """Shards that both scripts read: what is in them does not change the speed."""
    folder.mkdir(parents=True)
    for split, index, n in (("val", 0, 200_000), ("train", 1, tokens)):
        np.save(folder / f"edufineweb_{split}_{index:06d}.npy",
                np.random.default_rng(index).integers(0, vocab_size, n, dtype=np.uint16))


def run(command, cwd, env=None):
    """-> (console output, seconds to the first step)."""
    console, first, started = [], None, time.perf_counter()
    with open(cwd / "stderr", "w+") as errors:
        process = subprocess.Popen(command, cwd=cwd, env=os.environ | (env or {}), text=True,
                                   stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        try:
            for line in process.stdout:
                console.append(line)
                if STEP.match(line):
                    first = first or time.perf_counter() - started
            if process.wait():
                errors.seek(0)
                sys.exit(
                    f"{shlex.join(map(str, command))} failed:\n{''.join(console)[-1000:]}\n{errors.read()[-3000:]}"
                )
        finally:  # whatever ends this script, nothing goes on using the GPU
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "".join(console), first


def settings(flags, steps, args):
    """Flags of train_gpt2.py: so many training steps and nothing else, then a row's own."""
    never = [
        f"--{name}=0" for name in ("eval_every", "hellaswag_every", "sample_every", "save_every",
                                   "save_minutes", "spike")
    ]
    return [
        "--data=edu_fineweb10B", f"--max_steps={steps}", "--warmup_steps=1", *never,
        f"--block_size={args.T}", f"--micro_batch={args.B}", f"--total_batch_size={args.total}",
        "--batch_warmup=0", *shlex.split(flags)
    ]


def ours(flags, folder, args):
    """-> dict of figures, from what the run logged to TensorBoard: ms, data (ms of a step spent
    waiting for it), rate, mfu, peak, first."""
    steps, torchrun = args.warmup + args.steps, [
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"
    ]
    command = [
        sys.executable, *(torchrun if args.gpus > 1 else []), ROOT / "train_gpt2.py",
        *settings(flags, steps, args), f"--log_dir={folder / 'runs'}"
    ]
    _, first = run(command, folder, {"PYTHONUNBUFFERED": "1"})
    (log,) = (folder / "runs").iterdir()  # this run's; build-nanogpt's script writes to log/
    found = {tag: [*values.values()] for tag, values in read_scalars(log).items()}
    shutil.rmtree(log)  # a checkpoint of 1.5 GB in each
    assert len(found["perf/step_ms"]) == steps, f"{len(found['perf/step_ms'])} steps of {steps}"
    median = {
        tag: statistics.median(values[args.warmup:])
        for tag, values in found.items()
        if tag.startswith("perf/")
    }
    return {
        "ms": median["perf/step_ms"], "data": median["perf/data_ms"],
        "rate": median["perf/tok_per_sec"], "mfu": median.get("perf/mfu"),
        "peak": max(found.get("perf/memory_gb", []), default=None), "first": first
    }


def baseline(script, folder, args):
    """build-nanogpt's script with other constants -> the same figures, data left out; its MFU by
    the formula of ours."""
    code = script.read_text()
    shape = f"n_layer={args.n_layer}, n_head={args.n_head}, n_embd={args.n_embd}"
    for old, new in {
            "total_batch_size = 524288": f"total_batch_size = {args.total}",
            "B = 64": f"B = {args.B}", "T = 1024 #": f"T = {args.T} #",
            "use_compile = False": f"use_compile = {args.compile}",
            "max_steps = 19073": f"max_steps = {args.warmup + args.steps}",
            "warmup_steps = 715": "warmup_steps = 1",
            "GPTConfig(vocab_size=50304)": f"GPTConfig(vocab_size=50304, {shape})",
            "if step % 250 == 0 or last_step:": "if False:",
            "if (step % 250 == 0 or last_step)": "if False",
            "if ((step > 0 and step % 250 == 0) or last_step)": "if False"
    }.items():
        assert code.count(old) == 1, (f"{script} is not the script this was written for: "
                                      f"{old!r} stands in it {code.count(old)} times")
        code = code.replace(old, new)
    if args.fp32:
        code = code.replace("dtype=torch.bfloat16)", "enabled=False)")
    code += "\nif device_type == 'cuda':\n    print(f'peak {torch.cuda.max_memory_allocated() / 1e9} GB')\n"
    (folder / "baseline.py").write_text(code)
    console, first = run([sys.executable, "-u", "baseline.py"], folder,
                         {"PYTHONPATH": str(script.parent)})
    steps, peak = [float(ms) for ms in STEP.findall(console)], PEAK.search(console)
    assert len(steps) == args.warmup + args.steps, f"{len(steps)} steps in\n{console[-2000:]}"
    ms, flops = statistics.median(steps[args.warmup:]), peak_flops(pick_device("auto"))
    rate = args.total / ms * 1e3
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(
            block_size=args.T, n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd))
    return {
        "ms": ms, "data": None, "rate": rate,
        "mfu": rate * model.flops_per_token() / flops if flops else None,
        "peak": float(peak[1]) if peak else None, "first": first
    }


def profile(flags, folder, args):
    """One step: its milliseconds, {group of kernels: (milliseconds, calls)}, and the kernels that
    take most, (name, milliseconds, calls)."""
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch.profiler import ProfilerActivity, profile
import train_gpt2
from lib.run_folder import RunFolder
cuda = torch.cuda.is_available()
steps, prof = [], profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
get_batch, log_step = train_gpt2.ShardLoader.next, RunFolder.log_step  # the first thing and the last that a step does
def begin(stream, n):
    steps.append(n)
    if len(steps) == {args.warmup} + 1:
        prof.start()
    return get_batch(stream, n)
def end(run, step, scalars, seconds):
    if step == {args.warmup}:
        torch.cuda.synchronize() if cuda else None
        prof.stop()
        kernels = [(e.key, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3, e.count)
                   for e in prof.key_averages()]
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
        groups[group] = groups[group][0] + ms, groups[group][1] + calls
    return wall, groups, kernels[:args.kernels]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", default=[],
                        help="flags of train_gpt2.py; may be given several times")
    parser.add_argument("--baseline", type=Path, help="build-nanogpt's train_gpt2.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="steps that count")
    parser.add_argument("--warmup", type=int, default=3,
                        help="steps before them; the first compiles")
    parser.add_argument("-B", type=int, default=64, help="sequences per forward pass")
    parser.add_argument("-T", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--total", type=int, default=524_288, help="tokens per step")
    parser.add_argument("--gpus", type=int, default=1,
                        help="of our rows, by torchrun; tok/s is that of all")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="of the baseline")
    parser.add_argument("--fp32", action="store_true",
                        help="the baseline without autocast, which ours leaves out on a CPU")
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
                wall, groups, kernels = profile(row, folder, args)
                total = sum(ms for ms, _ in groups.values())
                print(f"\n`{row}`: {total:.1f} ms of kernels in a step of {wall:.1f} ms\n\n"
                      "| kernels | ms | calls |\n|---|---:|---:|")
                print("\n".join(
                    f"| {group} | {ms:.1f} | {calls} |" for group, (ms, calls) in groups.items()))
                print("\n".join(
                    f"    {ms:9.2f} ms {count:6} x {name[:120]}" for name, ms, count in kernels))
            return
        rows = {row: (lambda row=row: ours(row, folder, args)) for row in args.row}
        if args.baseline:
            rows = {"build-nanogpt": lambda: baseline(args.baseline.resolve(), folder, args)} | rows
        results = {row: [] for row in rows}
        for _ in range(args.rounds):
            for row, measure in rows.items():
                results[row].append(measure())
                print(f"{row}: {results[row][-1]}", file=sys.stderr, flush=True)
    def median(row, key, form):
        values = [figures[key] for figures in results[row]]
        return "n/a" if None in values else form.format(statistics.median(values))

    rates = {
        row: statistics.median(figures["rate"]
                               for figures in found)
        for row, found in results.items()
    }
    first = next(iter(rates))
    print(f"\n| medians of {args.rounds} rounds | ms per step (all) | of them waiting for data | tok/s | MFU | "
          f"against {first} | peak GB | seconds to the first step |\n|---|---|---:|---:|---:|---:|---:|---|")
    for row, rate in rates.items():
        rounds, starts = (", ".join(form.format(figures[key]) for figures in results[row])
                          for key, form in (("ms", "{:.1f}"), ("first", "{:.0f}")))
        print(f"| `{row}` | {median(row, 'ms', '{:.1f}')} ({rounds}) | {median(row, 'data', '{:.2f}')} | {rate:,.0f} | "
              f"{median(row, 'mfu', '{:.1%}')} | {rate / rates[first]:.3f} | {median(row, 'peak', '{:.1f}')} | {starts} |")


if __name__ == "__main__":
    main()
