"""Training and validation loss of several runs in one picture.

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
    runs: tuple[str, ...] = flag((), "run folders; their names are the legend")
    out: str = flag("assets/loss.png", "picture to write")
    title: str = flag("", "what was trained, on what")
    window: int = flag(10, "steps the train loss is averaged over", above=0)
    top: float | None = flag(None, "upper end of the loss axis")


def read_run(folder):
    """-> (function of steps, millions of tokens before each; dict kind -> (list of steps, list of
    values)) of a run folder."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        rows = [line.split() for line in (Path(folder) / "log.txt").read_text().splitlines()]
    except OSError as error:
        raise BadInput(
            f"{folder} is not a run folder ({error.strerror}): it needs config.json and log.txt"
        ) from error
    curves = {}
    for step, kind, value in rows:
        steps, values = curves.setdefault(kind, ([], []))
        steps.append(int(step))
        values.append(float(value))
    settings = SimpleNamespace(**{"batch_warmup": 0} | config["train"])
    return lambda steps: [tokens_of(s, settings) / 1e6 for s in steps], curves


def running_mean(values, window):
    return [
        sum(values[max(0, i - window + 1):i + 1]) / min(i + 1, window) for i in range(len(values))
    ]


def main(argv):
    (cfg,), _ = parse((Config,), argv, __doc__)
    if not cfg.runs:
        raise BadInput("name run folders by --runs")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for i, folder in enumerate(cfg.runs):
        millions, curves = read_run(folder)
        steps, values = curves["train"]
        style = ("-", "--", ":")[i % 3]  # equal curves stay visible
        axes.plot(millions(steps), running_mean(values, cfg.window), style, color=f"C{i}",
                  alpha=0.5, lw=1)
        steps, values = curves["val"]
        axes.plot(millions(steps), values, style, color=f"C{i}", marker="o", ms=4,
                  label=f"{Path(folder).name}: val {values[-1]:.3f}")
    axes.set(xlabel="million tokens", ylabel="loss (nats per token); faint: train", title=cfg.title)
    axes.set_ylim(top=cfg.top)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(cfg.out)


if __name__ == "__main__":
    run(main)
