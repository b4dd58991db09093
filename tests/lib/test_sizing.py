"""--size auto and --dollars: python -m pytest tests/lib/test_sizing.py"""

import json
from types import SimpleNamespace

import pytest
from helpers import ROOT, TINY_FLAGS
from runs import run_script

import ablate
import train_gpt2
from lib import doctor, scaling, sizing
from lib.cli import BadInput
from lib.sizing import Option, Speed

SPEEDRUN = ["--preset", "speedrun", "--price_per_hour", "2"]
# a run that chooses one of the smallest models
AUTO = ["--preset", "speedrun", "--size", "auto", "--block_size", "32", "--total_batch_size", "256",
        "--batch_warmup", "0", "--val_tokens", "330", "--hellaswag_every", "0",
        "--sample_every", "0", "--device", "cpu"]


def sizer(*flags):
    return train_gpt2.sizer_of(train_gpt2.settings([*SPEEDRUN, *flags]), None)


@pytest.fixture(scope="module")
def plain():
    return sizer()


@pytest.fixture(scope="module")
def sizes(plain):
    return plain.sizes()


def seconds(n):
    return lambda option: n


def go(data, folder, *flags):
    place = ["--data", data, "--log_dir", folder.parent, "--run_name", folder.name]
    train_gpt2.main([str(word) for word in [*AUTO, *place, *flags]])
    return json.loads((folder / "config.json").read_text())


# --------------------------------------------------------------------------------------------------
# Choosing


def test_sizes_are_those_of_depth(plain, sizes):
    for depth in (1, 3, 8):
        model = plain.build(train_gpt2.shape_of(depth))
        flops = model.flops_per_token(int(2048 * (1 - 0.625 * 0.75)))
        assert sizes[depth - 1] == (depth, model.parameter_counts()["total"], flops)


@pytest.mark.parametrize("length", [10, 40, 100, 300, 3600])
def test_the_smallest_size_within_the_margin_is_taken(length, plain, sizes):
    found = plain.predict(sizes, sizing.reference_speed(), seconds(length))
    chosen = sizing.pick(found)
    best = min(one.loss for one in found)
    assert chosen.loss <= sizing.MARGIN * best
    for one in found[:chosen.option.depth - 1]:
        assert one.loss > sizing.MARGIN * best


def test_more_time_never_takes_a_smaller_size(plain, sizes):
    speed = sizing.reference_speed()
    depths = []
    for length in (1e-3, 1, 10, 40, 100, 300, 3600, 36_000):
        depths.append(sizing.pick(plain.predict(sizes, speed, seconds(length))).option.depth)
    assert depths == sorted(depths)
    assert depths[0] == 1 and depths[2] >= 3 and 7 <= depths[5] <= 12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_take_the_size_that_is_best_for_their_time(device, sizes, capsys):
    one = sizer("--max_steps", "1000", "--context_warmup", "0")
    one.device = SimpleNamespace(type=device)
    depth = one._choose_for_steps(one.sizes())
    option = one.sizes()[depth - 1]
    tokens = 1000 * 131_072 - 183 * 65_536
    speed = Speed(1e15, "", on_gpu=device == "cuda")
    time = tokens / speed.of(option)
    assert sizing.pick(one.predict(one.sizes(), speed, seconds(time))).option.depth == depth
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["size", "why", "basis"]


def test_a_small_memory_leaves_small_sizes(monkeypatch):
    monkeypatch.setattr(sizing, "memory_bytes", lambda device: 2e9)
    one = sizer()
    largest = one.sizes(one.memory)[-1]
    assert largest.parameters * 16 < 0.6 * 2e9 < 2 * largest.parameters * 16


# --------------------------------------------------------------------------------------------------
# Speed and money


