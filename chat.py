"""Chat with a post-trained checkpoint: in the terminal, in a browser, through an OpenAI-style API.

    python chat.py --checkpoint log/<run>                                # /reset  /temp X  /save FILE  /quit
    python chat.py --checkpoint PATH -p "What is a cat?"                 # one answer
    python chat.py --checkpoint PATH --serve --port 8000                 # http://127.0.0.1:8000, and /v1/chat/completions
    python chat.py --model gpt2                                          # a base model: it continues what you type

A conversation that outgrows the model's context loses its oldest turns. Ctrl-C ends a reply, Ctrl-D
the chat. In the terminal, a model that has not learned to chat continues each text; it is not
served.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from lib import chat_template, checkpoint
from lib.cli import BadInput, check, flag, parse, run
from lib.decoding import Decoder, NonFinite, SampleConfig, Text, draw, generate
from lib.devices import autocast, pick_device
from lib.rope import ContextConfig, extend
from lib.server import Api, Server, is_loopback
from lib.serving import Engine
from train_gpt2 import load_checkpoint

COMMANDS = "/reset, /temp X, /save FILE, /quit"


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    prompt: str | None = flag(None, "answer this alone, and end", short="p")
    system: str | None = flag(None, "a system message to begin with")
    serve: bool = flag(False, "serve the chat to a browser and to OpenAI's clients")
    graphs: bool = flag(
        True,
        "on cuda, replay the decoding step as a CUDA graph: one launch per token instead of hundreds"
    )
    compile: bool = flag(
        False,
        "on cuda, in the terminal, compile the decoding step: slow to start, pays for many tokens")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")


@dataclass
class ServeConfig:
    host: str = flag("127.0.0.1", "address to listen at; beyond this machine, give --api_key, too")
    port: int = flag(8000, "port to listen at; 0: any free one", at_least=0, below=2**16)
    api_key: str | None = flag(None, "what clients have to give as their API key")
    slots: int | None = flag(None, "texts written at once; without the flag, 64 on cuda, else 16",
                             above=0, at_most=4096)
    waiting: int = flag(256, "requests that may wait for one of them", at_least=1, at_most=100_000)


@dataclass
class ChatSampling(SampleConfig):
    samples: int = flag(1, None)
    max_new_tokens: int = flag(1024, "tokens per reply", at_least=1, at_most=1_000_000)


def load_chat(path, device):
    """-> (model, tokenizer, whether it has learned to chat). Raises BadInput for another template.
    """
    model, tokenizer, state = load_checkpoint(path, device)
    if "chat_template" not in state:
        return model, tokenizer, False
    if state["chat_template"] != chat_template.JINJA:
        raise BadInput(
            f"{path} has learned another chat template than lib/chat_template.py's: make one anew with posttrain.py"
        )
    if model.config.vocab_size != (needed := tokenizer.vocab_size + len(tokenizer.reserved)):
        raise BadInput(f"{path}: its model has {model.config.vocab_size:,} ids and its tokenizer with those of chat {needed:,}"
                       ": make one anew with posttrain.py")
    return model, tokenizer, True


class Chat:
    """A conversation in the terminal. messages: what the model sees of it. said: all of it, but
    turns without an answer. dropped: how many of the oldest messages have left the context. how:
    graphs and compile, of Decoder."""

    def __init__(self, model, tokenizer, sampling, system=None, **how):
        self.model, self.tokenizer, self.sampling, self.system = model, tokenizer, sampling, system
        self.device, self.window = next(model.parameters()).device, model.config.block_size
        self.generator = torch.Generator(self.device).manual_seed(sampling.seed)
        with autocast(self.device):
            self.decoder = Decoder(model, 1, self.window, **how)
        self.reset()

    def reset(self):
        self.messages, self.dropped = [] if self.system is None else [{
            "role": "system", "content": self.system
        }], 0
        self.said = list(self.messages)

    def prompt(self, messages, limit):
        """-> (the newest messages whose prompt has at most `limit` tokens, the prompt's ids).

        Raises BadInput if the last message alone is too long.
        """
        return chat_template.fit(messages, self.tokenizer, limit)

    def reply(self, content, show):
        """The user's next message -> how the reply ended: "stop", "length", or "interrupted" by
        Ctrl-C. show: called with its pieces. Raises BadInput, before anything is said, if the
        message does not fit the context."""
        sampling, messages = self.sampling, [*self.messages, {"role": "user", "content": content}]
        room = min(sampling.max_new_tokens, max(self.window // 4, 1))  # for the reply, at least
        kept, ids = self.prompt(messages, self.window - room)
        self.messages, self.dropped = kept, self.dropped + len(messages) - len(kept)
        limit = min(sampling.max_new_tokens, self.window - len(ids))
        text = Text(self.tokenizer, limit, sampling.stop or (),
                    self.tokenizer.control)  # going on as the user ends it, too
        choose = partial(draw, temperature=sampling.temperature, top_k=sampling.top_k,
                         top_p=sampling.top_p, generator=self.generator)
        ended = None
        try:
            with autocast(self.device):
                for (token,) in generate(self.decoder, [ids], limit, choose):
                    if token == -1:
                        raise NonFinite
                    show(text.add(token))
                    if text.ended:
                        break
            ended = text.ended
        except KeyboardInterrupt:
            ended = "interrupted"
        self.messages.append({"role": "assistant", "content": text.text})
        self.said += [{"role": "user", "content": content}, self.messages[-1]] if text.text else []
        return ended


class Completion(Chat):
    """A base model in the terminal: it continues each text by itself."""

    def prompt(self, messages, limit):
        ids = self.tokenizer.encode(messages[-1]["content"]).tolist() or [self.tokenizer.eot]
        if len(ids) > limit:
            raise BadInput(f"the text has {len(ids):,} tokens, and the context has room for {limit:,}: "
                           "shorten it")
        return messages, ids

    def reply(self, content, show):
        self.messages = []
        return super().reply(content, show)


def say(note):
    print(f"[{note}]", file=sys.stderr, flush=True)


def lines(prompt):
    """What the user types, line by line, to the end of the input."""
    if sys.stdin is None:  # started with `<&-`
        return
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() a history)
    else:
        prompt = ""
    with contextlib.suppress(AttributeError):  # not in a notebook
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not prompt:
                raise
            print()
            say("Ctrl-D or /quit ends the chat")
        else:
            yield line


def talk(chat):
    """The chat in the terminal, to /quit or the end of the input."""
    say(f"{COMMANDS}; Ctrl-C ends a reply")
    for line in lines("> "):
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            break
        try:
            if command == "/reset":
                chat.reset()
                say("a new conversation")
            elif command == "/temp":
                chat.sampling = heated(chat.sampling, argument)
            elif command == "/save":
                save(chat.said, argument.strip())
            elif command.startswith("/"):
                say(f"unknown command {command[:40]}: {COMMANDS}; a message does not begin with a slash"
                    )
            elif line.strip():
                before = chat.dropped
                ended = chat.reply(line.strip(), partial(print, end="", flush=True))
                print()
                if chat.dropped > before:
                    say(f"the context was full: the model no longer sees the {chat.dropped} oldest messages"
                        )
                if ended != "stop":
                    say({
                        "length": "cut off at --max_new_tokens, or where the context ends",
                        "interrupted": "stopped"
                    }[ended])
        except NonFinite:
            raise
        except BadInput as error:
            say(str(error))


def heated(sampling, word):
    """The settings with the temperature of /temp. Raises BadInput."""
    try:
        changed = replace(sampling, temperature=float(word))
    except ValueError:
        raise BadInput(f"/temp takes a number: it is {sampling.temperature:g}") from None
    check(changed)
    say(f"temperature {changed.temperature:g}")
    return changed


def save(messages, path):
    """Write a conversation as a line of JSON, {"messages": [...]}. Raises BadInput; overwrites
    nothing."""
    if not path:
        raise BadInput("/save takes the name of a file")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadInput("there is nothing to save yet")
    line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    try:
        path = os.path.expanduser(path)
        with open(path, "xb") as file:
            try:
                file.write(line.encode("utf-8", "replace"))
                file.flush()
            except OSError:  # leave no partial file
                Path(path).unlink(missing_ok=True)
                raise
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot write {path} ({getattr(error, 'strerror', None) or error}): name another file"
        ) from error
    say(f"{len(messages)} messages saved to {path}")


def serve(name, cfg, serving, sampling, load):
    """Answer HTTP until SIGINT or SIGTERM.

    load: () -> model, tokenizer, whether it has learned to chat; called once the port is taken.
    """
    if not is_loopback(serving.host) and serving.api_key is None:
        raise BadInput(
            f"--host {serving.host} lets other machines in: give an --api_key, or leave --host out")
    key = serving.api_key or ""
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise BadInput(
            "--api_key goes into a header of HTTP: give one of printable ASCII characters, without blanks around it"
        )
    with Server(serving.host, serving.port) as server:
        model, tokenizer, chats = load()
        if not chats:
            raise BadInput(f"{name} has not learned to chat: teach it with posttrain.py, "
                           "or leave out --serve to have texts continued")
        slots = serving.slots or (64 if next(model.parameters()).device.type == "cuda" else 16)
        engine = Engine(model, tokenizer, slots, serving.waiting, sampling.top_k, sampling.seed,
                        cfg.graphs)
        del model  # the engine has a copy of it in the dtype it computes in
        stop = threading.Event()

        def ask_to_stop(number, _):
            stop.set()
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)
        with server.serving(Api(engine, public_name(name), sampling, serving.api_key)), engine:
            print(
                f"chat at {server.url}, API at {server.url}/v1, up to {slots} texts at once; Ctrl-C ends it",
                flush=True)
            stop.wait()


def public_name(name):
    """What clients call the model: the name of its folder."""
    path = Path(name).resolve()
    return path.name if path.is_dir() else path.parent.name or path.stem


def main(argv):
    (cfg, serving, context, sampling), given = parse(
        (Config, ServeConfig, ContextConfig, ChatSampling), argv, __doc__)
    name = checkpoint.named(cfg)
    others = {"prompt", "system", "compile"
              } if cfg.serve else {field.name for field in fields(ServeConfig)}
    if wrong := sorted(given & others):
        where = f"the terminal: leave out --{wrong[0]} or --serve" if cfg.serve else "--serve: give that, too"
        raise BadInput(f"--{wrong[0]} is for {where}")
    device = pick_device(cfg.device)

    def load():
        model, tokenizer, chats = load_chat(name, device)
        return extend(model, context), tokenizer, chats

    if cfg.serve:
        serve(name, cfg, serving, sampling, load)
        return
    model, tokenizer, chats = load()
    if not chats:
        if cfg.system is not None:
            raise BadInput(
                f"--system is for a model that can chat, and {name} has not learned to: leave it out"
            )
        say(f"{name} has not learned to chat: it continues what you type; posttrain.py teaches it to"
            )
    kind = Chat if chats else Completion
    compiled = cfg.compile and device.type == "cuda"
    chat = kind(model, tokenizer, sampling, cfg.system, graphs=cfg.graphs, compile=compiled)
    if cfg.prompt is None:
        talk(chat)
    elif chat.reply(cfg.prompt, partial(print, end="", flush=True)) == "interrupted":
        raise KeyboardInterrupt
    else:
        print()


if __name__ == "__main__":
    run(main)
