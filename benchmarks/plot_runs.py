"""Training and validation loss of several runs in one plot.

    python benchmarks/plot_runs.py --runs log/gpt2 log/modern --out assets/loss.png

A run is a folder with config.json and log.txt. The train loss is drawn as a running mean.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.budget import tokens_of  # noqa: E402
from lib.cli import BadInput, flag, parse, run  # noqa: E402


@dataclass
class Config:
    runs: tuple[str, ...] = flag((), "run folders; the legend shows their names")
    out: str = flag("assets/loss.png", "plot to write")
    title: str = flag("", "title of the plot")
    window: int = flag(10, "steps over which the train loss is averaged", above=0)
    top: float | None = flag(None, "upper end of the loss axis")


def read_run(folder):
    """A run folder -> (its settings, {kind: (steps, values)})."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        rows = [line.split() for line in (Path(folder) / "log.txt").read_text().splitlines()]
    except OSError as error:
        raise BadInput(f"{folder} is not a run folder ({error.strerror}): it needs config.json and "
                       "log.txt") from error
    curves = {}
    for step, kind, value in rows:
        steps, values = curves.setdefault(kind, ([], []))
        steps.append(int(step))
        values.append(float(value))
    return SimpleNamespace(**{"batch_warmup": 0} | config["train"]), curves


def millions(steps, settings):
    """Millions of tokens before each step."""
    return [tokens_of(step, settings) / 1e6 for step in steps]


def running_mean(values, window):
    """The mean of the last `window` values, or of all so far."""
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - window):end]
        means.append(sum(last) / len(last))
    return means


def main(argv):
    (cfg,), _ = parse((Config,), argv, __doc__)
    if not cfg.runs:
        raise BadInput("no --runs: name run folders")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for i, folder in enumerate(cfg.runs):
        settings, curves = read_run(folder)
        steps, values = curves["train"]
        style = ("-", "--", ":")[i % 3]  # equal curves stay visible
        axes.plot(millions(steps, settings), running_mean(values, cfg.window), style,
                  color=f"C{i}", alpha=0.5, lw=1)
        steps, values = curves["val"]
        axes.plot(millions(steps, settings), values, style, color=f"C{i}", marker="o", ms=4,
                  label=f"{Path(folder).name}: val {values[-1]:.3f}")
    axes.set(xlabel="million tokens", ylabel="loss (nats per token); faint: train", title=cfg.title)
    axes.set_ylim(top=cfg.top)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(cfg.out)


if __name__ == "__main__":
    run(main)
