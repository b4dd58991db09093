"""Chat with a post-trained checkpoint: in the terminal, in a browser, or through an OpenAI-style
API.

    python chat.py --checkpoint log/<run>                  # /reset  /temp X  /save FILE  /quit
    python chat.py --checkpoint PATH -p "What is a cat?"   # one answer
    python chat.py --checkpoint PATH --serve --port 8000   # http://127.0.0.1:8000, and its API
    python chat.py --model gpt2                            # a base model continues your text

The API is at /v1/chat/completions. A conversation that outgrows the model's context loses its
oldest turns. Ctrl-C ends a reply, Ctrl-D the chat. A base model continues each text in the
terminal; it cannot be served.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lib import chat_template, checkpoint, compiler
from lib.cli import BadInput, check, flag, parse, run
from lib.decoding import Decoder, NonFinite, SampleConfig, Text, draw, generate
from lib.devices import autocast, dtype_flag, pick_device
from lib.openai_api import Api
from lib.rope import ContextConfig, extend
from lib.server import Server, is_loopback
from lib.serving import Engine
from lib.tokenizers import Tokenizer
from train_gpt2 import GPT, load_checkpoint

COMMANDS = "/reset, /temp X, /save FILE, /quit"
ENDINGS = {
    "length": "cut off by --max_new_tokens or the end of the context",
    "interrupted": "stopped",
}


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    prompt: str | None = flag(None, "answer this message and exit", short="p")
    system: str | None = flag(None, "system message of the conversation")
    serve: bool = flag(False, "serve the chat to a browser and to OpenAI clients")
    graphs: bool = flag(
        True, "on cuda, replay the decoding step as a CUDA graph: one launch per token instead of "
              "hundreds")
    compile: bool = flag(
        False, "on cuda, in the terminal, compile the decoding step: starts slowly, pays off for "
               "many tokens")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")
    dtype: str = dtype_flag()


@dataclass
class ServeConfig:
    host: str = flag(
        "127.0.0.1", "address to listen on; for other machines, also give --api_key")
    port: int = flag(8000, "port to listen on; 0: any free one", at_least=0, below=2**16)
    api_key: str | None = flag(None, "API key that clients must send")
    slots: int | None = flag(
        None, "texts generated at once; unset: 64 on cuda, else 16", above=0, at_most=4096)
    waiting: int = flag(
        256, "requests that may wait for a slot; more are refused", at_least=1, at_most=100_000)


@dataclass
class ChatSampling(SampleConfig):
    samples: int = flag(1, None)
    max_new_tokens: int = flag(1024, "tokens per reply", at_least=1, at_most=1_000_000)


def load_chat(path: str, device: str | torch.device,
              dtype: str = "auto") -> tuple[GPT, Tokenizer, bool]:
    """-> (model, tokenizer, whether it can chat). Raises BadInput if the model was trained with
    another chat template."""
    model, tokenizer, state = load_checkpoint(path, device, dtype)
    tokenizer.require_text("chat")
    if "chat_template" not in state:
        return model, tokenizer, False
    if state["chat_template"] != chat_template.JINJA:
        raise BadInput(f"{path} was trained with another chat template than lib/chat_template.py's:"
                       " post-train it again with posttrain.py")
    needed = tokenizer.vocab_size + len(tokenizer.reserved)
    if model.config.vocab_size != needed:
        raise BadInput(f"{path}: its model has {model.config.vocab_size:,} ids and its tokenizer, "
                       f"with the chat template's, {needed:,}: train it again with posttrain.py")
    return model, tokenizer, True


# --------------------------------------------------------------------------------------------------
# In the terminal


class Chat:
    """A conversation in the terminal.

    messages: those still in the model's context. history: all messages, except turns without an
    answer. dropped: number of oldest messages that no longer fit the context. options: graphs and
    compile of Decoder.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, sampling: ChatSampling,
                 system: str | None = None, **options: Any):
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.system = system
        self.device = next(model.parameters()).device
        self.window = model.config.block_size
        self.generator = torch.Generator(self.device).manual_seed(sampling.seed)
        with autocast(model):
            self.decoder = Decoder(model, 1, self.window, **options)
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages: list[dict] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.history = list(self.messages)
        self.dropped = 0

    def prompt(self, messages: list[dict], limit: int) -> tuple[list[dict], list[int]]:
        """-> (the newest messages whose prompt has at most `limit` tokens, its ids).

        Raises BadInput if the last message alone is too long.
        """
        return chat_template.fit(messages, self.tokenizer, limit)

    def reply(self, content: str, show: Callable[[str], object]) -> str:
        """Answer the user's message, calling `show` with each piece of the answer.

        Returns how it ended: "stop", "length", or "interrupted" by Ctrl-C. Raises BadInput, before
        anything is generated, if the message does not fit the context.
        """
        sampling = self.sampling
        question = {"role": "user", "content": content}
        messages = [*self.messages, question]
        reserved = min(sampling.max_new_tokens, max(self.window // 4, 1))  # for the reply
        self.messages, ids = self.prompt(messages, self.window - reserved)
        self.dropped += len(messages) - len(self.messages)
        limit = min(sampling.max_new_tokens, self.window - len(ids))
        # any control token ends the reply, also one that starts a turn of the user
        text = Text(self.tokenizer, limit, sampling.stop or (), self.tokenizer.control)
        try:
            self.generate(ids, limit, text, show)
            ended = text.ended or "length"
        except KeyboardInterrupt:
            ended = "interrupted"
        answer = {"role": "assistant", "content": text.text}
        self.messages.append(answer)
        if text.text:
            self.history += [question, answer]
        return ended

    def generate(self, ids: list[int], limit: int, text: Text,
                 show: Callable[[str], object]) -> None:
        """Continue the ids until `text` ends. Raises NonFinite."""
        sampling = self.sampling
        choose = partial(draw, temperature=sampling.temperature, top_k=sampling.top_k,
                         top_p=sampling.top_p, generator=self.generator)
        with autocast(self.decoder.model):
            for (token,) in generate(self.decoder, [ids], limit, choose):
                if token == -1:
                    raise NonFinite
                show(text.add(token))
                if text.ended:
                    break


class Completion(Chat):
    """A base model in the terminal: continues each text on its own."""

    def prompt(self, messages: list[dict], limit: int) -> tuple[list[dict], list[int]]:
        ids = self.tokenizer.encode(messages[-1]["content"]).tolist() or [self.tokenizer.eot]
        if len(ids) > limit:
            raise BadInput(f"the text has {len(ids):,} tokens, and the context has room for "
                           f"{limit:,}: shorten it")
        return messages, ids

    def reply(self, content: str, show: Callable[[str], object]) -> str:
        self.messages = []
        return super().reply(content, show)


def say(note: str) -> None:
    print(f"[{note}]", file=sys.stderr, flush=True)


def lines(prompt: str) -> Iterator[str]:
    """Yield the user's input line by line until its end."""
    if sys.stdin is None:  # started with `<&-`
        return
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() a history)
    else:
        prompt = ""
    with contextlib.suppress(AttributeError):  # notebooks have another stdin
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
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
            continue
        yield line


def talk(chat: Chat) -> None:
    """Chat in the terminal until /quit or the end of the input."""
    say(f"{COMMANDS}; Ctrl-C ends a reply")
    for line in lines("> "):
        line = line.strip()
        if line.partition(" ")[0] == "/quit":
            break
        try:
            if line.startswith("/"):
                run_command(chat, line)
            elif line:
                answer(chat, line)
        except NonFinite:
            raise
        except BadInput as error:
            say(str(error))


def run_command(chat: Chat, line: str) -> None:
    """/reset, /temp or /save. Raises BadInput."""
    command, _, argument = line.partition(" ")
    if command == "/reset":
        chat.reset()
        say("a new conversation")
    elif command == "/temp":
        chat.sampling = with_temperature(chat.sampling, argument)
        say(f"temperature {chat.sampling.temperature:g}")
    elif command == "/save":
        save(chat.history, argument.strip())
    else:
        raise BadInput(f"unknown command {command[:40]}: {COMMANDS}; messages cannot start with a "
                       "slash")


def answer(chat: Chat, message: str) -> None:
    """Print the reply to a message, and a note if the reply or the context was cut."""
    dropped = chat.dropped
    ended = chat.reply(message, partial(print, end="", flush=True))
    print()
    if chat.dropped > dropped:
        say(f"the context was full: the model no longer sees the {chat.dropped} oldest messages")
    if ended in ENDINGS:
        say(ENDINGS[ended])


def with_temperature(sampling: ChatSampling, word: str) -> ChatSampling:
    """The settings with the temperature of /temp. Raises BadInput."""
    try:
        changed = replace(sampling, temperature=float(word))
    except ValueError:
        raise BadInput(f"/temp takes a number: it is {sampling.temperature:g}") from None
    check(changed)
    return changed


def save(messages: list[dict], path: str) -> None:
    """Write a conversation as one line of JSON, {"messages": [...]}.

    Raises BadInput, also if the file exists.
    """
    if not path:
        raise BadInput("/save takes a file name")
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
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot write {path} ({reason}): name another file") from error
    say(f"{len(messages)} messages saved to {path}")


# --------------------------------------------------------------------------------------------------
# As a server


def serve(name: str, cfg: Config, serving: ServeConfig, sampling: ChatSampling,
          load: Callable[[], tuple]) -> None:
    """Serve HTTP until SIGINT or SIGTERM.

    load: () -> (model, tokenizer, whether it can chat); called once the port is open.
    """
    check_access(serving)
    with Server(serving.host, serving.port) as server:
        model, tokenizer, can_chat = load()
        if not can_chat:
            raise BadInput(f"{name} has not learned to chat: post-train it with posttrain.py, or "
                           "leave out --serve to continue texts in the terminal")
        on_cuda = next(model.parameters()).device.type == "cuda"
        slots = serving.slots or (64 if on_cuda else 16)
        engine = Engine(model, tokenizer, slots, serving.waiting, sampling.top_k, sampling.seed,
                        cfg.graphs)
        del model  # the engine has a copy in its compute dtype
        stop = threading.Event()

        def ask_to_stop(number, _):
            stop.set()
            signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)
        api = Api(engine, public_name(name), sampling, serving.api_key)
        with server.serving(api), engine:
            print(f"chat at {server.url}, API at {server.url}/v1, up to {slots} texts at once; "
                  "Ctrl-C ends it", flush=True)
            stop.wait()


