"""Serving speed: chat.py's server with 1, 8 and 64 clients against generate.py's decoding loop, on
one device and model.

    python benchmarks/serve_speed.py                            # 124M, random weights of modern
    python benchmarks/serve_speed.py --checkpoint log/<run> --clients 1 8 64 --new_tokens 256

"loop": lib/decoding.py's generate on a batch with one text per client. "server": clients in a
process of their own, each requesting one completion after another over HTTP, whole or streamed; the
server counts the tokens. Sampled at temperature 1, top-k 50. Control tokens are made unlikely, so
that all texts have one length. Medians over --rounds, after a warm-up round. "first": median ms
from a streamed request to its first piece, with all clients active.
"""

import argparse
import http.client
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.decoding import Decoder, SampleConfig, draw, generate
from lib.devices import autocast, compute_dtype, pick_device
from lib.openai_api import Api
from lib.server import Server
from lib.serving import Engine
from lib.tokenizers import load_tokenizer
from train_gpt2 import GPT, PRESETS, GPTConfig, load_checkpoint

WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "what", "was", "left", "of",
    "its", "dinner",
]


def loop(model, prompts, n, graphs):
    """-> a function that generates n tokens per prompt, and returns the number of tokens."""
    with autocast(model):
        decoder = Decoder(model, len(prompts), len(prompts[0]) + n, graphs=graphs)
    device = decoder.token.device
    generator = torch.Generator(device).manual_seed(0)
    choose = partial(draw, temperature=1.0, top_k=50, generator=generator)

    def run():
        with autocast(model):
            return sum(len(tokens) for tokens in generate(decoder, prompts, n, choose))

    return run


def ask(port, body):
    """One request -> (new tokens, seconds to the first piece or None)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200, response.read()
    first = None
    if not body["stream"]:
        tokens = json.loads(response.read())["usage"]["completion_tokens"]
    else:
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if event["choices"] and event["choices"][0]["text"] and first is None:
                    first = time.perf_counter() - started
                tokens = (event["usage"] or {}).get("completion_tokens", 0)
    connection.close()
    return tokens, first


def run_clients(port, bodies, each):
    """One client per body, requesting it `each` times -> (tokens per second, list of seconds to the
    first pieces)."""
    def client(body):
        return [ask(port, body) for _ in range(each)]

    with ThreadPoolExecutor(len(bodies)) as pool:
        started = time.perf_counter()
        answers = itertools.chain.from_iterable(list(pool.map(client, bodies)))
        seconds = time.perf_counter() - started
    total = 0
    firsts = []
    for tokens, first in answers:
        total += tokens
        if first is not None:
            firsts.append(first)
    return total / seconds, firsts


def load_model(args, device):
    """-> (model, tokenizer): the checkpoint, or random weights of --preset."""
    if args.checkpoint:
        model, tokenizer, _ = load_checkpoint(args.checkpoint, device)
    else:
        torch.manual_seed(0)
        tokenizer = load_tokenizer("gpt2")
        fields = {}
        for name, value in PRESETS[args.preset].items():
            if hasattr(GPTConfig, name):
                fields[name] = value
        model = GPT(GPTConfig(**fields)).to(device).eval()
    ends = [token for token in tokenizer.control if token < model.config.vocab_size]
    ends = torch.tensor(ends, device=device)
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, ends, -1e4))
    return model, tokenizer


def rotated_words(start, n):
    """A text of n words; texts with another start differ from the first word on."""
    return " ".join(WORDS[(start + j) % len(WORDS)] for j in range(n))


def measure(run, port, bodies, clients, args):
    """-> (median tokens per second of the loop, of whole and of streamed answers; median seconds to
    the first piece)."""
    speeds = {"loop": [], "whole": [], "streamed": []}
    firsts = []
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    for i in range(args.rounds + 1):  # alternating, so that load on the machine affects all
        started = time.perf_counter()
        tokens = run()
        speeds["loop"].append(tokens / (time.perf_counter() - started))
        for name, options in (("whole", {"stream": False}), ("streamed", streaming)):
            requests = [body | options for body in bodies]
            speed, first = clients.submit(run_clients, port, requests, args.each).result()
            speeds[name].append(speed)
            if i > 0:  # the first round warms up
                firsts += first
    medians = [statistics.median(values[1:]) for values in speeds.values()]
    return *medians, statistics.median(firsts)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="instead of random weights")
    parser.add_argument("--preset", default="modern")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--slots", type=int, help="default: the most clients")
    parser.add_argument("--prompt_words", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--each", type=int, default=2, help="requests per client and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True,
                        help="CUDA graphs, for both")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    n = args.new_tokens
    torch.set_float32_matmul_precision("high")
    model, tokenizer = load_model(args, device)
    texts = [rotated_words(i, args.prompt_words) for i in range(max(args.clients))]
    prompts = [tokenizer.encode(text).tolist() for text in texts]
    length = min(map(len, prompts))
    prompts = [ids[:length] for ids in prompts]
    slots = args.slots or max(args.clients)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}, {compute_dtype(device)}, {length} + {n} tokens, "
          f"{slots} slots\n\n"
          "| clients | loop, tok/s | server, tok/s | of the loop | streamed, tok/s | of the loop | "
          "first, ms |\n|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with Server("127.0.0.1", 0) as server, ProcessPoolExecutor(1, spawn) as clients:
        engine = Engine(model, tokenizer, slots, top_k=50, graphs=args.graphs)
        with server.serving(Api(engine, "bench", SampleConfig())), engine:
            for count in args.clients:
                run = loop(model, prompts[:count], n, args.graphs)
                bodies = [dict(model="bench", prompt=text, max_tokens=n, temperature=1.0)
                          for text in texts[:count]]
                base, whole, streamed, first = measure(
                    run, server.server_port, bodies, clients, args)
                print(f"| {count} | {base:,.0f} | {whole:,.0f} | {whole / base:.2f} | "
                      f"{streamed:,.0f} | {streamed / base:.2f} | {1000 * first:,.0f} |",
                      flush=True)


if __name__ == "__main__":
    main()
