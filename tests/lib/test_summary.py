"""What a finished run says of itself: python -m pytest tests/lib/test_summary.py"""

import io
import math
import re
import shlex
import sys

import pytest
from runs import train

import generate
from lib.summary import sparkline, summarize


def test_the_block_says_what_the_loss_means(tmp_path):
    training = {step: 5.0 - step / 100 for step in range(100)}
    block = summarize(tmp_path, (0, 100), {"Loss/val": math.log(50), "Loss/val_bpb": 2.0},
                      (training, {100: 3.9}), (80.0, 6400))
    assert "validation loss 3.9120 nats per token: as unsure of the next token as of one of 50.0 equally likely" in block
    assert "2.0000 bits per byte" in block and "to 25.0%" in block  # of 8 bits
    assert "0:01:20 of training steps, 6,400 tokens, 80 tok/s" in block
    assert f"curve   {tmp_path}/loss.png" in block and (
        tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"files   {tmp_path}/: ckpt_00100.pt" in block
    resumed = summarize(tmp_path, (90, 100), {}, (training, {}), (5.0, 640))
    assert "mean loss 4.2550 in the last 50 training steps" in resumed and "steps since step 90, 640 tokens" in resumed


@pytest.mark.parametrize("seconds, matplotlib", [(80.0, None),
                                                 (50.0, sys.modules.get("matplotlib"))])
def test_without_matplotlib_and_of_a_short_run_the_curve_is_a_line_of_bars(
        seconds, matplotlib, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        if matplotlib is None:
            monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    training = {step: 9.0 - step for step in range(60)} | {60: math.nan}
    block = summarize(tmp_path, (0, 60), {}, (training, {}), (seconds, 1))
    assert re.search(r"^curve   9\.00 █\S+▁ -50\.00, training loss$", block, re.MULTILINE)
    assert not (tmp_path / "loss.png").exists()


def test_a_sparkline_is_the_means_of_neighbours(monkeypatch):
    assert sparkline([0, 0, 7, 7, 3, 4], width=3) == "▁█▅" and sparkline([1.0, 1.0]) == "▁▁"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert sparkline([0, 7]) == "_@"


def test_a_run_ends_with_summary_sample_and_a_command_that_continues_its_text(
        data, tmp_path, capsys):
    folder = train(data, tmp_path / "a", "--max_steps", "40", "--sample_every", "20",
                   "--sample_prompt", "the dog's")
    out = capsys.readouterr().out
    end = out[out.index("result "):].splitlines()
    bits, *order = [line.split()[0] for line in end[1:] if not line.startswith(">")]
    assert float(bits) > 0 and order == ["took", "curve", "files", "done:"
                                         ] and end[5].startswith("> the dog's")
    assert out.count("> the dog's") == 2  # along the way, and once at the end
    words = shlex.split(re.search(r"`python generate.py (.*)`", end[-1])[1])
    assert f"{folder}/ckpt_00040.pt" in words
    generate.main([*words, "--device", "cpu"])
    sample = "\n".join(line.removeprefix("> ") for line in end if line.startswith(">"))
    assert capsys.readouterr().out.startswith("the dog's") and sample.startswith("the dog's")
