"""Logs of a run, read by TensorBoard's own reader: python -m pytest tests/lib/test_logger.py"""

import json
import math
import re
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT, hellaswag_items, write_lines
from runs import train

from lib.cli import BadInput
from lib.logger import Logger, Null, SpikeDetector, read_scalars
from train_gpt2 import TrainConfig

STEP = {"Loss/train": 3.25, "optim/lr": 0.5, "optim/grad_norm": 1.0,
        "perf/tok_per_sec": 1234.5, "perf/mfu": None, "perf/memory_gb": None}


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def points(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def texts(folder, tag):
    return [(e.step, e.tensor_proto.string_val[0].decode())
            for e in read(folder).Tensors(f"{tag}/text_summary")]


# --------------------------------------------------------------------------------------------------
# Files


def log_three_steps(folder):
    """A Logger, neither flushed nor closed: a run that dies now loses nothing."""
    log = Logger(folder, 10, 0)
    log.say("one\ntwo")
    log.hyperparameters(0, {"max_lr": 0.25, "shuffle": True, "source": ("a", "b"), "mlp": None})
    for step, loss in enumerate((3.25, math.nan, 1 / 3)):
        log.log_step(step, STEP | {"Loss/train": loss}, seconds=0.5)
    log.log_evaluation(2, {"Loss/val": 2.0, "Loss/val_bpb": 1.5})
    log.log_evaluation(2, {"eval/hellaswag": 0.25})
    log.log_evaluation(2, {"eval/piqa": 0.75, "samples": ["the dog\n\nsat", "a cat"]})
    return log


def test_log_txt_and_tensorboard_have_every_step_at_once(tmp_path):
    log = log_three_steps(tmp_path)
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        "0 train 3.250000", "1 train nan", "2 train 0.333333", "2 val 2.000000",
        "2 hella 0.250000", "2 eval/piqa 0.750000"
    ]
    have = points(tmp_path, "Loss/train")
    assert [step for step, _ in have] == [0, 1, 2]
    assert [value for _, value in have] == pytest.approx([3.25, math.nan, 1 / 3], nan_ok=True)
    assert points(tmp_path, "optim/lr") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert points(tmp_path, "Loss/val_bpb") == [(2, 1.5)]
    assert "perf/mfu" not in read(tmp_path).Tags()["scalars"]
    log.close()


def test_tensorboard_has_samples_and_settings(tmp_path):
    log = log_three_steps(tmp_path)
    assert texts(tmp_path, "samples") == [(2, "    the dog\n\n    sat\n\n---\n\n    a cat")]
    assert texts(tmp_path, "hyperparameters")[0][1].splitlines() == [
        "|flag|value|", "|-|-|", "|max_lr|0.25|", "|shuffle|True|", "|source|('a', 'b')|",
        "|mlp|None|"
    ]
    metadata = read(tmp_path).SummaryMetadata("_hparams_/session_start_info")
    assert metadata.plugin_data.plugin_name == "hparams"
    log.close()


def test_the_console_has_steps_evaluations_and_samples(tmp_path, capsys):
    log = log_three_steps(tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "one", "two",
        "step 0 | loss 3.2500 | lr 5.00e-01 | norm 1.000 | 500 ms | 1,234 tok/s | MFU n/a | "
        "ETA 0:00:04"
    ]
    assert "step 2 | val loss 2.0000 | bits per byte 1.5000" in out
    assert out[-5:] == ["> the dog", "> ", "> sat", "", "> a cat"]
    log.close()


def test_remaining_time_follows_the_work_of_the_steps_left(tmp_path):
    """Two steps of 1 s, then eight with 3 times the work."""
    log = Logger(tmp_path, 10, 0, work_of=lambda step, steps: step + 2 * max(step - 2, 0))
    for step in range(2):
        log.log_step(step, STEP | {"Loss/train": 1.0}, seconds=1.0)
    assert log.seconds_left() == 24
    log.log_step(2, STEP | {"Loss/train": 1.0}, seconds=3.0)
    assert log.seconds_left() == 21
    log.close()


