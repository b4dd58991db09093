"""--size auto and --dollars: the best size for the length of a run, and the length that money buys.

lib/scaling.py predicts loss and speed. The shapes are those of --depth. Batch, learning rates and
schedule stay the preset's: all sizes in lib/scaling.json were trained with them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lib import doctor, scaling, startup
from lib.budget import batch_size, mean_context, tokens_of
from lib.cli import BadInput, launched
from lib.devices import device_name, memory_bytes, pick_device

AUTO = "auto"
DEEPEST = 48
MARGIN = 1.003       # the smallest size within this factor of the best loss is taken
BYTES_PER_PARAMETER = 16  # weights, gradients and two moments in fp32
MEMORY = 0.6         # share of the memory that these may take
START_UP = 31.0      # seconds, the longest up to 124M in benchmarks/cold_start_h200_202611.md
RESERVE = 0.03       # of the money, for what is not predicted exactly
FORWARD = 1 / 3      # of the time of a training step
HELLASWAG = 6e6      # tokens whose forward passes take as long (benchmarks/speed_h100_202611.md)
HIGHEST = 2.0        # bits per byte; a higher prediction is not shown
DOLLARS = (1, 3, 10, 30, 100)  # the rows of --plan


class Option(NamedTuple):
    """A size to choose from."""

    depth: int
    parameters: int  # active per token
    flops: int       # per token


class Prediction(NamedTuple):
    option: Option
    tokens: float
    loss: float   # bits per byte
    error: float
    epochs: float | None  # None: without data
    extrapolates: bool


class Speed(NamedTuple):
    """FLOP/s of all processes, lib/scaling.py's overhead included."""

    flops: float
    how: str
    start_up: float = START_UP  # seconds
    on_gpu: bool = True         # the overhead is a GPU's

    def of(self, option: Option) -> float:
        """Tokens per second."""
        return self.flops / with_overhead(option.flops, self.on_gpu)


def with_overhead(flops: int, on_gpu: bool) -> float:
    """FLOPs per token that take as long as the small matrices do. A CPU has no such overhead."""
    return flops + scaling.measured().overhead if on_gpu else flops


class Text(NamedTuple):
    """The training text. tokens: per epoch, None if unknown."""

    tokens: int | None
    vocab_size: int

    @property
    def bytes_per_token(self) -> float:
        """Of English text: 4.1 with 16,384 ids, 4.34 with GPT-2's 50,257 (race_h100_202611)."""
        return 4.1 + 0.21 * math.log(self.vocab_size / 16_384)

    def predict(self, option: Option, tokens: float) -> Prediction:
        law = scaling.measured()
        n_bytes = tokens * self.bytes_per_token
        different = (self.tokens or math.inf) * self.bytes_per_token
        loss, error = law.predict(option.parameters, n_bytes, different)
        epochs = tokens / self.tokens if self.tokens else None
        outside = law.extrapolates(option.parameters, n_bytes)
        return Prediction(option, tokens, loss, error, epochs, outside)


def pick(found: list[Prediction]) -> Prediction:
    """The smallest size within MARGIN of the lowest loss. found: from small to large."""
    limit = MARGIN * min(one.loss for one in found)
    return next(one for one in found if one.loss <= limit)


