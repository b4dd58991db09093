"""What a finished run says of itself: what it reached, what that means, and its loss curve."""

import contextlib
import datetime
import logging
import math
import statistics
import sys

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#@"  # for a console without UTF-8
DRAWN = 60  # seconds of training that are worth a picture, which takes one or two to draw


def summarize(folder, steps, results, losses, cost):
    """The block of lines at the end of the run in `folder`; draws <folder>/loss.png.

    steps: where this start began and ended. results: the latest evaluations, by tag. losses: of
    training and of validation, {step: nats} each. cost: seconds and tokens of the training steps of
    this start.
    """
    first, step = steps
    seconds, tokens = cost
    since = f" since step {first}" if first else ""
    took = datetime.timedelta(seconds=round(seconds))
    lines = [
        *what_was_reached(results, losses[0]),
        f"took    {took} of training steps{since}, {tokens:,} tokens, {tokens / max(seconds, 1e-9):,.0f} tok/s",
        *curve(folder, *losses, drawn=seconds >= DRAWN),
        f"files   {folder}/: ckpt_{step:05d}.pt (weights), log.txt (losses), config.json (settings), "
        "TensorBoard events",
    ]
    return "\n".join(lines)


def what_was_reached(results, training_losses):
    """Lines: the loss, and bits per byte where they were measured."""
    if "Loss/val" not in results:
        latest = [*training_losses.values()][-50:]
        return [f"result  mean loss {statistics.mean(latest):.4f} in the last {len(latest)} training steps; "
                "nothing was measured on validation text"]
    loss = results["Loss/val"]
    choices = math.exp(min(loss, 30))  # a diverged run's has hundreds of digits
    lines = [f"result  validation loss {loss:.4f} nats per token: as unsure of the next token as of one of "
             f"{choices:,.1f} equally likely ones"]
    if (bits := results.get("Loss/val_bpb")) is not None:
        lines.append(f"        {bits:.4f} bits per byte: a compressor made of this model would shrink the "
                     f"validation text to {bits / 8:.1%}")
    return lines


def curve(folder, training, validation, drawn):
    """A line: where the loss curve was drawn, or a sparkline of it; none of too few losses."""
    finite = [loss for loss in training.values() if math.isfinite(loss)]
    if len(finite) < 2:
        return []
    path = folder / "loss.png"
    if drawn:
        with contextlib.suppress(
                Exception):  # no matplotlib, a broken one, a full disk: no reason to fail
            draw(path, training, validation)
            return [f"curve   {path}"]
    return [f"curve   {finite[0]:.2f} {sparkline(finite)} {finite[-1]:.2f}, training loss"]


def sparkline(values, width=50):
    """Finite numbers as a line of bars, each the mean of as many neighbours."""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [statistics.mean(values[a:b]) for a, b in zip(edges, edges[1:])]
    lowest = min(means)
    span = max(means) - lowest or 1.0
    bars = BARS if is_encodable(BARS) else ASCII_BARS
    return "".join(bars[round((mean - lowest) / span * (len(bars) - 1))] for mean in means)


def is_encodable(text):
    """Whether the console can show it."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def draw(path, training, validation):
    """Losses by step as a picture. Raises ImportError without matplotlib."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it announces its cache of fonts
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([*training], [*training.values()], lw=0.6, alpha=0.6, label="training")
    if validation:
        axes.plot([*validation], [*validation.values()], "o-", ms=3, label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
