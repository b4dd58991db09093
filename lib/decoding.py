"""Text generation: the KV cache, the decoding step, sampling, and the loop over tokens.

    decoder = Decoder(model, rows=2, length=64)                     # inside autocast, if any
    for tokens in generate(decoder, [[5, 6, 7], [8]], 32, choose):  # one token per text and step
        ...

Texts of different lengths share a batch. Each row of the cache starts at position 0, is padded on
the right, and attends only to its own tokens.
"""

import codecs
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.attention import FlashFirst, MaskedFirst, attention, flash_fits
from lib.cli import BadInput, flag
from lib.devices import any_shape, autocast, cast, is_sharded, to_host
from lib.moe import is_capturable
from lib.parallel import from_rank_0
from lib.tokenizers import END, Tokenizer

# A masked decoding step attends to a multiple of SPAN positions. Few distinct shapes mean few CUDA
# graphs to capture.
SPAN = 128

Choose = Callable[[torch.Tensor], torch.Tensor]  # logits (rows, vocab_size) -> tokens (rows,)


class NonFinite(BadInput):
    """The model's logits are NaN or infinite, so it can neither generate nor be evaluated."""

    def __init__(self):
        super().__init__("the model's logits are NaN or infinite: the weights are damaged or the "
                         "run diverged; name an earlier checkpoint")


@dataclass
class SampleConfig:
    samples: int = flag(4, "texts to generate per prompt", at_least=1, at_most=4096)
    max_new_tokens: int = flag(
        32, "new tokens per text, after the prompt", at_least=1, at_most=1_000_000)
    temperature: float = flag(
        1.0, "sampling temperature; 0: greedy, always the likeliest token", at_least=0, at_most=100)
    top_k: int = flag(50, "sample from the k likeliest tokens; 0: from all", at_least=0)
    top_p: float = flag(
        1.0, "sample from the likeliest tokens that together have this probability; 1: from all",
        above=0, at_most=1)
    stop: tuple[str, ...] | None = flag(
        None, "strings that end a text; they are not part of the output")
    seed: int = flag(42, "random seed for sampling", at_least=0, below=2**63)


# Samples printed during training: long enough to judge, and a little below temperature 1, at which
# small models ramble.
SHOWN = SampleConfig(samples=1, max_new_tokens=120, temperature=0.8)

# --------------------------------------------------------------------------------------------------
# The KV cache