@dataclass
class Sizer:
    """Chooses for one run.

    build: shape -> GPT on the meta device, other settings being the run's. shape_of: that of a
    depth. corpus: None without data.
    """

    cfg: Any  # TrainConfig
    build: Callable[[dict], Any]
    shape_of: Callable[[int], dict]
    corpus: Any
    script: Path  # the training script

    def __post_init__(self):
        env = launched() or {"world_size": 1, "local_world_size": 1}
        self.processes = env["world_size"]
        self.nodes = self.processes / env["local_world_size"]
        self.model = self.build({})
        config = self.model.config
        self.context = int(mean_context(self.cfg, config.block_size))
        tokens = self.corpus.tokens["train"] if self.corpus else None
        self.text = Text(tokens, config.vocab_size)

    @functools.cached_property
    def device(self) -> torch.device:
        return pick_device(self.cfg.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def memory(self) -> float:
        """Bytes for one model's weights, gradients and moments."""
        shards = self.processes if self.cfg.parallel == "fsdp" else 1
        return MEMORY * shards * (memory_bytes(self.device) or math.inf)

    @property
    def val_tokens(self) -> int:
        """Tokens of a validation."""
        if not self.corpus:
            return self.cfg.val_tokens
        sizes = [source.shards.tokens["val"] for source in self.corpus.sources]
        return sum(min(size, self.cfg.val_tokens) for size in sizes)

    def own(self) -> Option:
        """The configured size."""
        _, active, flops = self._measures(self.model)
        return Option(self.model.config.n_layer, active, flops)

    def sizes(self, memory: float = math.inf) -> list[Option]:
        """The sizes of --depth that fit into `memory`, bytes."""
        found: list[Option] = []
        for depth in range(1, DEEPEST + 1):
            shape = self.shape_of(depth)
            one = self._measures(self.build(shape | {"n_layer": 1}))
            two = self._measures(self.build(shape | {"n_layer": 2}))
            # all are linear in the layers
            total, active, flops = (a + (depth - 1) * (b - a) for a, b in zip(one, two))
            if found and total * BYTES_PER_PARAMETER > memory:
                break
            found.append(Option(depth, active, flops))
        return found

    def _measures(self, model) -> tuple[int, int, int]:
        """(all parameters, those active per token, FLOPs per token)."""
        counts = model.parameter_counts()
        return counts["total"], counts["active"], model.flops_per_token(self.context)

    # -- speed --

    def speed(self, sizes: list[Option], seconds_at: Callable[[Speed], Callable]) -> Speed:
        """The speed: from --tok_per_sec, measured on a GPU, or assumed without one.

        seconds_at: a Speed -> the function from an Option to its seconds of training; with it, the
        size that is timed is about the one that will be chosen.
        """
        if self.cfg.tok_per_sec:
            flops = with_overhead(self.own().flops, self.on_gpu)
            return Speed(self.cfg.tok_per_sec * flops, "given by --tok_per_sec", on_gpu=self.on_gpu)
        if not self.on_gpu:
            flops = doctor.REACHED * doctor.matmul_flops(self.device) * self.processes
            how = f"assumed without a GPU: {doctor.REACHED:g} times that of matmuls"
            return Speed(flops, how, on_gpu=False)
        guess = reference_speed(self.processes)
        found = self.predict(sizes, guess, seconds_at(guess))
        return self._measure(pick(found).option if found else sizes[0])

    def _measure(self, option: Option) -> Speed:
        """Time ten steps, as --doctor does, on one node."""
        shape = {} if option == self.own() else self.shape_of(option.depth)
        machine = doctor.Machine(self.cfg, lambda vocab_size: self.build(shape), self.script,
                                 gpus=int(self.processes / self.nodes))
        machine.probed = {"flops": scaling.measured().speed}
        check = doctor.check_steps(machine)
        if not machine.speed:
            raise BadInput(f"--size auto and --dollars cannot measure the speed ({check.text}, "
                           f"{check.remedy}): fix it, or give --tok_per_sec")
        flops = with_overhead(machine.model.flops_per_token(), on_gpu=True)
        how = (f"measured in ten steps of {option.depth} layers, {self.processes} x "
               f"{device_name(self.device)}")
        return Speed(machine.speed * self.nodes * flops, how, machine.start_up)

    # -- predictions --

    def predict(self, sizes: list[Option], speed: Speed,
                seconds: Callable[[Option], float]) -> list[Prediction]:
        """What each size reaches, without those that have no time to train."""
        return [self.text.predict(option, seconds(option) * speed.of(option))
                for option in sizes if seconds(option) > 0]

    def bought(self, dollars: float, speed: Speed, elapsed: float) -> Callable[[Option], float]:
        """Option -> seconds of training steps that `dollars` buy besides start-up and evaluations,
        negative if they do not buy these. elapsed: seconds since the command."""
        cfg = self.cfg
        total = 3600 * dollars / cfg.price_per_hour * (1 - RESERVE) - elapsed - speed.start_up
        share = 0.0  # evaluations, as a share of the training steps
        last = 0.0   # tokens of those at the end
        evaluations = ((cfg.eval_every, self.val_tokens), (cfg.hellaswag_every, HELLASWAG))
        for every, tokens in evaluations:
            if every:
                share += FORWARD * tokens / (every * batch_size(every, cfg))
                last += FORWARD * tokens

        return lambda option: (total - last / speed.of(option)) / (1 + share)

    def choose(self, dollars: float | None, resize: bool) -> tuple[int | None, float | None]:
        """-> (depth, None: the configured size; minutes, None: the configured length). Prints why.
        """
        cfg = self.cfg
        sizes = self.sizes(self.memory) if resize else [self.own()]

        def seconds_at(speed):
            if dollars:
                return self.bought(dollars, speed, startup.elapsed())
            return lambda option: 60 * cfg.minutes

        if not dollars and cfg.max_steps:
            return self._choose_for_steps(sizes), None
        speed = self.speed(sizes, seconds_at)
        seconds = seconds_at(speed)
        found = self.predict(sizes, speed, seconds)
        if not found:
            raise BadInput(f"--dollars {dollars:g} at --price_per_hour {cfg.price_per_hour:g} buys "
                           "no more than start-up and evaluations: raise --dollars, --eval_every "
                           "or --hellaswag_every")
        chosen = pick(found)
        minutes = float(f"{seconds(chosen.option) / 60:.6g}")
        if resize:
            how = f"{minutes:,.4g} minutes at {speed.of(chosen.option):,.0f} tok/s, {speed.how}"
            print(explain(chosen, found, how), flush=True)
        if not dollars:
            return chosen.option.depth, None
        print(f"length  ${dollars:g} buys {minutes:,.4g} minutes of training besides start-up and "
              f"evaluations, at {speed.of(chosen.option):,.0f} tok/s, {speed.how}", flush=True)
        return chosen.option.depth if resize else None, minutes

    def _choose_for_steps(self, sizes: list[Option]) -> int:
        """The depth that is best for the time that its --max_steps take, on any machine."""
        tokens = tokens_of(self.cfg.max_steps, self.cfg)
        for option in sizes:
            flops = tokens * with_overhead(option.flops, self.on_gpu)
            compute = Speed(flops, "", on_gpu=self.on_gpu)  # trains `option` in one second
            found = self.predict(sizes, compute, lambda option: 1.0)
            if pick(found).option.depth <= option.depth:
                break
        chosen = self.text.predict(option, tokens)
        how = f"best for the time that its {self.cfg.max_steps:,} steps take"
        print(explain(chosen, found, how), flush=True)
        return option.depth


def reference_speed(processes: int = 1) -> Speed:
    law = scaling.measured()
    return Speed(law.speed * processes, f"assumed: {processes} x {law.card}, as in benchmarks/")


# --------------------------------------------------------------------------------------------------
# Text


def explain(chosen: Prediction, found: list[Prediction], how: str) -> str:
    """Three lines: what was chosen, against what, and what the prediction rests on.

    found: the predictions it was chosen from.
    """
    law = scaling.measured()
    option = chosen.option
    best = min(found, key=lambda one: one.loss)
    others = [one for one in found
              if abs(one.option.depth - option.depth) == 2 or one.option == best.option]
    compared = [f"--depth {one.option.depth} {one.loss / chosen.loss - 1:+.1%}"
                for one in others if one.option != option]
    if not compared:
        compared = ["none fits into memory"]
    outside = "; this run is outside this range" if chosen.extrapolates else ""
    return "\n".join([
        f"size    --depth {option.depth}, {millions(option)} parameters: {outcome(chosen)}",
        f"why     {how}; the smallest size within {MARGIN - 1:.1%} of the best loss; loss of other "
        f"sizes: {', '.join(compared)}",
        f"basis   runs of speedrun with {law.sizes[0] / 1e6:.0f}M to {law.sizes[1] / 1e6:.0f}M "
        f"parameters on {law.text[0] / 1e6:,.0f} MB to {law.text[1] / 1e9:.1f} GB of text{outside}"
        "; batch, rates and schedule are the preset's at every size",
    ])


def outcome(one: Prediction) -> str:
    epochs = "" if one.epochs is None else f" ({one.epochs:,.2f} epochs)"
    tokens = f"{one.tokens / 1e6:,.4g}M tokens{epochs}"
    if one.loss > HIGHEST:
        return f"{tokens}, too little text to predict the loss"
    return f"about {one.loss:.3f} ± {one.error:.3f} bits per byte after {tokens}"


def table(sizer: Sizer, measured: bool) -> str:
    """The rows of --plan: the choice for some dollars, and what half its size would cost.

    measured: time this machine's GPUs.
    """
    sizes = sizer.sizes()
    speed = reference_speed(sizer.processes)
    if measured:
        sizes = sizer.sizes(sizer.memory)
    if measured or sizer.cfg.tok_per_sec:
        speed = sizer.speed(sizes, lambda speed: sizer.bought(DOLLARS[1], speed, elapsed=0.0))
    lines = ["what dollars buy, start-up and evaluations included; losses are predicted for "
             f"--preset speedrun; speed {speed.how}",
             f"{'dollars':>7} {'training':>10} {'depth':>5} {'parameters':>11} {'tokens':>9} "
             f"{'epochs':>7} {'bits per byte':>15} {'half size: loss':>22}"]
    for dollars in DOLLARS:
        seconds = sizer.bought(dollars, speed, elapsed=0.0)
        found = sizer.predict(sizes, speed, seconds)
        if not found:
            lines.append(f"{dollars:7} no more than start-up and evaluations")
            continue
        chosen = pick(found)
        minutes = seconds(chosen.option) / 60
        lines.append(f"{dollars:7} {minutes:6,.0f} min {row(chosen, found)}")
    lines.append("~: outside of what was measured, an extrapolation; ±: standard error; half "
                 "size: about half the parameters, and its loss relative to the chosen one")
    return "\n".join(lines)


def row(chosen: Prediction, found: list[Prediction]) -> str:
    """The cells of a choice, and of about half its parameters."""
    option = chosen.option
    epochs = "" if chosen.epochs is None else f"{chosen.epochs:.2f}"
    mark = "~" if chosen.extrapolates else ""
    loss = f"{mark}{chosen.loss:.3f} ± {chosen.error:.3f}"

    def distance(one):
        return abs(2 * one.option.parameters / option.parameters - 1)

    half = min(found, key=distance)
    smaller = "none"
    if half.option != option:
        smaller = f"{millions(half.option)}: {half.loss / chosen.loss - 1:+.1%}"
    return (f"{option.depth:5} {millions(option):>11} {chosen.tokens / 1e6:8,.0f}M {epochs:>7} "
            f"{loss:>15} {smaller:>22}")


def millions(option: Option) -> str:
    return f"{option.parameters / 1e6:,.1f}M"
