"""Serving speed: chat.py's server with 1, 8 and 64 clients against generate.py's own decoding loop,
on one device and model.

    python benchmarks/serve_speed.py                                      # 124M, random weights of modern
    python benchmarks/serve_speed.py --checkpoint log/<run>/ckpt_<step>.pt --clients 1 8 64 --new_tokens 256 --graphs

"loop": lib/decoding.py's generate with as many texts side by side. "server": so many clients (in a
process of their own), each asking for one completion after the other over HTTP, whole or streamed;
tokens are those that the server counts. Sampled at temperature 1, top-k 50; control tokens are made
unlikely, so that texts are of one length. Medians over --rounds, after one more. "first": median
milliseconds from a streamed request to its first piece, while all clients ask.
"""

import argparse
import http.client
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


def loop(model, prompts, n, graphs):
    """-> a function that writes n tokens behind each prompt, and returns how many it has written.
    """
    with autocast(next(model.parameters()).device):
        decoder = Decoder(model, len(prompts), len(prompts[0]) + n, graphs=graphs)
    choose = partial(draw, temperature=1.0, top_k=50,
                     generator=torch.Generator(decoder.token.device).manual_seed(0))

    def run():
        with autocast(decoder.token.device):
            return sum(len(tokens) for tokens in generate(decoder, prompts, n, choose))

    return run


def ask(port, body):
    """One request -> (tokens written, seconds to the first piece or None)."""
    connection, started, first = http.client.HTTPConnection("127.0.0.1", port,
                                                            timeout=600), time.perf_counter(), None
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200, response.read()
    if not body["stream"]:
        tokens = json.loads(response.read())["usage"]["completion_tokens"]
    else:
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event["choices"] and event["choices"][0]["text"] and first is None:
                    first = time.perf_counter() - started
                tokens = (event["usage"] or {}).get("completion_tokens", 0)
    connection.close()
    return tokens, first


def clients(port, bodies, each):
    """So many clients, each asking its body `each` times -> (seconds, tokens, seconds to first
    pieces)."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        started = time.perf_counter()
        answers = [
            answer for some in pool.map(lambda body: [ask(port, body) for _ in range(each)], bodies)
            for answer in some
        ]
        seconds = time.perf_counter() - started
    return seconds, sum(
        tokens for tokens, _ in answers), [first for _, first in answers if first is not None]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="instead of random weights")
    parser.add_argument("--preset", default="modern")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--slots", type=int, help="by default the most clients")
    parser.add_argument("--prompt_words", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--each", type=int, default=2, help="requests per client and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True,
                        help="CUDA graphs, for both")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device, n = pick_device(args.device), args.new_tokens
    torch.set_float32_matmul_precision("high")
    if args.checkpoint:
        model, tokenizer, _ = load_checkpoint(args.checkpoint, device)
    else:
        torch.manual_seed(0)
        tokenizer = load_tokenizer("gpt2")
        fields = {
            name: value for name, value in PRESETS[args.preset].items() if hasattr(GPTConfig, name)
        }
        model = GPT(GPTConfig(**fields)).to(device).eval()
    ends = [token for token in tokenizer.control if token < model.config.vocab_size]
    ends = torch.tensor(ends, device=device)
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, ends, -1e4))

    words = [
        "the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "what", "was", "left", "of",
        "its", "dinner"
    ]
    texts = [
        " ".join(words[(i + j) % len(words)]
                 for j in range(args.prompt_words))
        for i in range(max(args.clients))
    ]
    ids = [tokenizer.encode(text).tolist() for text in texts]
    length = min(map(len, ids))
    slots, machine = args.slots or max(
        args.clients), torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}, {compute_dtype(device)}, {length} + {n} tokens, {slots} slots\n\n"
          "| clients | loop, tok/s | server, tok/s | of the loop | streamed, tok/s | of the loop | first, ms |\n"
          "|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with Server("127.0.0.1",
                0) as server, ProcessPoolExecutor(1,
                                                  multiprocessing.get_context("spawn")) as outside:
        engine = Engine(model, tokenizer, slots, top_k=50, graphs=args.graphs)
        with server.serving(Api(engine, "bench", SampleConfig())), engine:
            for count in args.clients:
                bodies = [
                    dict(model="bench", prompt=text, max_tokens=n, temperature=1.0)
                    for text in texts[:count]
                ]
                speeds, firsts = {"loop": [], False: [], True: []}, []
                run = loop(model, [some[:length] for some in ids[:count]], n, args.graphs)
                for i in range(args.rounds + 1):  # in turn, so that all meet the same machine
                    started = time.perf_counter()
                    tokens = run()
                    measured = [("loop", tokens / (time.perf_counter() - started))]
                    for stream in (False, True):
                        options = dict(stream_options={"include_usage": True}) if stream else {}
                        asked = [{**body, "stream": stream, **options} for body in bodies]
                        seconds, tokens, first = outside.submit(clients, server.server_port, asked,
                                                                args.each).result()
                        measured.append((stream, tokens / seconds))
                        firsts += first if i else []
                    for name, speed in measured if i else ():
                        speeds[name].append(speed)
                base, whole, streamed = (statistics.median(values) for values in speeds.values())
                print(f"| {count} | {base:,.0f} | {whole:,.0f} | {whole / base:.2f} | {streamed:,.0f} | {streamed / base:.2f} "
                      f"| {1000 * statistics.median(firsts):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
