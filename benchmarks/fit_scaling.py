"""Fit what `--size auto` and `--plan` predict (lib/scaling.py): loss against parameters and text,
time per token against FLOPs.

    python benchmarks/fit_scaling.py benchmarks/race_h100_202611/*.jsonl \
        benchmarks/scaling_202611/*.jsonl --out lib/scaling.json

Prints the law, the error of each run with and without it in the fit, and the error of each size
without its runs. Files: jsonl as in race_h100_202611/, whose runs of --preset speedrun in any size
and length are taken, no others; or the list that `results.py --json` prints, all finished runs.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# flags that the law may ignore: size, length, seed, and what does not change the training
SIZE = {"--n_layer", "--n_head", "--n_embd", "--minutes", "--seed"}
IGNORED = {"--preset", "--data", "--micro_batch", "--val_tokens", "--eval_every"}
# --data of a race -> bytes of its text: nine files of the shared corpus (83M tokens of 4.044 bytes)
# or three (26.8M of 4.157)
RACE_BYTES = {"gpt2": 336e6, "bpe16k": 336e6, "three": 111e6}
CONTEXT = 2048      # of --preset speedrun
BATCH, WARMUP = 131_072, 12_000_000  # tokens per step; in the first 12M, half of that
# Published values of a, b (Hoffmann et al. 2022) and R (Muennighoff et al. 2023), and for D0 the
# smallest text of the races, halved. An e-fold deviation counts as an error of PULL, so that what
# the runs do not determine stays there.
PRIOR = np.log([0.34, 0.28, 15.4, 10.0])
PULL = 0.01
NAMES = ("floor", "size", "size_power", "text", "text_power", "repeats", "delay")  # of Law
DELTA = 1e-6  # of the derivatives


# --------------------------------------------------------------------------------------------------
# Reading: a point is a dict of parameters, flops (per token), text and different (bytes), loss
# (bits per byte), speed (tokens per second), name


def read(path):
    text = Path(path).read_text()
    if text.startswith("["):
        runs = json.loads(text)
        return [of_results(run) for run in runs if run["outcome"] == "finished"]
    points = []
    for line in text.splitlines():
        run = json.loads(line)
        words = run["flags"].split()
        flags = dict(zip(words, words[1:]))
        own = {word for word in words if word.startswith("--")}
        is_changed = not own <= SIZE | IGNORED or run.get("patched")
        is_race = flags["--preset"] == "speedrun" and flags.get("--data") in RACE_BYTES
        if is_race and "--minutes" in flags and not is_changed:
            points.append(of_race(run, flags))
    return points


def of_race(run, flags):
    """A point from a line of a race's jsonl."""
    step, seconds, loss, bits = run["val: step, seconds, loss, bits per byte"][-1]
    half = min(step, WARMUP // (BATCH // 2))
    tokens = step * BATCH - half * BATCH // 2
    layers = int(flags.get("--n_layer", 11))
    width = int(flags.get("--n_embd", 512))
    return {
        "name": f"{run['name']} ({layers} x {width})",
        "parameters": run["parameters"],
        "flops": 6 * run["parameters"] + 12 * layers * width * CONTEXT,
        "text": tokens * loss / math.log(2) / bits,
        "different": RACE_BYTES[flags["--data"]],
        "loss": bits,
        "speed": tokens / seconds,
        "seconds": seconds,
        "card": run["gpu"],
    }


def of_results(run):
    """A point from an object that `results.py --json` prints."""
    text = run["tokens"] * run["val_loss"] / math.log(2) / run["bits_per_byte"]
    return {
        "name": run["name"],
        "parameters": run["parameters"],
        "flops": run["flops_per_token"],
        "text": text,
        "different": text / max(run["epochs"], 1e-9),
        "loss": run["bits_per_byte"],
        "speed": run["tok_per_sec"] / run["processes"],
        "seconds": run["tokens"] / run["tok_per_sec"],
        "card": run["device"],
    }


# --------------------------------------------------------------------------------------------------
# The law: E, A and B are linear in it, so only the four others are searched


def column(points, name):
    return np.array([point[name] for point in points], dtype=float)


def basis(x, points):
    """The factors of E, A and B, (points, 3)."""
    a, b, repeats, delay = np.exp(x)
    text = column(points, "text") / 1e6
    different = column(points, "different") / 1e6
    repetitions = np.maximum(text / different - 1, 0)
    worth = different * (1 + repeats * (1 - np.exp(-repetitions / repeats)))
    worth = np.where(repetitions > 0, worth, text)
    sizes = column(points, "parameters") / 1e6
    after = np.where(worth < 2 * delay, worth**2 / (4 * delay), worth - delay)
    return np.stack([np.ones_like(text), sizes**-a, after**-b], axis=1)


def solve(x, points):
    """-> ((E, A, B), relative errors, followed by the pull of the prior)."""
    factors = basis(x, points) / column(points, "loss")[:, None]
    linear, *_ = np.linalg.lstsq(factors, np.ones(len(points)), rcond=None)
    return linear, np.append(factors @ linear - 1, PULL * (x - PRIOR))


def fit(points):
    """The numbers of lib.scaling.Law, by Levenberg's and Marquardt's method on relative errors."""
    x = PRIOR
    damping = 1.0
    _, residuals = solve(x, points)
    for _ in range(300):
        moved = [solve(x + DELTA * row, points)[1] for row in np.eye(4)]
        jacobian = (np.array(moved) - residuals).T / DELTA
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.diag(normal.diagonal()),
                               -jacobian.T @ residuals)
        _, tried = solve(x + step, points)
        if tried @ tried < residuals @ residuals:
            x, residuals, damping = x + step, tried, damping / 3
        else:
            damping *= 4
    (floor, size, text), _ = solve(x, points)
    a, b, repeats, delay = np.exp(x)
    return [floor, size, a, text, b, repeats, delay]


