"""Continuous batching: one model generates many texts at once, and each starts when its request
arrives (Yu et al. 2022, Orca, https://www.usenix.org/conference/osdi22/presentation/yu).

    with Engine(model, tokenizer, slots=64) as engine:                     # steps in a thread
        reply = engine.submit(Request([5, 6, 7], limit=100, stream=True))  # from any thread
        for piece in reply.pieces():
            ...

Texts occupy the first rows of one Decoder, without gaps. A step computes one row per text; with
CUDA graphs, the next power of two. A request beyond `slots` waits until a text ends. Without texts
the thread sleeps.
"""

import collections
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lib.cli import BadInput
from lib.decoding import Decoder, NonFinite, Text, draw
from lib.devices import autocast, dtype_of, memory_bytes, to_host
from lib.tokenizers import Tokenizer

# Prompt tokens prefilled per step, padding included (or one prompt): running texts wait for them.
PREFILL = 8192


class Busy(Exception):
    """The request queue is full."""


class Closed(Exception):
    """The engine was closed before the text ended."""


@dataclass
class Request:
    """A text to generate.

    ids: the prompt, 1 to Engine.window - 1 tokens. limit: most new tokens. top_p: as in
    lib/decoding.py's draw. seed: seed of this text's sampling; None: use the engine's generator.
    stream: whether pieces are needed before the end.
    """
    ids: list[int]
    limit: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False


