"""Generating text with a model: the cache of keys and values, the decoding step, sampling, and the
loop over tokens.

    decoder = Decoder(model, rows=2, length=64)                     # under autocast, if at all
    for tokens in generate(decoder, [[5, 6, 7], [8]], 32, choose):  # a token per text and step
        ...

Texts of different lengths stand side by side: every row of the cache begins at its own position 0,
is padded on the right, and sees no further than its own length.
"""

import codecs
import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.attention import FlashFirst, MaskedFirst, attention, flash_fits
from lib.cli import BadInput, flag
from lib.devices import any_shape, autocast, cast, to_host
from lib.moe import is_capturable
from lib.tokenizers import END

# a masked decoding step attends to a multiple of so many positions: few shapes, so that few CUDA
# graphs are captured
SPAN = 128


class NonFinite(BadInput):
    """A model whose logits are NaN or infinite: there is nothing to generate or evaluate."""

    def __init__(self):
        super().__init__("the model's logits are NaN or infinite: its weights are damaged or the run diverged; name an "
                         "earlier checkpoint")


@dataclass
class SampleConfig:
    samples: int = flag(4, "texts to generate per prompt", at_least=1, at_most=4096)
    max_new_tokens: int = flag(32, "tokens per text, beyond the prompt", at_least=1,
                               at_most=1_000_000)
    temperature: float = flag(1.0, "below 1 safer, above 1 wilder, 0 always the likeliest token",
                              at_least=0, at_most=100)
    top_k: int = flag(50, "sample from the k likeliest tokens; 0: from all", at_least=0)
    top_p: float = flag(
        1.0, "sample from the likeliest tokens that together have this probability; 1: from all",
        above=0, at_most=1)
    stop: tuple[str, ...] | None = flag(None, "strings that end a text and are not part of it")
    seed: int = flag(42, "seed of the samples", at_least=0, below=2**63)


# what a run shows of its model: long enough to judge, and without a small model's wildest words
SHOWN = SampleConfig(samples=1, max_new_tokens=120, temperature=0.8)


# ----------------------------------------------------------------------------------------------------------------------
# The decoding step


class KVCache:
    """Keys and values of `rows` texts, room for `length` tokens each, so that a new token costs one
    position, not all (Pope et al. 2022, https://arxiv.org/abs/2211.05102, section 2).

    Before a forward pass, `at` says which rows it continues and where. Layers ask for what they
    need: `attend`, `previous`.
    """

    def __init__(self, rows, length):
        self.rows, self.length = rows, length
        self.tensors, self.last = {}, {}  # by layer: (B, length, H, D); (B, C)

    def at(self, rows, positions, ends, seen=None):
        """rows: int64 (n,). positions: int64 (n, T), those of the tokens to come. ends: int64 (n,),
        the column of each row's last one. seen: how one token per row attends to the cache's first
        n rows, as lib/attention.py has it; None: they begin a text, and see each other alone."""
        self.order, self.positions, self.ends, self.seen = rows, positions, ends, seen
        return self

    def attend(self, layer, q, k, v, dropout=0.0):
        """A layer's attention, of new tokens to those kept and to themselves, (n, T, H, D) each.
        Nothing is dropped out."""
        k, v = cast(k), cast(v)  # as attention does
        if layer not in self.tensors:
            self.tensors[layer] = tuple(
                new.new_zeros(self.rows, self.length, *new.shape[2:]) for new in (k, v))
        for kept, new in zip(self.tensors[layer], (k, v)):
            kept[self.order[:, None], self.positions] = new
        if self.seen is None:
            return attention(q, k, v)
        return self.seen(q, *(kept[:len(q)] for kept in self.tensors[layer]))

    def previous(self, layer, x):
        """What stands before each of the new tokens x (n, T, C) of a layer: (n, T, C),
        zeros before the first token of a text."""
        if layer not in self.last:
            self.last[layer] = x.new_zeros(self.rows, x.size(2))
        before = torch.zeros_like(x[:, :1]) if self.seen is None else self.last[layer][self.order,
                                                                                       None]
        self.last[layer][self.order] = x[torch.arange(len(x), device=x.device), self.ends]
        return torch.cat((before, x[:, :-1]), dim=1)


class BiasApart(nn.Linear):
    """Adds its bias apart: inductor turns a bare product of one row into sums (see Decoder), not
    one with a bias."""

    def forward(self, x):
        return F.linear(x, self.weight) + self.bias