def test_steps_that_run_again_are_dropped(tmp_path):
    for first, last, value in ((0, 8, 0), (5, 7, 100)):  # again from the checkpoint of step 5
        log = Logger(tmp_path, 10, first)
        for step in range(first, last):
            log.scalars(step, {"Loss/train": value + step})
        log.close()
    assert points(tmp_path, "Loss/train") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 105),
                                              (6, 106)]
    log = Logger(tmp_path, 10, 0)  # and from the very beginning
    log.scalars(0, {"Loss/train": 200})
    log.close()
    assert points(tmp_path, "Loss/train") == [(0, 200)]
    # lib/rewind.py rewinds log.txt
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 11


@pytest.mark.parametrize("by_clock", ["1700000000", "700000000"], ids=["2023", "1992"])
def test_event_files_are_read_in_the_order_of_the_starts(by_clock, tmp_path, monkeypatch,
                                                         caplog):
    """Regardless of the clock, by which earlier versions and SummaryWriter name their files."""
    now = [1_700_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for first, last, value in ((0, 8, 0), (5, 7, 100), (2, 6, 200), (1, 3, 300)):
        now[0] -= 3600
        log = Logger(tmp_path, 10, first)
        for step in range(first, last):
            log.scalars(step, {"Loss/train": value + step})
        log.close()
        if first == 0:
            [file] = tmp_path.glob("events*")
            file.rename(tmp_path / f"events.out.tfevents.{by_clock}.another-host.7")
    want = {0: 0, 1: 301, 2: 302}
    assert read_scalars(tmp_path)["Loss/train"] == want
    assert not caplog.messages  # TensorBoard warns of each step that was replaced
    assert dict(points(tmp_path, "Loss/train")) == want


def test_tensorboard_shows_what_matters_first(data, tmp_path):
    """Its groups are sorted by name, capitals first; the norms of many blocks come last."""
    items = write_lines(tmp_path / "hellaswag_val.jsonl", hellaswag_items(4))
    folder = train(data, tmp_path / "a", "--max_steps", "2", "--warmup_steps", "1",
                   "--hellaswag_every", "2", "--hellaswag_file", items, "--sample_every", "2")
    tags = read(folder).Tags()
    assert list(dict.fromkeys(tag.split("/")[0] for tag in sorted(tags["scalars"]))) == [
        "Loss", "data", "eval", "optim", "perf", "weights"]
    assert sorted(tags["scalars"])[:4] == ["Loss/train", "Loss/val", "Loss/val_bpb", "data/epoch"]
    assert {"hyperparameters/text_summary", "samples/text_summary"} <= set(tags["tensors"])
    assert re.fullmatch(r"0 train \S+\n1 train \S+\n2 val \S+\n2 hella \S+\n",
                        (folder / "log.txt").read_text())


def test_the_columns_of_hparams_start_with_what_distinguishes_runs(data, tmp_path):
    from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data

    folder = train(data, tmp_path / "a", "--max_steps", "1", "--warmup_steps", "0",
                   "--eval_every", "0")
    content = read(folder).SummaryMetadata("_hparams_/experiment").plugin_data.content
    columns = [info.name for info in parse_experiment_plugin_data(content).hparam_infos]
    assert columns[:8] == [
        "preset", "size", "n_layer", "n_head", "n_embd", "block_size", "total_batch_size", "max_lr"
    ]
    assert len(set(columns)) == len(columns) > 60


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = Logger(tmp_path, 10, 4)
    log.say("predicted: a minute")
    log.log_step(4, STEP, 0.5)
    log.log_step(6, STEP | {"Loss/train": 2.0}, 0.5)
    assert (log.bar.n, log.bar.total) == (7, 10)
    assert log.bar.postfix.startswith("loss 2.0000 | ")
    log.close()
    out, err = capsys.readouterr()
    assert "predicted: a minute\n" in out
    assert "step 4 |" not in out + err


@pytest.mark.parametrize(
    "seconds, log_every, shown",
    [
        (0.25, None, [*range(10), *range(13, 240, 4), 239]),  # about one per second
        (2.0, None, [*range(240)]),
        (0.001, None, [*range(10), 109, 209, 239]),  # one per hundred steps
        (0.001, 60, [0, 60, 120, 180]),
        (0.001, 1, [*range(240)])
    ])
def test_only_the_console_skips_steps(seconds, log_every, shown, tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("lib.logger.time.monotonic", lambda: now[0])
    log = Logger(tmp_path, 240, 0, log_every=log_every)
    for step in range(240):
        now[0] += seconds
        log.log_step(step, STEP, seconds)
    log.close()
    out = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"^step (\d+)", out, re.MULTILINE)] == shown
    assert (tmp_path / "log.txt").read_text().count(" train ") == 240
    assert len(points(tmp_path, "Loss/train")) == 240


