"""The table that --plan prints: the cost of runs of several lengths."""

from typing import Any

from lib.budget import half_steps, steps_in

RATIOS = (8, 12, 20, 40)  # tokens per parameter


def forecast(cfg: Any, models: dict[str, Any], measured: str) -> str:
    """The table of --plan: a row for each model and each ratio of tokens per parameter.

    models: {name: GPT on the meta device}. measured: name of the model whose speed --tok_per_sec
    is. Hours of the others assume the same FLOP/s; without a measurement there are no hours. If
    `measured` has the size of another model, it has no rows of its own.
    """
    sizes = {name: (model.parameter_counts(), model.flops_per_token())
             for name, model in models.items()}
    twins = [name for name in models if name != measured and sizes[name] == sizes[measured]]
    vocab_size = models[measured].config.vocab_size
    if twins:
        del sizes[measured]
        measured = twins[0]

    speed = None  # FLOP/s
    if cfg.tok_per_sec:
        speed = cfg.tok_per_sec * models[measured].flops_per_token()
    lines = [_title(cfg, vocab_size), _head(cfg, speed)]
    for name, (counts, flops) in sizes.items():
        for ratio in sorted({*RATIOS, cfg.tokens_per_param or RATIOS[0]}):
            tokens = ratio * counts["total"]
            inner = counts["total"] - counts["embedding"]
            line = (f"{name:12} {counts['total']:14,} {inner:14,} {ratio:7g} {tokens:16,.0f} "
                    f"{steps_in(tokens, cfg):17,} {tokens * flops:9.2e}")
            if speed:
                mark = "" if name == measured else "~"
                line += _cost(tokens * flops / speed / 3600, cfg.price_per_hour, mark)
            lines.append(line)
    if speed:
        lines.append(f"hours at the {cfg.tok_per_sec:,.0f} tok/s given for {measured}; "
                     "~: another size, at the same FLOP/s, not measured")
    else:
        lines.append("hours need a measurement: --tok_per_sec of this --preset and --size, which a "
                     "run prints at its end; for dollars, add --price_per_hour")
    return "\n".join(lines)


def _title(cfg, vocab_size):
    title = ("tokens per parameter, all parameters counted (Hoffmann et al. 2022, whose rule of "
             "thumb is 20); Kaplan et al. 2020 leave embeddings out; "
             f"a vocabulary of {vocab_size:,}")
    if half_steps(cfg):
        title += f"; the first {half_steps(cfg):,} steps are of half as many tokens"
    return title


def _head(cfg, speed):
    steps = f"steps of {cfg.total_batch_size:,}"
    head = (f"{'size':12} {'parameters':>14} {'non-embedding':>14} {'tok/par':>7} {'tokens':>16} "
            f"{steps:>17} {'FLOPs':>9}")
    if speed:
        head += f" {'hours':>10}"
    if speed and cfg.price_per_hour:
        head += f" {'dollars':>12}"
    return head


def _cost(hours, price_per_hour, mark):
    cost = f" {f'{mark}{hours:,.1f}':>10}"
    if price_per_hour:
        cost += f" {f'{mark}{hours * price_per_hour:,.2f}':>12}"
    return cost
