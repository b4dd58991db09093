"""Bits per byte by seconds of training and model size, for runs of `--preset speedrun`: a table,
and with --out a plot.

    python benchmarks/frontier.py benchmarks/race_h100_202611/runs.jsonl --out assets/frontier.png

Uses the runs whose names start with `frontier`, R3, R4 or R5, which are validated on the whole val
split at the end. Seeds of one size and length are averaged.
"""

import argparse
import json
import statistics
from pathlib import Path


def read(path):
    """-> {parameters: {seconds: [bits per byte, one per seed]}}, and {parameters: shape}."""
    found = {}
    shapes = {}
    for line in Path(path).read_text().splitlines():
        run = json.loads(line)
        if not run["name"].startswith(("frontier", "R3", "R4", "R5")):
            continue
        size = run["parameters"]
        words = run["flags"].split()
        flags = {"--n_layer": "11", "--n_embd": "512"} | dict(zip(words, words[1:]))
        seconds = round(float(flags["--minutes"]) * 60)
        *_, bpb = run["val: step, seconds, loss, bits per byte"][-1]
        found.setdefault(size, {}).setdefault(seconds, []).append(bpb)
        shapes[size] = f"{flags['--n_layer']} x {flags['--n_embd']}, {flags['--data']}"
    return found, shapes


def table(found, shapes):
    columns = sorted({seconds for runs in found.values() for seconds in runs})
    best = {}
    for seconds in columns:
        means = [statistics.mean(runs[seconds]) for runs in found.values() if seconds in runs]
        best[seconds] = min(means)
    heads = "".join(f" {seconds} s |" for seconds in columns)
    lines = [f"| parameters | shape, tokenizer |{heads}", "|---|---|" + "---:|" * len(columns)]
    for size in sorted(found):
        cells = []
        for seconds in columns:
            values = found[size].get(seconds, [])
            cell = ", ".join(f"{value:.4f}" for value in sorted(values))
            if values and statistics.mean(values) == best[seconds]:
                cell = f"**{cell}**"
            cells.append(cell)
        lines.append(f"| {size / 1e6:.1f}M | {shapes[size]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found, out):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for size in sorted(found):
        seconds = sorted(found[size])
        axes.plot(seconds, [statistics.mean(found[size][t]) for t in seconds], marker="o", ms=4,
                  label=f"{size / 1e6:.0f}M")
    axes.set(xscale="log", xlabel="seconds of training on one H100", ylabel="bits per byte on val",
             ylim=(1.1, 1.5), title="--preset speedrun: which size for how long")
    axes.set_xticks([10, 40, 100, 300], ["10", "40", "100", "300"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="parameters")
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="a runs.jsonl")
    parser.add_argument("--out", help="plot to write")
    args = parser.parse_args()
    found, shapes = read(args.runs)
    print(table(found, shapes))
    if args.out:
        plot(found, args.out)


if __name__ == "__main__":
    main()
