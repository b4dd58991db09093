"""Generation speed: the decoder of lib/decoding.py against transformers' generate on the exported
weights, on one machine.

    python benchmarks/generate_speed.py  # 124M, random weights of gpt2 and modern, batches of 1 and 64
    python benchmarks/generate_speed.py --checkpoint log/<run>/ckpt_<step>.pt --batch 1 8 64 --new_tokens 512

Every contestant continues the same prompts by so many tokens, greedily and without an end; tokens
per second count the prompt's pass and the host's work on each token. What is captured or compiled
is so before; medians over --rounds. "agree": new tokens equal to the eager steps' before the first
that differs, over all rows (bf16 rounds differently in other kernels: ties break either way).
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


def ours(model, prompts, n, choose, how):
    """-> a function that generates: rows of n new tokens."""
    with autocast(next(model.parameters()).device):
        decoder = Decoder(model, len(prompts), len(prompts[0]) + n, **how)

    def run():
        with autocast(decoder.token.device):
            return torch.tensor(list(generate(decoder, prompts, n, choose))).T

    return run


def theirs(model, prompts, n, sampling):
    device = next(model.parameters()).device
    hf = huggingface.convert(model).to(device, compute_dtype(device))
    hf.generation_config.eos_token_id = hf.generation_config.pad_token_id = None
    idx = torch.tensor(prompts, device=device)

    def run():
        out = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                          min_new_tokens=n, **sampling)
        return out[:, idx.size(1):].cpu()

    return run


def seconds_of(run, rounds, device):
    """Median seconds of `run`, after two that do not count, and what it returned."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for i in range(rounds + 2):
        synchronize()
        started = time.perf_counter()
        out = run()
        synchronize()
        times += [time.perf_counter() - started] if i >= 2 else []
    return statistics.median(times), out


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
                        help="the row with the compiled step")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device, n = pick_device(args.device), args.new_tokens
    torch.set_float32_matmul_precision("high")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    models = {}
    if args.checkpoint:
        models[Path(args.checkpoint).absolute().parent.name] = load_checkpoint(
            args.checkpoint, device)[0]
    else:
        for preset in args.preset:
            torch.manual_seed(0)
            fields = {
                name: value for name, value in PRESETS[preset].items() if hasattr(GPTConfig, name)
            }
            models[preset] = GPT(GPTConfig(**fields)).to(device).eval()
    greedy = partial(draw, temperature=0)
    top50 = partial(draw, temperature=1.0, top_k=50,
                    generator=torch.Generator(device).manual_seed(0))
    rows = {"transformers generate": (theirs, dict(do_sample=False)),
            "transformers generate, top-k 50": (theirs, dict(do_sample=True, top_k=50)),
            "eager steps": (ours, greedy, {})}
    if device.type == "cuda":
        rows |= {
            "CUDA graph": (ours, greedy, dict(graphs=True)),
            "CUDA graph, top-k 50": (ours, top50, dict(graphs=True))
        }
        if args.compile:
            rows |= {
                "CUDA graph, compiled": (ours, greedy, dict(graphs=True, compile=True)),
                "CUDA graph, compiled, top-k 50": (ours, top50, dict(graphs=True, compile=True))
            }
    for model in models.values():
        huggingface.find_family(
            model.config)  # one that transformers cannot run is told before the first line
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, "
          f"{compute_dtype(device)}, {args.prompt_tokens} + {n} tokens\n\n"
          "| model | batch | | tok/s | x transformers | agree |\n|---|---:|---|---:|---:|---:|", flush=True)
    for name, model in models.items():
        for batch in args.batch:
            generator = torch.Generator().manual_seed(1)
            prompts = torch.randint(model.config.vocab_size, (batch, args.prompt_tokens),
                                    generator=generator).tolist()
            speeds, outs = {}, {}
            for row, (make, *how) in rows.items():
                torch._dynamo.reset()
                seconds, outs[row] = seconds_of(make(model, prompts, n, *how), args.rounds, device)
                speeds[row] = batch * n / seconds
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            base = {
                True: speeds["transformers generate, top-k 50"],
                False: speeds["transformers generate"]
            }
            for row, speed in speeds.items():
                same = (outs[row] == outs["eager steps"]).int().cumprod(dim=1).float().mean()
                agree = "" if "top-k" in row else f"{same:.1%}"
                print(
                    f"| {name} | {batch} | {row} | {speed:,.0f} | {speed / base['top-k' in row]:.1f} | {agree} |",
                    flush=True)


if __name__ == "__main__":
    cli.run(main)
