"""logger.py, read back by TensorBoard's own reader: python -m pytest tests/test_logger.py"""

import json
import math
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from lib.cli import BadInput
from lib.logger import Logger, serve_tensorboard


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def points(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def texts(folder, tag):
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in read(folder).Tensors(f"{tag}/text_summary")]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_what_is_logged_is_read_back(tmp_path, capsys):
    log = Logger(tmp_path, 10, 0)
    log.say("one\ntwo")
    for step, loss in enumerate((3.25, math.nan, 1 / 3)):
        log.record(step, "train", loss)
        log.scalars(step, {"train/loss": loss, "lr": 0.5})
        log.progress(step, f"loss {loss:.2f}")
    log.record(2, "val", 2)
    log.text(2, "samples", "the dog\n\nsat")
    log.hyperparameters(0, {"max_lr": 0.25, "shuffle": True, "run": None, "source": ("a", "b"), "mlp": "gelu"})
    log.close()
    assert (tmp_path / "log.txt").read_text() == "0 train 3.250000\n1 train nan\n2 train 0.333333\n2 val 2.000000\n"
    have = points(tmp_path, "train/loss")
    assert [step for step, _ in have] == [0, 1, 2] and math.isnan(have[1][1])
    assert [have[0][1], have[2][1]] == pytest.approx([3.25, 1 / 3])
    assert points(tmp_path, "lr") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert texts(tmp_path, "samples") == [(2, "the dog\n\nsat")]
    table = texts(tmp_path, "hyperparameters")[0][1].splitlines()
    assert table == ["|flag|value|", "|-|-|", "|max_lr|0.25|", "|shuffle|True|", "|run|None|", "|source|('a', 'b')|",
                     "|mlp|gelu|"]
    assert read(tmp_path).SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"
    assert capsys.readouterr().out.splitlines() == ["one", "two", "step 0 | loss 3.25", "step 1 | loss nan",
                                                    "step 2 | loss 0.33"]


def test_log_txt_is_written_at_once_and_appended_to(tmp_path):
    (tmp_path / "log.txt").write_text("0 train 9.000000\n")
    log = Logger(tmp_path, 10, 1)
    log.record(1, "train", 8)
    assert (tmp_path / "log.txt").read_text() == "0 train 9.000000\n1 train 8.000000\n"  # also if the process dies now
    log.close()


def test_steps_that_run_again_are_forgotten(tmp_path):
    first = Logger(tmp_path, 10, 0)
    for step in range(8):
        first.scalars(step, {"train/loss": step})
    first.close()
    again = Logger(tmp_path, 10, 5)  # from the checkpoint of step 5
    for step in range(5, 7):
        again.scalars(step, {"train/loss": 100 + step})
    again.close()
    assert points(tmp_path, "train/loss") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 105), (6, 106)]
    third = Logger(tmp_path, 10, 0)  # and from the very beginning
    third.scalars(0, {"train/loss": 200})
    third.close()
    assert points(tmp_path, "train/loss") == [(0, 200)]


def test_flush_makes_points_readable_while_the_run_goes_on(tmp_path, monkeypatch):
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    append = LocalFileSystem.append  # a thread writes the points, by and by: slowly, here
    monkeypatch.setattr(LocalFileSystem, "append", lambda *args, **kwargs: time.sleep(0.2) or append(*args, **kwargs))
    log = Logger(tmp_path, 10, 0)
    log.scalars(0, {"train/loss": 1.5})
    log.flush()
    assert points(tmp_path, "train/loss") == [(0, 1.5)]
    log.scalars(1, {"train/loss": 2.5})
    log.flush()
    assert points(tmp_path, "train/loss") == [(0, 1.5), (1, 2.5)]
    log.close()


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = Logger(tmp_path, 10, 4)
    assert (log.bar.n, log.bar.total) == (4, 10)
    log.say("predicted: a minute")
    log.progress(4, "loss 3.00")
    log.progress(6, "loss 2.00")
    assert log.bar.n == 7 and log.bar.postfix == "loss 2.00"
    log.close()
    out = capsys.readouterr()
    assert "predicted: a minute\n" in out.out and "step 4 |" not in out.out + out.err


def test_null_swallows_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = Logger.null()
    log.say("x")
    log.progress(0, "x")
    log.record(0, "train", 1.0)
    log.scalars(0, {"x": 1})
    log.text(0, "x", "y")
    log.flush()
    log.hyperparameters(0, {})
    log.close()
    assert log.anything_else(1, a=2) is None
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard, served

# in a process of its own: the server's thread ends with it
SERVE = f"""
import json, socket, sys, time, urllib.request
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from lib.logger import Logger, serve_tensorboard
log = Logger(Path("log/a"), 10, 0)
log.scalars(3, {{"train/loss": 1.5}})
log.flush()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
serve_tensorboard("log", port)
def fetch(path):
    with urllib.request.urlopen(f"http://127.0.0.1:{{port}}{{path}}", timeout=20) as reply:
        return reply.read().decode()
page, plugins, deadline = fetch("/"), fetch("/data/plugins_listing"), time.monotonic() + 30
while not (tags := json.loads(fetch("/data/plugin/scalars/tags"))) and time.monotonic() < deadline:
    time.sleep(0.1)  # it reads the folder by and by
print("FETCHED", json.dumps([page[:300], plugins, tags]))
"""


def test_a_run_serves_its_own_tensorboard_and_it_ends_with_the_run(tmp_path):
    (tmp_path / "log" / "a").mkdir(parents=True)
    result = subprocess.run([sys.executable, "-c", SERVE], cwd=tmp_path, capture_output=True, text=True, timeout=90,
                            check=False)
    assert result.returncode == 0, result.stderr
    page, plugins, tags = json.loads(result.stdout.split("FETCHED ", 1)[1])
    assert "<!doctype html>" in page.lower() and json.loads(plugins)["scalars"]["enabled"]
    assert "train/loss" in tags["a"]


@pytest.fixture
def occupied():
    """A port that another program listens at."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        yield other.getsockname()[1]


def test_an_occupied_port_is_bad_input(tmp_path, occupied):
    with pytest.raises(BadInput, match=f"TensorBoard cannot use port {occupied}: give another --tensorboard port"):
        serve_tensorboard(str(tmp_path), occupied)