def check_access(serving: ServeConfig) -> None:
    """Raises BadInput if other machines could connect without a key, or the key cannot be sent."""
    if not is_loopback(serving.host) and serving.api_key is None:
        raise BadInput(f"--host {serving.host} lets other machines connect: give an --api_key, or "
                       "leave out --host")
    key = serving.api_key or ""
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise BadInput("--api_key cannot be sent in an HTTP header: give printable ASCII "
                       "characters, without spaces around them")


def public_name(name: str) -> str:
    """The name of the model in the API: its folder's name."""
    path = Path(name).resolve()
    if path.is_dir():
        return path.name
    return path.parent.name or path.stem


# --------------------------------------------------------------------------------------------------
# The command


def check_flags(cfg: Config, given: set[str]) -> None:
    """Raises BadInput on flags of the terminal with --serve, and the other way round."""
    if cfg.serve:
        wrong = sorted(given & {"prompt", "system", "compile"})
        if wrong:
            raise BadInput(f"--{wrong[0]} is for the terminal: leave out --{wrong[0]} or --serve")
        return
    wrong = sorted(given & {field.name for field in fields(ServeConfig)})
    if wrong:
        raise BadInput(f"--{wrong[0]} is for --serve: give that, too")


def main(argv: list[str]) -> None:
    configs = (Config, ServeConfig, ContextConfig, ChatSampling)
    (cfg, serving, context, sampling), given = parse(configs, argv, __doc__)
    name = checkpoint.named(cfg)
    check_flags(cfg, given)
    device = pick_device(cfg.device)

    def load():
        model, tokenizer, can_chat = load_chat(name, device, cfg.dtype)
        return extend(model, context), tokenizer, can_chat

    if cfg.serve:
        serve(name, cfg, serving, sampling, load)
        return
    model, tokenizer, can_chat = load()
    if not can_chat:
        if cfg.system is not None:
            raise BadInput(f"--system is for a model that can chat, and {name} has not learned to: "
                           "leave it out")
        say(f"{name} has not learned to chat: it continues your text; post-train it with "
            "posttrain.py")
    kind = Chat if can_chat else Completion
    compiled = cfg.compile and compiler.can_decode(device)
    chat = kind(model, tokenizer, sampling, cfg.system, graphs=cfg.graphs, compile=compiled)
    if cfg.prompt is None:
        talk(chat)
        return
    ended = chat.reply(cfg.prompt, partial(print, end="", flush=True))
    if ended == "interrupted":
        raise KeyboardInterrupt
    print()


if __name__ == "__main__":
    run(main)