def test_dollars_by_hand(plain):
    """$1 at $2 per hour; a validation of 10,485,760 tokens every 250 steps of 131,072, and
    HellaSwag as often, at a third of the time of training."""
    option = Option(7, 30_000_000, 10**9)
    speed = Speed((10**9 + scaling.measured().overhead) * 1e6, "", start_up=20.0)
    assert speed.of(option) == pytest.approx(1e6)
    evaluated = (10_485_760 + 6e6) / 3
    left = 1800 * 0.97 - 100 - 20 - evaluated / 1e6
    want = left / (1 + evaluated / (250 * 131_072))
    assert plain.bought(1.0, speed, 100.0)(option) == pytest.approx(want)
    too_little = plain.bought(0.01, speed, 100.0)
    assert plain.predict([option], speed, too_little) == []


def test_the_speed_of_a_gpu_is_timed_at_about_the_size_that_will_be_chosen(monkeypatch, sizes):
    one = sizer()
    one.device = SimpleNamespace(type="cuda")
    timed = []

    def measure(option):
        timed.append(option)
        return Speed(1e15, "measured")

    one._measure = measure
    assert one.speed(sizes, lambda speed: seconds(300)).how == "measured"
    found = one.predict(sizes, sizing.reference_speed(), seconds(300))
    assert timed == [sizing.pick(found).option]


def test_timing_ten_steps_here(data, monkeypatch):
    """As on a GPU, but on the CPU and with a model of TINY_FLAGS."""
    monkeypatch.setattr(sizing, "device_name", lambda device: "X")
    chosen = train_gpt2.settings([*TINY_FLAGS, "--data", str(data)])
    one = train_gpt2.sizer_of(chosen, train_gpt2.Corpus(chosen.train))
    one.shape_of = lambda depth: dict(n_layer=depth, n_head=2, n_embd=32)
    for option in (one.own(), one.sizes()[2]):
        speed = one._measure(option)
        assert speed.flops > 0 and speed.start_up > 0
        assert speed.how.startswith(f"measured in ten steps of {option.depth} layers")


def test_without_a_gpu_the_assumption_is_stated(monkeypatch, sizes):
    monkeypatch.setattr(doctor, "matmul_flops", lambda device: 1e12)
    one = sizer("--device", "cpu")
    speed = one.speed(sizes, lambda speed: seconds(300))
    assert speed.flops == doctor.REACHED * 1e12 and "assumed" in speed.how
    one = sizer("--device", "cpu", "--tok_per_sec", "1e6")
    assert one.speed(sizes, lambda speed: seconds(300)).of(one.own()) == pytest.approx(1e6)


def test_a_cpu_has_no_overhead(sizes):
    """There, small models are as fast as their FLOPs say; on a GPU they are slower."""
    for device, on_gpu in (("cpu", False), ("cuda", True)):
        one = sizer("--tok_per_sec", "1000")
        one.device = SimpleNamespace(type=device)
        speed = one.speed(sizes, lambda speed: seconds(300))
        ratio = speed.of(sizes[0]) / speed.of(one.own())
        assert (ratio < one.own().flops / sizes[0].flops - 1) == on_gpu


def test_memory_holds_all_experts(monkeypatch):
    monkeypatch.setattr(sizing, "memory_bytes", lambda device: 2e9)
    one = sizer("--n_experts", "8", "--n_active", "1")
    largest = one.sizes(one.memory)[-1]
    model = one.build(train_gpt2.shape_of(largest.depth))
    total = model.parameter_counts()["total"]
    assert largest.parameters < total < 0.6 * 2e9 / 16


def test_the_table_of_plan_has_a_row_per_budget(plain, sizes):
    rows = [line.split() for line in sizing.table(plain, measured=False).splitlines()[2:-1]]
    assert [int(row[0]) for row in rows] == [1, 3, 10, 30, 100]
    depths = [int(row[3]) for row in rows]
    assert depths == sorted(depths)


def test_a_budget_below_the_start_up_has_an_empty_row():
    lines = sizing.table(sizer("--price_per_hour", "1000"), measured=False).splitlines()
    assert lines[2].split(maxsplit=1) == ["1", "no more than start-up and evaluations"]
    assert lines[-2].startswith("    100 ")


# --------------------------------------------------------------------------------------------------
# Runs