def cast_weights(model, bias_apart=False):
    """The model for decoding: a copy that shares all parameters but those of matmuls,
    which are cast once to the autocast dtype.

    Autocast would cast them in every step, which reads twice and writes half of what the step
    itself has to read. The logits are the same, bit for bit: norms and embeddings stay as they are.
    Without autocast, the model itself. bias_apart: see BiasApart; then the logits differ in
    rounding.
    """
    if not torch.is_autocast_enabled(next(model.parameters()).device.type):
        return model
    model = copy.deepcopy(
        model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if type(module) is nn.Linear or p.dim(
            ) > 2:  # a subclass has a dtype of its own, as a router of experts has
                setattr(module, name, nn.Parameter(cast(p.detach()), requires_grad=False))
        if bias_apart and type(module) is nn.Linear and module.bias is not None:
            module.__class__ = BiasApart
    return model


class Decoder:
    """A model that continues `rows` texts side by side, each of its own length, up to `length`
    tokens or the model's window.

    `fill` begins texts in some rows, at any time; `step` adds a token to every row (a row without a
    text takes part, in vain) or to the first ones; `move` has a text go on in another row. The
    caller sets eval mode and autocast, for making it, too. graphs: on cuda, capture the step as a
    CUDA graph, once per power of two of rows, and per SPAN positions where it attends by a mask: a
    step is hundreds of small kernels, whose launches take longer than they do; not of experts where
    lib/moe.py's `is_capturable` says no. compile: also have torch.compile fuse them, which takes
    time before the first step.
    """

    def __init__(self, model, rows, length, graphs=False, compile=False):
        device = next(model.parameters()).device
        # of one row, inductor turns products into sums that fuse with their neighbors, if it tunes
        # them
        alone = compile and rows == 1 and device.type == "cuda"
        self.model, self.length = cast_weights(model,
                                               bias_apart=alone), min(length,
                                                                      model.config.block_size)
        self.cache = KVCache(rows, -(-self.length // SPAN) * SPAN)
        self.lengths = [0] * rows  # of the texts, known without asking the GPU
        self.every = torch.arange(rows, device=device)
        self.token, self.position = torch.zeros_like(self.every), torch.zeros_like(
            self.every)  # (rows,), what the step reads
        tuning = {"coordinate_descent_tuning": True} if alone else None
        self.compiled = torch.compile(self._step, dynamic=False,
                                      options=tuning) if compile else None
        graphs = graphs and device.type == "cuda" and is_capturable(self.model, device)
        self.graphs = {} if graphs else None  # (rows, span) -> (graph, its logits)
        # launched one by one, what flash attention needs takes longer than what it saves
        self.flash = bool(graphs or compile) and flash_fits(
            device, model.config.n_embd // model.config.n_head)

    @torch.no_grad()
    def fill(self, rows, prompts):
        """Begin texts anew in `rows` (list of n int) with `prompts`, lists of 1 to `length` ids ->
        the logits behind them, fp32 (n, vocab_size)."""
        lengths = torch.tensor([len(ids) for ids in prompts])
        tokens = torch.zeros(len(prompts), int(lengths.max()),
                             dtype=torch.long)  # padded on the right, where nobody looks
        for row, ids in zip(tokens, prompts, strict=True):
            row[:len(ids)] = torch.tensor(ids)
        device = self.token.device
        at, lengths, tokens = torch.tensor(rows,
                                           device=device), lengths.to(device), tokens.to(device)
        cache = self.cache.at(at,
                              torch.arange(tokens.size(1), device=device).expand_as(tokens),
                              lengths - 1)
        with any_shape():
            logits = self.model(tokens, kv_cache=cache,
                                logits_at=(self.every[:len(rows)], lengths - 1))
        self.position[at] = lengths.clamp(max=self.length - 1)
        for row, ids in zip(rows, prompts, strict=True):
            self.lengths[row] = len(ids)
        return logits

    @torch.no_grad()
    def step(self, tokens):
        """One more token per row, int64 (rows,) -> the logits behind them, fp32 (rows, vocab_size),
        valid until the next step.

        Fewer tokens, int64 (n,): the first n rows alone, where no other holds a text. A text that
        is `full` has no place for another token: begin it anew by `fill`.
        """
        n = len(tokens)
        self.token[:n].copy_(tokens)
        needed = min(max(self.lengths[:n]) + 1, self.length)
        span = self.cache.length if self.compiled or self.flash else -(-needed // SPAN) * SPAN
        # what is captured or compiled is so for powers of two
        rows = min(1 << (n - 1).bit_length(),
                   self.cache.rows) if self.compiled or self.graphs is not None else n
        with any_shape():
            if self.graphs is None:
                logits = (self.compiled or self._step)(rows, span)
            else:
                if (rows, span) not in self.graphs:
                    self.graphs[rows, span] = self._capture(rows, span)
                graph, logits = self.graphs[rows, span]
                graph.replay()
        self.lengths[:n] = [min(length + 1, self.length) for length in self.lengths[:n]]
        return logits[:n]

    @torch.no_grad()
    def move(self, row, to):
        """Have the text in `row` go on in row `to`, whose own is lost."""
        for tensor in (self.position, *self.cache.last.values(),
                       *(kept for pair in self.cache.tensors.values() for kept in pair)):
            tensor[to] = tensor[row]
        self.lengths[to] = self.lengths[row]

    @property
    def full(self):
        """The rows whose texts fill the window."""
        return [row for row, n in enumerate(self.lengths) if n == self.model.config.block_size]

    def _step(self, rows, span):
        """The step's computation: reads and advances `position`, reads `token`; all its shapes
        follow from rows and span."""
        every, token, position = self.every[:rows], self.token[:rows], self.position[:rows]
        seen = (FlashFirst if self.flash else MaskedFirst)(position + 1, span)
        cache = self.cache.at(every, position[:, None], torch.zeros_like(every), seen)
        logits = self.model(token[:, None], kv_cache=cache, logits_at=(slice(None), -1))
        position.add_(1).clamp_(max=self.length - 1)
        return logits

    def _capture(self, rows, span):
        """-> (CUDA graph of the step, the tensor in which each replay leaves its logits). Advances
        nothing."""
        compute, advanced = self.compiled or self._step, (self.position, *self.cache.last.values())
        before, side = [tensor.clone() for tensor in advanced], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
                side):  # what a first run sets up, and the compiler, must not be captured
            for _ in range(2):
                compute(rows, span)
                for tensor, value in zip(advanced, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(side)
        graph, pool = torch.cuda.CUDAGraph(), next(
            (graph.pool() for graph, _ in self.graphs.values()), None)
        with torch.cuda.graph(
                graph, pool=pool,
                capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
            logits = compute(rows, span)
        return graph, logits


def draw(logits, temperature, top_k=0, top_p=1.0, generator=None):
    """Logits, fp32 (B, n) -> indices sampled from softmax(logits / temperature), int64 (B,).

    Of the top_k likeliest (0: all), and of these the likeliest that together have probability top_p
    (nucleus sampling, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751). temperature and
    top_p: numbers, or (B, 1) with one per row. Drawn by the largest of logits + temperature x
    Gumbel noise, which at temperature 0 is the largest logit. Any index where logits are not
    finite.
    """
    if isinstance(temperature, (int, float)) and temperature == 0:
        return logits.argmax(dim=-1)
    choices, nucleus = None, not isinstance(top_p, float) or top_p < 1
    if top_k or nucleus:
        logits, choices = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # sorted
    if nucleus:
        # a number stays one: copied to a GPU, it would wait for the step under way
        numbers = isinstance(temperature, (int, float))
        heat = max(temperature, 1e-6) if numbers else temperature.clamp(
            min=1e-6)  # dividing by less overflows
        probs = F.softmax((logits - logits[:, :1]) / heat, dim=-1)
        logits = logits.masked_fill(probs.cumsum(dim=-1) - probs >= top_p,
                                    -torch.inf)  # those before it suffice
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30).log_()
    drawn = (logits - temperature * noise).argmax(dim=-1, keepdim=True)
    return (drawn if choices is None else choices.gather(-1, drawn)).squeeze(-1)


# ----------------------------------------------------------------------------------------------------------------------
# The loop over tokens


@torch.no_grad()
def generate(decoder, prompts, max_new_tokens, choose):
    """Continue `prompts`, as many lists of token ids as the decoder has rows: yields each step's
    tokens, a list of int per step.

    choose: logits, fp32 (rows, vocab_size) -> the next tokens, int64 (rows,). A token of -1: its
    row's logits were not finite. Of a prompt longer than the window the newest part counts. When a
    text fills the window, its oldest half is dropped and the rest begins anew at position 0: a pass
    over half a window, once per half a window of tokens. On a GPU, step n runs while the caller
    looks at token n, so one step more is computed than is asked for.
    """
    texts = [list(ids) for ids in prompts]
    logits = decoder.fill(range(len(texts)), [ids[-decoder.length:] for ids in texts])
    for left in range(max_new_tokens, 0, -1):
        tokens, full = choose(logits), decoder.full
        arrived = to_host(torch.where(logits.sum(dim=-1).isfinite(), tokens, -1))
        if left > 1:
            logits = decoder.step(tokens)
        new = arrived()
        for ids, token in zip(texts, new, strict=True):
            ids.append(token)
        yield new
        if full and left > 1:
            keep = max(decoder.length // 2, 1)
            logits[full] = decoder.fill(full, [texts[row][-keep:] for row in full])


class Text:
    """A text as its tokens come in, to the first of `ends` (ids; by default end-of-text and the end
    of a turn), one of the strings `stop`, or `limit` tokens.

    text: what has come so far, without what ended it. ended: None, "stop", or "length".
    """

    def __init__(self, tokenizer, limit, stop=(), ends=None):
        self.tokenizer, self.limit, self.stop = tokenizer, limit, [
            string for string in stop if string
        ]
        self.ends = {tokenizer.eot, tokenizer.reserved[END]} if ends is None else set(ends)
        self.decoder = codecs.getincrementaldecoder("utf-8")(
            "replace")  # a token may end within a character
        self.text, self.held, self.count, self.ended = "", "", 0, None

    def add(self, token):
        """One more token -> the text that is certain by now; "" if the text has ended or a stop
        string may have begun."""
        if self.ended:
            return ""
        self.count += 1
        self.ended = "stop" if token in self.ends else "length" if self.count == self.limit else None
        piece = b"" if token in self.ends else self.tokenizer.token(token)
        self.held += self.decoder.decode(piece, final=bool(self.ended))
        certain = len(self.held)
        if found := [at for string in self.stop if (at := self.held.find(string)) >= 0]:
            self.ended, certain = "stop", min(found)
        elif not self.ended:
            certain -= max(
                (n for string in self.stop
                 for n in range(1, min(len(string),
                                       len(self.held) + 1)) if self.held.endswith(string[:n])),
                default=0)
        piece, self.held = self.held[:certain], self.held[certain:]
        self.text += piece
        return piece


def sample(model, tokenizer, prompts, cfg, show=lambda piece: None, **how):
    """Continue each of the prompts (str; empty: a document of its own) cfg.samples times -> list of
    str, prompts included.

    show: called with the pieces of the first text as they come, the prompt first. how: graphs and
    compile, of Decoder.
    """
    prompts = [prompt for prompt in prompts for _ in range(cfg.samples)]
    show(prompts[0])
    ids = [tokenizer.encode(prompt).tolist() or [tokenizer.eot] for prompt in prompts]
    return [
        prompt + text for prompt, text in zip(
            prompts, continuations(model, tokenizer, ids, cfg, show, **how), strict=True)
    ]


def continuations(model, tokenizer, ids, cfg, show=lambda piece: None, **how):
    """What follows each of the lists of ids, as a list of str. Seeded; leaves all other random
    state alone. Of several processes each generates the same texts, in the same number of forward
    passes. Raises NonFinite."""
    training, device = model.training, next(model.parameters()).device
    texts = [Text(tokenizer, cfg.max_new_tokens, cfg.stop or ()) for _ in ids]
    choose = partial(draw, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                     generator=torch.Generator(device=device).manual_seed(cfg.seed))
    model.eval()
    try:
        with autocast(device):
            decoder = Decoder(model, len(ids), max(map(len, ids)) + cfg.max_new_tokens, **how)
            for tokens in generate(decoder, ids, cfg.max_new_tokens, choose):
                if -1 in tokens:
                    raise NonFinite
                pieces = [text.add(token) for text, token in zip(texts, tokens, strict=True)]
                show(pieces[0])
                if all(text.ended for text in texts):
                    break
    finally:
        model.train(training)
    return [text.text for text in texts]
