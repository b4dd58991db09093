"""Generation speed: the decoder of lib/decoding.py against transformers' generate on the exported
weights, on one machine.

    python benchmarks/generate_speed.py  # 124M, random weights of gpt2 and modern, batches 1 and 64
    python benchmarks/generate_speed.py --checkpoint log/<run> --batch 1 8 64 --new_tokens 512

All contestants continue the same prompts by --new_tokens, greedily and without an end token. Tokens
per second include prefill and the host's work per token, but neither capture nor compilation;
medians over --rounds. "agree": the share of new tokens equal to the eager steps' before the first
difference (other kernels round bf16 differently, so ties break either way).
"""

import argparse
import logging
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import cli, huggingface
from lib.decoding import Decoder, draw, generate
from lib.devices import autocast, compute_dtype, pick_device
from train_gpt2 import GPT, PRESETS, GPTConfig, load_checkpoint


def ours(model, prompts, n, choose, **options):
    """-> a function that generates n new tokens per prompt, int64 (rows, n)."""
    with autocast(model):
        decoder = Decoder(model, len(prompts), len(prompts[0]) + n, **options)

    def run():
        with autocast(model):
            steps = list(generate(decoder, prompts, n, choose))
        return torch.tensor(steps).T

    return run


def theirs(model, prompts, n, **sampling):
    """The same with transformers."""
    device = next(model.parameters()).device
    hf = huggingface.convert(model).to(device, compute_dtype(device))
    hf.generation_config.eos_token_id = None
    hf.generation_config.pad_token_id = None
    idx = torch.tensor(prompts, device=device)

    def run():
        out = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                          min_new_tokens=n, **sampling)
        return out[:, idx.size(1):].cpu()

    return run


def contestants(device, compiled):
    """-> {row of the table: function (model, prompts, n) -> a function that generates}."""
    generator = torch.Generator(device).manual_seed(0)
    greedy = partial(draw, temperature=0)
    top50 = partial(draw, temperature=1.0, top_k=50, generator=generator)
    rows = {
        "transformers generate": partial(theirs, do_sample=False),
        "transformers generate, top-k 50": partial(theirs, do_sample=True, top_k=50),
        "eager steps": partial(ours, choose=greedy),
    }
    if device.type == "cuda":
        rows["CUDA graph"] = partial(ours, choose=greedy, graphs=True)
        rows["CUDA graph, top-k 50"] = partial(ours, choose=top50, graphs=True)
        if compiled:
            fused = partial(ours, graphs=True, compile=True)
            rows["CUDA graph, compiled"] = partial(fused, choose=greedy)
            rows["CUDA graph, compiled, top-k 50"] = partial(fused, choose=top50)
    return rows


def load_models(args, device):
    """-> {name: GPT}: the checkpoint, or random weights of each preset."""
    if args.checkpoint:
        model, *_ = load_checkpoint(args.checkpoint, device)
        return {Path(args.checkpoint).absolute().parent.name: model}
    models = {}
    for preset in args.preset:
        torch.manual_seed(0)
        fields = {}
        for name, value in PRESETS[preset].items():
            if hasattr(GPTConfig, name):
                fields[name] = value
        models[preset] = GPT(GPTConfig(**fields)).to(device).eval()
    return models


def time_runs(run, rounds, device):
    """-> (median seconds of `run` after two warm-up calls, its result)."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(rounds + 2):
        synchronize()
        started = time.perf_counter()
        out = run()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:]), out


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="instead of random weights")
    parser.add_argument("--preset", nargs="+", default=["gpt2", "modern"], choices=PRESETS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="include rows with the compiled step")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    models = load_models(args, device)
    for model in models.values():
        huggingface.find_family(model.config)  # refuse what transformers cannot run, before any row
    rows = contestants(device, args.compile)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}, {compute_dtype(device)}, {args.prompt_tokens} + "
          f"{args.new_tokens} tokens\n\n"
          "| model | batch | | tok/s | x transformers | agree |\n|---|---:|---|---:|---:|---:|",
          flush=True)
    for name, model in models.items():
        for batch in args.batch:
            compare(name, model, batch, rows, args)


def compare(name, model, batch, rows, args):
    """Time all rows on one model and batch size, and print them."""
    device = next(model.parameters()).device
    n = args.new_tokens
    generator = torch.Generator().manual_seed(1)
    shape = (batch, args.prompt_tokens)
    prompts = torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
    speeds = {}
    outs = {}
    for row, make in rows.items():
        torch._dynamo.reset()
        seconds, outs[row] = time_runs(make(model, prompts, n), args.rounds, device)
        speeds[row] = batch * n / seconds
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for row, speed in speeds.items():
        if "top-k" in row:
            base = speeds["transformers generate, top-k 50"]
            agree = ""
        else:
            base = speeds["transformers generate"]
            same = (outs[row] == outs["eager steps"]).int().cumprod(dim=1).float().mean()
            agree = f"{same:.1%}"
        print(f"| {name} | {batch} | {row} | {speed:,.0f} | {speed / base:.1f} | {agree} |",
              flush=True)


if __name__ == "__main__":
    cli.run(main)
