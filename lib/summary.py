"""The summary at the end of a run: its result, its loss curve, and commands to try next."""

import contextlib
import datetime
import logging
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from lib.budget import UNMEASURED
from lib.decoding import SHOWN

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#@"  # for a console without UTF-8
DRAWN = 60  # seconds of training that justify a picture, which takes one or two to draw

Losses = dict[int, float]  # step -> nats per token


def summarize(folder: Path, steps: tuple[int, int], results: dict[str, Any],
              losses: tuple[Losses, Losses], cost: tuple[float, int]) -> str:
    """The lines at the end of the run in `folder`; also draws <folder>/loss.png.

    steps: the first and the last step of this start. results: the latest evaluations, by tag.
    losses: training and validation. cost: seconds and tokens of this start's training steps.
    """
    first, step = steps
    seconds, tokens = cost
    training, validation = losses
    duration = datetime.timedelta(seconds=round(seconds))
    since = f" since step {first}" if first else ""
    rate = tokens / max(seconds, 1e-9)
    lines = [
        *result_lines(results, training),
        f"took    {duration} of training steps{since}, {tokens:,} tokens, {rate:,.0f} tok/s",
        *curve_lines(folder, training, validation, drawn=seconds >= DRAWN),
        f"files   {folder}/: ckpt_{step:05d}.pt (weights), log.txt (losses), config.json "
        "(settings), TensorBoard events",
    ]
    return "\n".join(lines)


def what_next(path: Path, can_chat: bool, prompt: str) -> str:
    """The commands to watch a finished run and to try its checkpoint at `path`."""
    checkpoint = shlex.quote(str(path))
    if can_chat:
        command = f"talk to it with `python chat.py --checkpoint {checkpoint}`"
    else:
        command = (f"sample again with `python generate.py --checkpoint {checkpoint} "
                   f"--prompt {shlex.quote(prompt)} --samples {SHOWN.samples} "
                   f"--max_new_tokens {SHOWN.max_new_tokens} --temperature {SHOWN.temperature}`")
    log_dir = shlex.quote(str(path.parent.parent))
    return f"done: watch it with `tensorboard --logdir {log_dir}`, {command}"


def how_to_continue(folder: Path, step: int, length: int, resume: str | None) -> str:
    """How to continue the run in `folder`, stopped at `step` of `length`.

    resume: this start's --resume.
    """
    if resume == "auto":
        flag = ""
    elif resume is None:
        flag = f" with --run_name {shlex.quote(folder.name)}"
    else:  # the same --resume would go back to that checkpoint again
        flag = f" with --resume {shlex.quote(str(folder))}"
    of_length = f" of {length}" if length < UNMEASURED else ""
    return f"stopped at step {step}{of_length}: run the same command again{flag} to continue"


def result_lines(results: dict[str, Any], training: Losses) -> list[str]:
    """The loss, and bits per byte if measured."""
    if "Loss/val" not in results:
        latest = list(training.values())[-50:]
        mean = statistics.mean(latest)
        return [f"result  mean loss {mean:.4f} in the last {len(latest)} training steps; "
                "no validation loss was measured"]
    loss = results["Loss/val"]
    perplexity = math.exp(min(loss, 30))  # a diverged run's would have hundreds of digits
    lines = [f"result  validation loss {loss:.4f} nats per token, perplexity {perplexity:,.1f}"]
    bits = results.get("Loss/val_bpb")
    if bits is not None:
        lines.append(f"        {bits:.4f} bits per byte: as a compressor, this model would shrink "
                     f"the validation text to {bits / 8:.1%}")
    return lines


def curve_lines(folder: Path, training: Losses, validation: Losses, drawn: bool) -> list[str]:
    """The path of the loss curve, or else a sparkline; no line for fewer than two losses."""
    finite = [loss for loss in training.values() if math.isfinite(loss)]
    if len(finite) < 2:
        return []
    path = folder / "loss.png"
    if drawn:
        with contextlib.suppress(Exception):  # no matplotlib or a full disk must not fail the run
            draw(path, training, validation)
            return [f"curve   {path}"]
    return [f"curve   {finite[0]:.2f} {sparkline(finite)} {finite[-1]:.2f}, training loss"]


def sparkline(values: list[float], width: int = 50) -> str:
    """Finite numbers as a line of at most `width` bars, each a mean of neighbors."""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [statistics.mean(values[a:b]) for a, b in zip(edges, edges[1:])]
    lowest = min(means)
    span = max(means) - lowest or 1.0
    bars = BARS if is_encodable(BARS) else ASCII_BARS
    heights = [round((mean - lowest) / span * (len(bars) - 1)) for mean in means]
    return "".join(bars[height] for height in heights)


def is_encodable(text: str) -> bool:
    """Whether the console's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def draw(path: Path, training: Losses, validation: Losses) -> None:
    """Plot losses by step. Raises ImportError without matplotlib."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it logs that it builds a font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(list(training), list(training.values()), lw=0.6, alpha=0.6, label="training")
    if validation:
        axes.plot(list(validation), list(validation.values()), "o-", ms=3, label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
