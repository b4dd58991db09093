"""Many texts at once with one model, each begun when its request comes: continuous batching (Yu et
al. 2022, Orca, https://www.usenix.org/conference/osdi22/presentation/yu).

    with Engine(model, tokenizer, slots=64) as engine:                       # a thread of its own steps the model
        reply = engine.submit(Request([5, 6, 7], limit=100, stream=True))    # from any thread
        for piece in reply.pieces():
            ...

Texts stand in the first rows of one Decoder, without holes: a step computes as many rows as there
are texts, with CUDA graphs the next power of two. A request beyond `slots` waits until a text ends.
Without texts the thread sleeps.
"""

import collections
import contextlib
import queue
import sys
import threading
import time
from dataclasses import dataclass

import torch

from lib.cli import BadInput
from lib.decoding import Decoder, NonFinite, Text, draw
from lib.devices import autocast, compute_dtype, memory_bytes, to_host

PREFILL = 8192  # prompt tokens per step, padding included (or one prompt): the texts under way pause for them


class Busy(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The engine has been closed before the text ended."""


@dataclass
class Request:
    """ids: the prompt, 1 to Engine.window - 1 of them. limit: new tokens at most. top_p: as in
    lib/decoding.py's draw. seed: draws that do not depend on the other texts; None: those of the
    engine. stream: whether pieces are wanted before the end."""
    ids: list
    limit: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple = ()
    seed: int | None = None
    stream: bool = False


class Reply:
    """The text of one request, as the engine writes it.

    text: str so far. count: tokens so far. ended: None, "stop", "length" or "cancelled". error: an
    Exception, else.
    """

    def __init__(self, request, tokenizer, window):
        self.request, self.error, self.cancelled = request, None, False
        # any control token ends it: to go on as the user is the end of a turn, too
        self.written = Text(tokenizer, min(request.limit, window - len(request.ids)), request.stop,
                            tokenizer.control)
        self.arrived, self.generator = queue.SimpleQueue(), None

    text = property(lambda self: self.written.text)
    count = property(lambda self: self.written.count)
    ended = property(lambda self: "cancelled" if self.cancelled else self.written.ended)

    def pieces(self, patience=None, every=0.0):
        """Yields the text as it comes (with Request.stream; else nothing before the end), at most
        once in `every` seconds, and "" after each `patience` seconds without any. Ends with the
        text, or with `error`."""
        done = False
        while not done:
            try:
                new = [self.arrived.get(timeout=patience)]
            except queue.Empty:
                yield ""
                continue
            while not self.arrived.empty():  # what has come meanwhile, at once
                new.append(self.arrived.get())
            done = new[-1] is None
            if piece := "".join(new[:-1] if done else new):
                yield piece
                if every and not done:
                    time.sleep(every)

    def cancel(self):
        """Nobody wants the rest: its row becomes free. Does nothing to a text that has ended."""
        self.cancelled = self.written.ended is None

    def add(self, token):
        """The engine's: one more token, or -1 if there is none because logits were not finite ->
        whether the text goes on."""
        if token == -1:
            self.fail(NonFinite())
        elif not self.cancelled and self.error is None:
            piece = self.written.add(token)
            if piece and self.request.stream:
                self.arrived.put(piece)
            if self.written.ended:
                self.arrived.put(None)
        return self.ended is None and self.error is None

    def fail(self, error):
        self.error = error
        self.arrived.put(None)


class Engine:
    """A model that writes up to `slots` texts at once, in a thread of its own, from `with` to its
    end.

    waiting: requests that may wait for a row; beyond, `submit` raises Busy. top_k: for all texts,
    as in lib/decoding.py's draw. seed: of all draws but those of requests with a seed. graphs: of
    Decoder. Raises BadInput if memory does not hold the cache.
    """

    def __init__(self, model, tokenizer, slots, waiting=256, top_k=0, seed=0, graphs=False):
        self.tokenizer, self.slots, self.most_waiting, self.top_k = tokenizer, slots, waiting, top_k
        self.device, self.window = next(model.parameters()).device, model.config.block_size
        self.generator = torch.Generator(self.device).manual_seed(seed)
        per_token = 2 * model.config.n_layer * model.config.n_embd * compute_dtype(
            self.device).itemsize
        needed, there = slots * self.window * per_token, memory_bytes(self.device)
        no_memory = (f"no memory for {slots:,} texts of {self.window:,} tokens, {needed / 1e9:,.1f} GB of keys and values: "
                     "lower --slots")
        if there and needed > there:
            raise BadInput(no_memory)
        try:
            with autocast(self.device):
                self.decoder = Decoder(model, slots, self.window, graphs=graphs)
                self.decoder.fill(range(slots),
                                  [[tokenizer.eot]] * slots)  # takes the cache's memory
                self.decoder.step(torch.zeros(slots, dtype=torch.long, device=self.device))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise BadInput(no_memory) from error
        # of the texts under way, row by row: replies; logits, fp32 (n, vocab_size); temperatures
        # and top_p, see _choose
        self.replies, self.logits, self.sampling = [], None, None
        self.queue, self.closed, self.changed = collections.deque(), False, threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        """End all texts with Closed; the step under way is finished."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def submit(self, request):
        """-> the Reply that fills as the text is written. Raises Busy or Closed."""
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

    # the thread's own

    def _run(self):
        with autocast(self.device), torch.no_grad():
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.closed or self.queue or self.replies)
                    if self.closed:
                        break
                    new = self._admit()
                if new:
                    with self._failing(new):
                        self._begin(new)
                if self.replies:
                    with self._failing(self.replies):
                        self._step()
        for reply in (*self.replies, *self.queue):
            reply.fail(Closed())

    def _admit(self):
        """The requests that begin now, in the order in which they came: as many as rows are free
        and PREFILL allows."""
        new, longest = [], 0
        while self.queue and len(self.replies) + len(new) < self.slots:
            longest = max(longest, len(self.queue[0].request.ids))
            if new and longest * (len(new) + 1) > PREFILL:
                break
            reply = self.queue.popleft()
            new += [] if reply.cancelled else [reply]
        return new

    def _begin(self, new):
        n = len(self.replies)
        logits = self.decoder.fill(range(n, n + len(new)), [reply.request.ids for reply in new])
        for reply in new:
            if reply.request.seed is not None:
                reply.generator = torch.Generator(self.device).manual_seed(reply.request.seed)
        self.logits = torch.cat((self.logits, logits)) if n else logits
        self.replies, self.sampling = self.replies + new, None

    def _step(self):
        tokens = self._choose()
        arrived = to_host(torch.where(self.logits.sum(dim=-1).isfinite(), tokens, -1))
        self.logits = self.decoder.step(
            tokens)  # a GPU runs it while the tokens before it are looked at
        going_on = [reply.add(token) for reply, token in zip(self.replies, arrived(), strict=True)]
        for row in range(len(going_on) - 1, -1,
                         -1):  # from the last: the one that moves into a hole goes on
            if not going_on[row]:
                last = self.replies.pop()
                if row < len(self.replies):
                    self.decoder.move(len(self.replies), row)
                    self.logits[row], self.replies[row] = self.logits[len(self.replies)], last
                self.sampling = None
        self.logits = self.logits[:len(self.replies)]

    def _choose(self):
        """The next token of every row, int64 (n,)."""
        if self.sampling is None:  # the same until a text begins or ends
            heat = torch.tensor([[reply.request.temperature] for reply in self.replies])
            share = torch.tensor([[reply.request.top_p] for reply in self.replies])
            self.sampling = (heat.to(self.device) if heat.any() else 0, share.to(self.device) if
                             (share < 1).any() else 1.0)
        heat, share = self.sampling
        tokens = draw(self.logits, heat, self.top_k, share, self.generator)
        for row, reply in enumerate(self.replies):
            if reply.generator:
                heat, share = reply.request.temperature, reply.request.top_p
                tokens[row] = draw(self.logits[row:row + 1], heat, self.top_k, share,
                                   reply.generator)
        return tokens

    @contextlib.contextmanager
    def _failing(self, replies):
        """An error of the device ends these texts, not the engine."""
        try:
            yield
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            print(f"{len(replies)} texts ended by {type(error).__name__}: {said}", file=sys.stderr,
                  flush=True)
            for reply in replies:
                reply.fail(error)
            if replies is self.replies:
                self.replies, self.logits = [], None