def test_null_does_nothing(capsys):
    log = Null()
    assert log.say("x") is None
    assert log.anything_else(1, a=2) is None
    assert capsys.readouterr() == ("", "")


def test_a_spike_is_a_loss_above_the_median_of_those_before():
    is_spike = SpikeDetector(1.0)
    # none before the tenth loss; NaN is none and does not count
    assert not any(is_spike(loss) for loss in [9.0] * 9 + [2.0, 10.0, math.nan])
    assert is_spike(10.1)
    assert not any(is_spike(5.0) for _ in range(50))
    assert is_spike(6.1)
    never = SpikeDetector(0)
    assert not any(never(loss) for loss in [1.0] * 20 + [1000.0])


def test_a_healthy_run_of_small_batches_has_no_spike_and_a_planted_one_is_found():
    """`make train` has 22 losses a nat or more above the median, and no spike. In a run of large
    batches, whose losses are close together, a smaller rise is one."""
    log = (ROOT / "benchmarks" / "tiny_cpu_202611" / "make_train_cooldown_log.txt").read_text()
    losses = [float(line.split()[2]) for line in log.splitlines() if " train " in line]
    floor = TrainConfig().spike
    is_spike = SpikeDetector(floor)
    assert len(losses) == 920
    assert not any(map(is_spike, losses))
    for planted in (100, 500, 900):
        is_spike = SpikeDetector(floor)
        found = [step for step, loss in enumerate(losses) if is_spike(loss + 6 * (step == planted))]
        assert found == [planted]
    is_spike = SpikeDetector(floor)
    assert not any(is_spike(3.0 + 0.02 * math.sin(step)) for step in range(100))
    assert is_spike(3.25)


# --------------------------------------------------------------------------------------------------
# TensorBoard, served

# in a process of its own: the server's thread ends with it
SERVE = """
import json, socket, time, urllib.request
from pathlib import Path
from lib.logger import Logger, serve_tensorboard
log = Logger(Path("log/a"), 10, 0)
log.scalars(3, {"Loss/train": 1.5})
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
serve_tensorboard("log", port, "127.0.0.1")
def fetch(path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=600) as reply:
        return reply.read().decode()
tags = {}
while not tags:
    time.sleep(0.1)  # it reads the folder in the background
    tags = json.loads(fetch("/data/plugin/scalars/tags"))
with socket.socket() as other:
    other.settimeout(5)
    assert other.connect_ex(("127.0.0.2", port)), "it listens on other addresses, too"
print("FETCHED", json.dumps([fetch("/")[:300], fetch("/data/plugins_listing"), tags]))
"""


def test_a_run_serves_its_own_tensorboard_and_it_ends_with_the_run(tmp_path):
    (tmp_path / "log" / "a").mkdir(parents=True)
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SERVE}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    page, plugins, tags = json.loads(result.stdout.split("FETCHED ", 1)[1])
    assert "<!doctype html>" in page.lower()
    assert json.loads(plugins)["scalars"]["enabled"]
    assert "Loss/train" in tags["a"]


def test_a_taken_port_is_refused(data, tmp_path, capfd):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BadInput, match=f"port {port} .*--tensorboard"):
            train(data, tmp_path / "a", "--tensorboard", port)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "x" * 100])
def test_a_host_that_is_not_this_machine_is_refused(host, data, tmp_path):
    with pytest.raises(BadInput, match="--tensorboard_host"):
        train(data, tmp_path / "a", "--tensorboard", 6006, "--tensorboard_host", host)