class Reply:
    """The reply to one request, filled while the engine generates it.

    text: the text so far. count: tokens so far. ended: None, "stop", "length" or "cancelled".
    error: an Exception if generation failed.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, window: int):
        self.request = request
        self.error: Exception | None = None
        self.cancelled = False
        self.generator: torch.Generator | None = None  # for a request with a seed
        limit = min(request.limit, window - len(request.ids))
        # any control token ends the reply, also one that starts a turn of the user
        self.written = Text(tokenizer, limit, request.stop, tokenizer.control)
        self.arrived: queue.SimpleQueue = queue.SimpleQueue()  # pieces; None: the end

    @property
    def text(self) -> str:
        return self.written.text

    @property
    def count(self) -> int:
        return self.written.count

    @property
    def ended(self) -> str | None:
        return "cancelled" if self.cancelled else self.written.ended

    def pieces(self, patience: float | None = None, every: float = 0.0) -> Iterator[str]:
        """Yield the text in pieces as it is generated (without Request.stream, only at the end), at
        most once every `every` seconds, and "" after each `patience` seconds without new text. Ends
        with the text, or when `error` is set."""
        done = False
        while not done:
            try:
                new = [self.arrived.get(timeout=patience)]
            except queue.Empty:
                yield ""
                continue
            while not self.arrived.empty():  # join all pieces that have arrived
                new.append(self.arrived.get())
            done = new[-1] is None
            if done:
                new.pop()
            piece = "".join(new)
            if piece:
                yield piece
                if every and not done:
                    time.sleep(every)

    def cancel(self) -> None:
        """Stop generating and free the row; a no-op if the text has ended."""
        self.cancelled = self.written.ended is None

    def add(self, token: int) -> bool:
        """Called by the engine with the next token, or -1 if its logits were not finite. Returns
        whether the text continues."""
        if token == -1:
            self.fail(NonFinite())
        elif not self.cancelled and self.error is None:
            piece = self.written.add(token)
            if piece and self.request.stream:
                self.arrived.put(piece)
            if self.written.ended:
                self.arrived.put(None)
        return self.ended is None and self.error is None

    def fail(self, error: Exception) -> None:
        self.error = error
        self.arrived.put(None)


class Engine:
    """A model that generates up to `slots` texts at once, in a thread that runs inside `with`.

    waiting: length of the request queue; `submit` raises Busy if it is full. top_k: for all texts,
    as in lib/decoding.py's draw. seed: for requests without a seed. graphs: as in Decoder. Raises
    BadInput if the cache does not fit in memory.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, slots: int, waiting: int = 256,
                 top_k: int = 0, seed: int = 0, graphs: bool = False):
        self.tokenizer = tokenizer
        self.slots = slots
        self.most_waiting = waiting
        self.top_k = top_k
        self.device = next(model.parameters()).device
        self.window = model.config.block_size
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.decoder = self._make_decoder(model, graphs)
        self.replies: list[Reply] = []  # running texts, by row
        self.logits = None    # fp32 (n, vocab_size)
        self.sampling = None  # temperatures and top_p, see _choose
        self.queue: collections.deque[Reply] = collections.deque()
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        """End all texts with Closed, after the running step."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def submit(self, request: Request) -> Reply:
        """Queue a request -> its Reply, filled while the text is generated. Raises Busy or
        Closed."""
        assert 0 < len(request.ids) < self.window and request.limit > 0
        reply = Reply(request, self.tokenizer, self.window)
        with self.changed:
            if self.closed:
                raise Closed
            if len(self.queue) >= self.most_waiting:
                self.queue = collections.deque(other for other in self.queue if not other.cancelled)
                if len(self.queue) >= self.most_waiting:
                    raise Busy
            self.queue.append(reply)
            self.changed.notify()
        return reply

    def _make_decoder(self, model, graphs):
        """A Decoder with its cache allocated. Raises BadInput if it does not fit in memory."""
        config = model.config
        per_token = 2 * config.n_layer * config.n_embd * dtype_of(model).itemsize
        needed = self.slots * self.window * per_token
        no_memory = BadInput(f"no memory for {self.slots:,} texts of {self.window:,} tokens, "
                             f"{needed / 1e9:,.1f} GB of keys and values: lower --slots")
        available = memory_bytes(self.device)
        if available and needed > available:
            raise no_memory
        try:
            with autocast(model):
                decoder = Decoder(model, self.slots, self.window, graphs=graphs)
                decoder.fill(range(self.slots), [[self.tokenizer.eot]] * self.slots)
                decoder.step(torch.zeros(self.slots, dtype=torch.long, device=self.device))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise no_memory from error
        return decoder

    # ---- run by the thread

    def _run(self):
        with autocast(self.decoder.model), torch.no_grad():
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.closed or self.queue or self.replies)
                    if self.closed:
                        break
                    new = self._admit()
                if new:
                    with self._failing(new):
                        self._prefill(new)
                if self.replies:
                    with self._failing(self.replies):
                        self._step()
        for reply in (*self.replies, *self.queue):
            reply.fail(Closed())

    def _admit(self):
        """Take the oldest requests from the queue, as many as fit in free rows and PREFILL."""
        new = []
        longest = 0
        while self.queue and len(self.replies) + len(new) < self.slots:
            longest = max(longest, len(self.queue[0].request.ids))
            if new and longest * (len(new) + 1) > PREFILL:
                break
            reply = self.queue.popleft()
            if not reply.cancelled:
                new.append(reply)
        return new

    def _prefill(self, new):
        n = len(self.replies)
        logits = self.decoder.fill(range(n, n + len(new)), [reply.request.ids for reply in new])
        for reply in new:
            if reply.request.seed is not None:
                reply.generator = torch.Generator(self.device).manual_seed(reply.request.seed)
        self.logits = torch.cat((self.logits, logits)) if n else logits
        self.replies = self.replies + new
        self.sampling = None

    def _step(self):
        tokens = self._choose()
        finite = self.logits.sum(dim=-1).isfinite()
        arrived = to_host(torch.where(finite, tokens, -1))
        self.logits = self.decoder.step(tokens)  # on a GPU, runs while the host handles the tokens
        running = [reply.add(token) for reply, token in zip(self.replies, arrived(), strict=True)]
        # from the last row backwards, so that only running texts move into gaps
        for row in reversed(range(len(running))):
            if not running[row]:
                self._free(row)
        self.logits = self.logits[:len(self.replies)]

    def _free(self, row):
        """Remove the text in `row`, and move the last text into the gap."""
        reply = self.replies.pop()
        last = len(self.replies)
        if row < last:
            self.decoder.move(last, row)
            self.logits[row] = self.logits[last]
            self.replies[row] = reply
        self.sampling = None

    def _choose(self):
        """The next token of every row, int64 (n,)."""
        if self.sampling is None:  # unchanged until a text starts or ends
            requests = [reply.request for reply in self.replies]
            temperature = torch.tensor([[request.temperature] for request in requests])
            top_p = torch.tensor([[request.top_p] for request in requests])
            # scalars are faster where all rows agree
            temperature = temperature.to(self.device) if temperature.any() else 0
            top_p = top_p.to(self.device) if (top_p < 1).any() else 1.0
            self.sampling = (temperature, top_p)
        tokens = draw(self.logits, self.sampling[0], self.top_k, self.sampling[1], self.generator)
        for row, reply in enumerate(self.replies):
            if reply.generator:
                request = reply.request
                logits = self.logits[row:row + 1]
                tokens[row] = draw(logits, request.temperature, self.top_k, request.top_p,
                                   reply.generator)
        return tokens

    @contextlib.contextmanager
    def _failing(self, replies):
        """Let an error end only these texts, not the engine."""
        try:
            yield
        except Exception as error:
            lines = str(error).splitlines() or [""]
            print(f"{len(replies)} texts ended by {type(error).__name__}: {lines[0]}",
                  file=sys.stderr, flush=True)
            for reply in replies:
                reply.fail(error)
            if replies is self.replies:
                self.replies = []
                self.logits = None
