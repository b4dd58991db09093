"""The table of --plan: python -m pytest tests/lib/test_forecast.py"""

from types import SimpleNamespace

from helpers import tiny

from lib.forecast import forecast
from train_gpt2 import GPT


def settings(**changes):
    defaults = dict(total_batch_size=1024, batch_warmup=0, tok_per_sec=50.0, price_per_hour=2.0,
                    tokens_per_param=30.0)
    return SimpleNamespace(**defaults | changes)


def number(text):
    return int(text.replace(",", ""))


def test_the_table_by_hand():
    """Two models; hours of the other one at the same FLOP/s."""
    models = {"a": GPT(tiny()), "b": GPT(tiny(n_layer=4))}
    rows = [line.split() for line in forecast(settings(), models, "a").splitlines()[2:-1]]
    assert [row[3] for row in rows] == 2 * ["8", "12", "20", "30", "40"]
    for name, total, inner, ratio, tokens, steps, *costs in rows:
        counts = models[name].parameter_counts()
        flops = models[name].flops_per_token()
        assert number(total) == counts["total"]
        assert number(inner) == counts["total"] - counts["embedding"]
        assert number(tokens) == number(ratio) * counts["total"]
        assert number(steps) == number(tokens) // 1024
        hours = number(tokens) / 50 / 3600 * flops / models["a"].flops_per_token()
        mark = "" if name == "a" else "~"
        assert costs == [f"{number(tokens) * flops:.2e}", f"{mark}{hours:,.1f}",
                         f"{mark}{2 * hours:,.2f}"]


def test_without_a_measurement_there_are_no_hours():
    models = {"a": GPT(tiny())}
    title, head, *_ = forecast(settings(tok_per_sec=None), models, "a").splitlines()
    assert "hours" not in head and "dollars" not in head
    assert title.endswith(f"a vocabulary of {models['a'].config.vocab_size:,}")


def test_a_size_is_not_repeated_under_the_name_of_a_preset():
    """Heads change neither parameters nor FLOPs; layers do."""
    cfg = settings(price_per_hour=None, tokens_per_param=None)
    models = {"a": GPT(tiny()), "b": GPT(tiny(n_layer=4))}
    same = models | {"own": GPT(tiny(n_head=4))}
    assert forecast(cfg, same, "own") == forecast(cfg, models, "a")
    other = models | {"own": GPT(tiny(n_layer=3))}
    assert forecast(cfg, other, "own").count("\nown ") == 4