def predict(law, points):
    floor, size, a, text, b, repeats, delay = law
    return basis(np.log([a, b, repeats, delay]), points) @ [floor, size, text]


# --------------------------------------------------------------------------------------------------
# Time per token: (FLOPs + overhead) / speed


def fit_speed(points):
    """-> (FLOPs of the overhead, FLOP/s), of the card with most points."""
    inverse = 1 / column(points, "speed")
    factors = np.stack([np.ones(len(points)), column(points, "flops")], axis=1)
    (constant, slope), *_ = np.linalg.lstsq(factors / inverse[:, None], np.ones(len(points)),
                                            rcond=None)
    return constant / slope, 1 / slope


LENGTHS = (10, 40, 100, 300)  # seconds, the columns of the frontier
MARGIN = 1.003                # lib/sizing.py's: the smallest size within it of the best is taken


def choices(points, law):
    """For each length, the size that the law prefers among those measured, and what it costs."""
    lines = []
    for length in LENGTHS:
        near = [point for point in points if abs(point["seconds"] / length - 1) < 0.06]
        measured = {}
        predicted = {}
        for point in near:
            size = point["parameters"]
            measured.setdefault(size, []).append(point["loss"])
            predicted.setdefault(size, []).append(predict(law, [point])[0])
        if not measured:
            continue
        means = {size: np.mean(losses) for size, losses in measured.items()}
        expected = {size: np.mean(losses) for size, losses in predicted.items()}
        limit = MARGIN * min(expected.values())
        chosen = min(size for size in expected if expected[size] <= limit)
        best = min(means, key=means.get)
        regret = means[chosen] / means[best] - 1
        lines.append(f"{length} s: best of {len(means)} sizes {best / 1e6:.1f}M, "
                     f"{means[best]:.4f}; by the law {chosen / 1e6:.1f}M, {regret:+.2%}")
    return lines


def report(points):
    """Print the errors of every run -> (the law, the laws without each size, the error left out).
    """
    law = fit(points)
    inside = predict(law, points) / column(points, "loss") - 1
    left_out = []
    for point in points:
        others = [other for other in points if other is not point]
        left_out.append(predict(fit(others), [point])[0] / point["loss"] - 1)
    print("| run | parameters | text, MB | bits per byte | error | left out |")
    print("|---|---:|---:|---:|---:|---:|")
    for point, error, other in zip(points, inside, left_out):
        print(f"| {point['name']} | {point['parameters'] / 1e6:.1f}M | {point['text'] / 1e6:,.0f} "
              f"| {point['loss']:.4f} | {error:+.2%} | {other:+.2%} |")
    print()
    replicas = []
    for size in sorted({point["parameters"] for point in points}):
        replicas.append(fit([one for one in points if one["parameters"] != size]))
        mine = [point for point in points if point["parameters"] == size]
        errors = predict(replicas[-1], mine) / column(mine, "loss") - 1
        print(f"fitted without {size / 1e6:.1f}M, its error: {rms(errors):.2%}")
    print(f"{len(points)} runs: error {rms(inside):.2%}, at most {abs(inside).max():.2%}; left out "
          f"{rms(left_out):.2%}, at most {max(map(abs, left_out)):.2%}")
    return law, replicas, rms(left_out)


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


def digits(value):
    return float(f"{value:.5g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="results, jsonl or json")
    parser.add_argument("--out", help="file to write, lib/scaling.json")
    args = parser.parse_args()
    points = []
    for path in args.files:
        points += read(path)
    law, replicas, error = report(points)
    print("\n".join(choices(points, law)))
    card = points[0]["card"]
    timed = [point for point in points if point["card"] == card]
    overhead, speed = fit_speed(timed)
    errors = speed / (column(timed, "flops") + overhead) / column(timed, "speed") - 1
    print(f"time per token: (FLOPs + {overhead:.3g}) / {speed:.3g} on {card}, error "
          f"{rms(errors):.1%}, at most {abs(errors).max():.1%}")
    sizes = column(points, "parameters")
    text = column(points, "text")
    fields = {
        "law": dict(zip(NAMES, map(digits, law))),
        "replicas": [list(map(digits, one)) for one in replicas],
        "error": digits(error),
        "overhead": digits(overhead),
        "speed": digits(speed),
        "card": card,
        "sizes": [int(sizes.min()), int(sizes.max())],
        "text": [digits(text.min()), digits(text.max())],
        "sources": [str(Path(path).resolve().relative_to(ROOT)) for path in args.files],
    }
    print(f"law: {fields['law']}")
    if args.out:
        Path(args.out).write_text(json.dumps(fields, indent=1) + "\n")


if __name__ == "__main__":
    main()
