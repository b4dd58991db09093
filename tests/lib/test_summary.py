"""The summary at the end of a run: python -m pytest tests/lib/test_summary.py"""

import io
import math
import re
import shlex
import sys

import pytest
from runs import train

import generate
from lib.summary import sparkline, summarize

TRAINING = {step: 5.0 - step / 100 for step in range(100)}


def test_a_summary_with_validation(tmp_path):
    results = {"Loss/val": math.log(50), "Loss/val_bpb": 2.0}
    text = summarize(tmp_path, (0, 100), results, (TRAINING, {100: 3.9}), (80.0, 6400))
    assert "validation loss 3.9120 nats per token" in text
    assert "perplexity 50.0" in text
    assert "2.0000 bits per byte" in text
    assert "to 25.0%" in text  # of 8 bits
    assert "0:01:20 of training steps, 6,400 tokens, 80 tok/s" in text
    assert f"curve   {tmp_path}/loss.png" in text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"files   {tmp_path}/: ckpt_00100.pt" in text


def test_a_summary_of_a_resumed_run_without_validation(tmp_path):
    text = summarize(tmp_path, (90, 100), {}, (TRAINING, {}), (5.0, 640))
    assert "mean loss 4.2550 in the last 50 training steps" in text
    assert "steps since step 90, 640 tokens" in text


@pytest.mark.parametrize("seconds, matplotlib", [(80.0, None),
                                                 (50.0, sys.modules.get("matplotlib"))],
                         ids=["no matplotlib", "short run"])
def test_the_curve_may_be_a_line_of_bars(seconds, matplotlib, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        if matplotlib is None:
            monkeypatch.setitem(sys.modules, name, None)  # as if it is not installed
    training = {step: 9.0 - step for step in range(60)} | {60: math.nan}
    text = summarize(tmp_path, (0, 60), {}, (training, {}), (seconds, 1))
    assert re.search(r"^curve   9\.00 █\S+▁ -50\.00, training loss$", text, re.MULTILINE)
    assert not (tmp_path / "loss.png").exists()


def test_a_sparkline_shows_means_of_neighbors(monkeypatch):
    assert sparkline([0, 0, 7, 7, 3, 4], width=3) == "▁█▅"
    assert sparkline([1.0, 1.0]) == "▁▁"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert sparkline([0, 7]) == "_@"


def test_a_run_ends_with_a_summary_a_sample_and_a_command_to_sample_again(data, tmp_path, capsys):
    folder = train(data, tmp_path / "a", "--max_steps", "40", "--sample_every", "20",
                   "--sample_prompt", "the dog's")
    out = capsys.readouterr().out
    end = out[out.index("result "):].splitlines()
    bits, *order = [line.split()[0] for line in end[1:] if not line.startswith(">")]
    assert float(bits) > 0
    assert order == ["took", "curve", "files", "done:", '{"run":']
    assert end[5].startswith("> the dog's")
    assert out.count("> the dog's") == 2  # once during training, once at the end
    words = shlex.split(re.search(r"`python generate.py (.*)`", end[-2])[1])
    assert f"{folder}/ckpt_00040.pt" in words
    generate.main([*words, "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the dog's")