def test_a_run_has_a_plain_shape_and_length(data, tmp_path, capsys):
    flags = ["--minutes", "0.01"]
    config = go(data, tmp_path / "a", *flags)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["size", "why", "basis"]
    depth = config["model"]["n_layer"]
    assert train_gpt2.shape_of(depth).items() <= config["model"].items()
    assert f"--depth {depth}," in lines[0]
    assert config["train"]["size"] is config["train"]["dollars"] is None
    again = go(data, tmp_path / "a", *flags)  # finished: the same command trains no more
    assert again["starts"] == config["starts"]
    assert "keeps its shape" in capsys.readouterr().err


def test_dollars_set_the_length(data, tmp_path, capsys):
    config = go(data, tmp_path / "a", "--dollars", "0.04", "--price_per_hour", "2",
                "--tok_per_sec", "100", "--max_hours", "1e-9")
    assert 0 < config["train"]["minutes"] < 0.04 / 2 * 60
    assert config["train"]["max_steps"] is None
    assert "length  $0.04 buys" in capsys.readouterr().out


def test_all_processes_take_the_choice_of_rank_0(data, tmp_path):
    flags = ["--data", data, "--max_steps", 2, "--run_name", "a"]
    done = run_script("train_gpt2.py", *AUTO, *flags, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("size    --depth") == 1
    config = json.loads((tmp_path / "log" / "a" / "config.json").read_text())
    assert config["train"]["processes"] == 2


@pytest.mark.parametrize("flags, named", [
    (["--size", "auto"], "--minutes, --max_steps or --dollars"),
    (["--size", "auto", "--minutes", "1", "--n_layer", "3"], "--n_layer"),
    (["--size", "auto", "--minutes", "1", "--depth", "3"], "--depth"),
    (["--size", "auto", "--minutes", "1", "--init_from", "gpt2"], "--init_from"),
    (["--dollars", "3"], "--price_per_hour"),
    (["--dollars", "3", "--price_per_hour", "2", "--minutes", "4"], "--dollars and --minutes"),
    (["--dollars", "0"], "--dollars must be above 0"),
    (["--dollars", "0.001", "--price_per_hour", "2", "--device", "cpu"], "no more than start-up"),
])
def test_contradicting_flags_are_refused(flags, named, data, tmp_path):
    with pytest.raises(BadInput, match=named):
        train_gpt2.main([*flags, "--data", str(data), "--log_dir", str(tmp_path)])


def test_a_repeated_run_with_initial_weights_keeps_their_shape(data, tmp_path):
    flags = [*TINY_FLAGS, "--data", str(data), "--log_dir", str(tmp_path), "--max_steps", "4"]
    train_gpt2.main([*flags, "--run_name", "a"])
    train_gpt2.main([*flags, "--run_name", "b", "--init_from", str(tmp_path / "a")])
    with pytest.raises(BadInput, match="--init_from"):
        train_gpt2.main(["--config", str(tmp_path / "b"), "--log_dir", str(tmp_path), "--size",
                         "auto", "--run_name", "c"])


def test_the_chosen_shape_is_checked(data, tmp_path):
    """The preset's width has room for these vectors, that of the smallest size has not."""
    flags = ["--no-residual_scalars", "--bigram", "64", "--bigram_dim", "512"]
    with pytest.raises(BadInput, match="--bigram_dim 512"):
        go(data, tmp_path / "a", "--max_steps", "2", *flags)


def test_depth_replaces_the_size_of_a_repeated_run(data, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    config = {"train": {"preset": "gpt2", "size": "gpt2-xl"}, "model": {"n_layer": 48}}
    (folder / "config.json").write_text(json.dumps(config))
    chosen = train_gpt2.settings(["--config", str(folder), "--depth", "3"])
    assert chosen.train.size is None and chosen.model.n_layer == 3


def test_ablations_have_one_size(data):
    with pytest.raises(BadInput, match="--depth"):
        ablate.check_flags([*AUTO, "--data", str(data), "--max_steps", "3"], [])


def test_the_script_is_that_of_the_run():
    assert sizer().script == ROOT / "train_gpt2.py"