class KVCache:
    """Keys and values of `rows` texts with room for `length` tokens each, so that a new token costs
    one position instead of the whole text (Pope et al. 2022, https://arxiv.org/abs/2211.05102,
    section 2).

    An AttentionContext (lib/attention.py). Before each forward pass, `at` sets which rows the pass
    continues, and where.
    """

    def __init__(self, rows: int, length: int):
        self.rows = rows
        self.length = length
        self.tensors: dict = {}  # layer -> (keys, values), (rows, length, H, D) each
        self.last: dict = {}     # layer -> the input of the newest token, (rows, C)

    def at(self, rows: torch.Tensor, positions: torch.Tensor, ends: torch.Tensor,
           attend_cache: Callable | None = None) -> "KVCache":
        """Set up the next forward pass over n texts of T new tokens each, and return self.

        rows: int64 (n,), the rows of the cache. positions: int64 (n, T), of the new tokens. ends:
        int64 (n,), the column of each text's last new token. attend_cache: MaskedFirst or
        FlashFirst, attention of one new token per row to the first n rows of the cache; None: the
        texts start here, and the new tokens attend to each other only.
        """
        self.order = rows
        self.positions = positions
        self.ends = ends
        self.attend_cache = attend_cache
        return self

    def attend(self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               dropout: float = 0.0) -> torch.Tensor:
        """Store the new keys and values of a layer and attend, (n, T, H, D) each. No dropout."""
        k = cast(k)  # as attention does
        v = cast(v)
        if layer not in self.tensors:
            self.tensors[layer] = (self.empty_like(k), self.empty_like(v))
        keys, values = self.tensors[layer]
        keys[self.order[:, None], self.positions] = k
        values[self.order[:, None], self.positions] = v
        if self.attend_cache is None:
            return attention(q, k, v)
        n = len(q)
        return self.attend_cache(q, keys[:n], values[:n])

    def empty_like(self, new: torch.Tensor) -> torch.Tensor:
        """Zeros for the whole cache, with the head shape and dtype of `new` (n, T, H, D)."""
        return new.new_zeros(self.rows, self.length, *new.shape[2:])

    def previous(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The previous token's vector for each of the new tokens x (n, T, C), also (n, T, C); zeros
        before the first token of a text."""
        if layer not in self.last:
            self.last[layer] = x.new_zeros(self.rows, x.size(2))
        last = self.last[layer]
        if self.attend_cache is None:
            before = torch.zeros_like(x[:, :1])
        else:
            before = last[self.order, None]
        last[self.order] = x[torch.arange(len(x), device=x.device), self.ends]
        return torch.cat((before, x[:, :-1]), dim=1)

    def move(self, row: int, to: int) -> None:
        """Copy the text in `row` to row `to`."""
        for keys, values in self.tensors.values():
            keys[to] = keys[row]
            values[to] = values[row]
        for last in self.last.values():
            last[to] = last[row]


# --------------------------------------------------------------------------------------------------
# The decoding step


class SeparateBias(nn.Linear):
    """A linear layer that adds its bias after the product. Inductor turns a product of one row into
    a fused sum (see Decoder), but not a product with a bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.bias


def cast_weights(model: Any, separate_bias: bool = False) -> Any:
    """A copy of the model for decoding, with the matmul weights cast once to the autocast dtype;
    all other parameters are shared. Without autocast, or sharded, the model itself.

    Autocast would cast these weights in every step, which triples the memory traffic. Logits are
    equal bit for bit: norms and embeddings keep their dtype. separate_bias: use SeparateBias, which
    rounds differently.
    """
    if is_sharded(model) or not torch.is_autocast_enabled(next(model.parameters()).device.type):
        return model  # weights that FSDP gathers in each pass cannot be cast once
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    for module in model.modules():
        is_linear = type(module) is nn.Linear  # subclasses set their own dtype (the MoE router)
        for name, p in module.named_parameters(recurse=False):
            is_expert = p.dim() > 2
            if is_linear or is_expert:
                setattr(module, name, nn.Parameter(cast(p.detach()), requires_grad=False))
        if separate_bias and is_linear and module.bias is not None:
            module.__class__ = SeparateBias
    return model


class Decoder:
    """Continues `rows` texts in one batch, each up to `length` tokens or the model's block_size.

    `fill` starts texts in some rows at any time. `step` adds one token to every row, or to the
    first n; rows without a text are computed and ignored. `move` moves a text to another row. The
    caller sets eval mode and autocast, for the constructor too.

    graphs: on cuda, replay the step as a CUDA graph, since launching its hundreds of small kernels
    takes longer than running them. One graph is captured per power of two of rows and, with masked
    attention, per SPAN positions. Ignored for experts that cannot be captured (lib/moe.py,
    `is_capturable`). compile: also fuse the kernels with torch.compile, which delays the first
    step.
    """

    def __init__(self, model: Any, rows: int, length: int, graphs: bool = False,
                 compile: bool = False):
        device = next(model.parameters()).device
        on_cuda = device.type == "cuda"
        config = model.config
        # For a single row, inductor's tuning turns products into sums fused with their neighbors.
        fuse_products = compile and rows == 1 and on_cuda
        self.model = cast_weights(model, separate_bias=fuse_products)
        self.length = min(length, config.block_size)
        self.cache = KVCache(rows, round_up(self.length, SPAN))
        self.lengths = [0] * rows  # tokens per text, known without a GPU sync
        self.every = torch.arange(rows, device=device)
        self.token = torch.zeros_like(self.every)     # (rows,), inputs of the step
        self.position = torch.zeros_like(self.every)
        self.compute = self._step
        self.compiled = compile
        if compile:
            options: Any = {"coordinate_descent_tuning": True} if fuse_products else None
            self.compute = torch.compile(self._step, dynamic=False, options=options)
        self.captures = graphs and on_cuda and is_capturable(self.model, device)
        self.graphs: dict = {}  # (rows, span) -> (CUDA graph, its logits)
        # Flash attention launches several kernels, which only pays off inside a graph.
        fused_launch = self.captures or compile
        self.flash = fused_launch and flash_fits(device, config.n_embd // config.n_head)

    @torch.no_grad()
    def fill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Start new texts in `rows` with `prompts`, lists of 1 to `length` ids (prefill).

        Returns the logits after each prompt, fp32 (n, vocab_size).
        """
        device = self.token.device
        lengths = torch.tensor([len(ids) for ids in prompts])
        # padded on the right, where a causal model does not look
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, ids in zip(tokens, prompts, strict=True):
            row[:len(ids)] = torch.tensor(ids)
        tokens = tokens.to(device)
        lengths = lengths.to(device)
        order = torch.tensor(rows, device=device)
        positions = torch.arange(tokens.size(1), device=device).expand_as(tokens)
        ends = lengths - 1
        cache = self.cache.at(order, positions, ends)
        with any_shape():
            logits = self.model(tokens, kv_cache=cache, logits_at=(self.every[:len(rows)], ends))
        self.position[order] = lengths.clamp(max=self.length - 1)
        for row, ids in zip(rows, prompts, strict=True):
            self.lengths[row] = len(ids)
        return logits

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each text, int64 (rows,).

        Returns the logits after them, fp32 (rows, vocab_size), valid until the next step. With
        fewer tokens, (n,), only the first n rows take part; the other rows must then be free. A
        text that is `full` has no room for another token: restart it with `fill`.
        """
        n = len(tokens)
        self.token[:n].copy_(tokens)
        rows = self._padded_rows(n)
        span = self._span(n)
        with any_shape():
            if self.captures:
                if (rows, span) not in self.graphs:
                    self.graphs[rows, span] = self._capture(rows, span)
                graph, logits = self.graphs[rows, span]
                graph.replay()
            else:
                logits = self.compute(rows, span)
        self.lengths[:n] = [min(length + 1, self.length) for length in self.lengths[:n]]
        return logits[:n]

    @torch.no_grad()
    def move(self, row: int, to: int) -> None:
        """Move the text in `row` to row `to`, overwriting the text there."""
        self.cache.move(row, to)
        self.position[to] = self.position[row]
        self.lengths[to] = self.lengths[row]

    @property
    def full(self) -> list[int]:
        """The rows whose texts fill the model's context."""
        return [row for row, n in enumerate(self.lengths) if n == self.model.config.block_size]

    def _padded_rows(self, n):
        """Rows to compute for n texts: a power of two if each row count must be compiled or
        captured."""
        if not (self.compiled or self.captures):
            return n
        return min(1 << (n - 1).bit_length(), self.cache.rows)

    def _span(self, n):
        """Positions of the cache to attend to, for the first n texts."""
        if self.compiled or self.flash:
            return self.cache.length
        needed = min(max(self.lengths[:n]) + 1, self.length)
        return round_up(needed, SPAN)

    def _step(self, rows, span):
        """The computation of a step. Reads `token` and `position`, and advances `position`; rows
        and span determine all shapes."""
        every = self.every[:rows]
        token = self.token[:rows]
        position = self.position[:rows]
        attend_first = FlashFirst if self.flash else MaskedFirst
        ends = torch.zeros_like(every)
        cache = self.cache.at(every, position[:, None], ends, attend_first(position + 1, span))
        logits = self.model(token[:, None], kv_cache=cache, logits_at=(slice(None), -1))
        position.add_(1).clamp_(max=self.length - 1)
        return logits

    def _capture(self, rows, span):
        """Capture the step -> (CUDA graph, the tensor that each replay writes its logits to).

        Leaves the state of all texts unchanged.
        """
        state = (self.position, *self.cache.last.values())
        before = [tensor.clone() for tensor in state]
        # Warm up on a side stream: compilation and one-time set-up must not be captured.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.compute(rows, span)
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(side)
        pool = None  # all graphs share the memory of the first
        if self.graphs:
            first, _ = next(iter(self.graphs.values()))
            pool = first.pool()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may use the GPU during the capture
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self.compute(rows, span)
        return graph, logits


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# --------------------------------------------------------------------------------------------------
# Sampling


def draw(logits: torch.Tensor, temperature: float | torch.Tensor, top_k: int = 0,
         top_p: float | torch.Tensor = 1.0,
         generator: torch.Generator | None = None) -> torch.Tensor:
    """Sample from softmax(logits / temperature): logits, fp32 (B, V) -> indices, int64 (B,).

    Samples from the top_k likeliest (0: all), and among these from the nucleus of probability top_p
    (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751). temperature and top_p are numbers, or
    (B, 1) with one per row. Uses the Gumbel-max trick: the argmax of logits + temperature x Gumbel
    noise, which is greedy at temperature 0. Where logits are not finite, the index is arbitrary.
    """
    if isinstance(temperature, (int, float)) and temperature == 0:
        return logits.argmax(dim=-1)
    nucleus = isinstance(top_p, torch.Tensor) or top_p < 1
    indices = None
    if top_k or nucleus:
        vocab_size = logits.size(-1)
        logits, indices = logits.topk(min(top_k or vocab_size, vocab_size))  # sorted
    if nucleus:
        logits = cut_nucleus(logits, temperature, top_p)
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30).log_()
    drawn = (logits - temperature * noise).argmax(dim=-1, keepdim=True)
    if indices is not None:
        drawn = indices.gather(-1, drawn)
    return drawn.squeeze(-1)


def cut_nucleus(logits: torch.Tensor, temperature: float | torch.Tensor,
                top_p: float | torch.Tensor) -> torch.Tensor:
    """Set sorted logits to -inf where the likelier ones together already have probability top_p."""
    # Dividing by less than 1e-6 would overflow. A number stays a number: copying it to the GPU
    # would wait for the running step.
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.clamp(min=1e-6)
    else:
        temperature = max(temperature, 1e-6)
    probs = F.softmax((logits - logits[:, :1]) / temperature, dim=-1)
    likelier = probs.cumsum(dim=-1) - probs
    return logits.masked_fill(likelier >= top_p, -torch.inf)


# --------------------------------------------------------------------------------------------------
# The loop over tokens


@torch.no_grad()
def generate(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int,
             choose: Choose) -> Iterator[list[int]]:
    """Continue `prompts`, one list of token ids per row of the decoder. Yields the new token of
    every row, step by step.

    choose: logits, fp32 (rows, vocab_size) -> the next tokens, int64 (rows,). A token of -1 means
    that the logits of its row were not finite. A prompt longer than the context keeps its newest
    tokens. When a text fills the context, its older half is dropped and the rest is prefilled again
    from position 0: one pass over half a context per half a context of new tokens. On a GPU, step n
    runs while the caller handles token n.
    """
    texts = [list(ids) for ids in prompts]
    logits = decoder.fill(range(len(texts)), [ids[-decoder.length:] for ids in texts])
    for left in range(max_new_tokens, 0, -1):
        tokens = choose(logits)
        full = decoder.full
        finite = logits.sum(dim=-1).isfinite()
        arrived = to_host(torch.where(finite, tokens, -1))
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
    """Decodes a text token by token, up to one of the tokens `ends` (default: end-of-text and the
    end of a chat turn), one of the strings `stop`, or `limit` tokens.

    text: the text so far, without the end token or stop string. ended: None, "stop" or "length".
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, stop: Sequence[str] = (),
                 ends: Iterable[int] | None = None):
        self.tokenizer = tokenizer
        self.limit = limit
        self.stop = [string for string in stop if string]
        if ends is None:
            ends = [tokenizer.eot]
            if END in tokenizer.reserved:  # not of ids that are not text
                ends.append(tokenizer.reserved[END])
        self.ends = set(ends)
        # incremental, since a token may end inside a character
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self.held = ""  # decoded, but possibly the start of a stop string
        self.count = 0
        self.ended: str | None = None

    def add(self, token: int) -> str:
        """Append a token -> the new piece of text; "" once the text has ended, or while a stop
        string may have started."""
        if self.ended:
            return ""
        self.count += 1
        if token in self.ends:
            self.ended = "stop"
            encoded = b""
        else:
            encoded = self.tokenizer.token(token)
            if self.count == self.limit:
                self.ended = "length"
        self.held += self.decoder.decode(encoded, final=self.ended is not None)
        n = self.certain()
        piece = self.held[:n]
        self.held = self.held[n:]
        self.text += piece
        return piece

    def certain(self) -> int:
        """Number of held characters that certainly belong to the text; ends it at a stop string."""
        found = [self.held.find(string) for string in self.stop]
        found = [start for start in found if start >= 0]
        if found:
            self.ended = "stop"
            return min(found)
        if self.ended:
            return len(self.held)
        return len(self.held) - self.started()

    def started(self) -> int:
        """Number of characters at the end of `held` that may be the start of a stop string."""
        longest = 0
        for string in self.stop:
            for n in range(1, len(string)):
                if self.held.endswith(string[:n]):
                    longest = max(longest, n)
        return longest


def sample(model: Any, tokenizer: Tokenizer, prompts: Sequence[str], cfg: SampleConfig,
           show: Callable[[str], object] = lambda piece: None, **options) -> list[str]:
    """Continue each prompt cfg.samples times -> the texts, prompts included.

    An empty prompt starts a new document. show: called with each piece of the first text as it is
    generated, the prompt first. options: graphs and compile of Decoder.
    """
    prompts = [prompt for prompt in prompts for _ in range(cfg.samples)]
    ids = [tokenizer.encode(prompt).tolist() or [tokenizer.eot] for prompt in prompts]
    if not tokenizer.is_text:
        prompts = [tokenizer.decode(row) for row in ids]
    show(prompts[0])
    texts = continuations(model, tokenizer, ids, cfg, show, **options)
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def continuations(model: Any, tokenizer: Tokenizer, ids: Sequence[Sequence[int]], cfg: SampleConfig,
                  show: Callable[[str], object] = lambda piece: None, **options) -> list[str]:
    """Continue each list of ids -> the new texts.

    Seeded by cfg.seed; all other random state is left alone. Every process generates the same texts
    in the same number of forward passes. Raises NonFinite.
    """
    was_training = model.training
    device = next(model.parameters()).device
    texts = [Text(tokenizer, cfg.max_new_tokens, cfg.stop or ()) for _ in ids]
    generator = torch.Generator(device=device).manual_seed(cfg.seed)
    choose: Choose = partial(draw, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                     generator=generator)
    if is_sharded(model):
        choose = from_rank_0(choose)
    length = max(map(len, ids)) + cfg.max_new_tokens
    model.eval()
    try:
        with autocast(model):
            decoder = Decoder(model, len(ids), length, **options)
            for tokens in generate(decoder, ids, cfg.max_new_tokens, choose):
                if -1 in tokens:
                    raise NonFinite
                pieces = [text.add(token) for text, token in zip(texts, tokens, strict=True)]
                show(pieces[0])
                if all(text.ended for text in texts):
                    break
    finally:
        model.train(was_training)
    return [text.text for text in texts]
