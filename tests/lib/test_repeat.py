"""--config repeats a run: python -m pytest tests/lib/test_repeat.py"""

import json
import shutil

import pytest
from helpers import TINY_FLAGS, sentences, write_lines
from runs import assert_same_runs, cut, steps_saved

import ablate
import posttrain
import train_gpt2
from lib import checkpoint, repeat
from lib.cli import BadInput
from lib.corpus import Corpus

UNUSUAL = ["--preset", "speedrun", "--batch_warmup", "512", "--dropout", "0.1", "--seed", "7",
           "--norm", "layernorm", "--max_lr", "0.02", "--schedule", "cosine", "--save_every", "2",
           "--keep", "0"]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log")


@pytest.fixture(scope="module")
def first(data, log):
    """The folder of a run whose settings are no preset's."""
    train(log, "first", *TINY_FLAGS, "--data", data, *UNUSUAL)
    return log / "first"


@pytest.fixture(scope="module")
def texts(log):
    rows = [{"prompt": "the cat", "completion": text[:30]} for text in sentences(40)]
    return write_lines(log / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def post(first, texts, log):
    """The folder of a post-training run of `first`."""
    posttrain.main(words(log, "post", "--checkpoint", first, "--data", texts, "--dropout", 0.2,
                         "--total_batch_size", 256, "--max_steps", 4, "--lr_scale", 0.5,
                         "--replay", 0.3, "--sample_every", 0, "--seed", 5, "--device", "cpu"))
    return log / "post"


def words(log, name, *flags):
    return [str(word) for word in ("--log_dir", log, "--run_name", name, *flags)]


def train(log, name, *flags):
    train_gpt2.main(words(log, name, *flags))


def edit(source, to, change):
    """A copy of a run folder whose config.json is changed by `change(config)`."""
    shutil.copytree(source, to)
    config = json.loads((to / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_run_is_repeated_in_every_digit(first, log, capsys):
    for name, config in (("second", first), ("third", first / "config.json")):
        train(log, name, "--config", config)
        assert_same_runs(log / name, first)
    assert capsys.readouterr().err == ""
    own = json.loads((log / "second" / "config.json").read_text())
    assert own["train"]["config"] == str(first)
    train(log, "fourth", "--config", log / "second")  # of a run that is itself a repetition
    assert_same_runs(log / "fourth", first)


def test_flags_are_on_top(first):
    before = train_gpt2.settings(["--config", str(first)])
    assert before.train.seed == 7 and before.model.norm == "layernorm"
    after = train_gpt2.settings(["--config", str(first), "--mlp", "gelu", "--minutes", "3"])
    assert after.model.mlp == "gelu" and after.model.norm == "layernorm"
    assert after.train.minutes == 3 and after.train.max_steps is None
    other = train_gpt2.settings(["--config", str(first), "--optimizer", "adamw"]).train
    assert other.max_lr == train_gpt2.RATES["adamw"]["max_lr"]  # Muon's would not fit
    assert other.seed == 7


def test_an_interrupted_repetition_continues(first, log):
    train(log, "cut", "--config", first)
    again = cut(log / "cut", log / "again", 4)
    train(log, "again", "--config", first)
    assert_same_runs(again, first)
    assert steps_saved(again) == [2, 4, 6]
    with pytest.raises(BadInput, match=r"started with --config .*first, not --config .*cut"):
        train(log, "again", "--config", log / "cut")


def test_weights_that_a_run_began_with_and_its_other_settings_are_repeated(first, log):
    flags = ["--data", train_gpt2.settings(["--config", str(first)]).train.data[0], *TINY_FLAGS[2:]]
    train(log, "begun", "--init_from", first, *flags, "--dropout", 0.3)
    train(log, "begun_again", "--config", log / "begun")
    assert_same_runs(log / "begun_again", log / "begun")


def test_a_setting_younger_than_the_file_is_off(first, tmp_path):
    def age(config):
        del config["train"]["shuffle"], config["model"]["qk_norm"], config["train"]["config"]

    settings = train_gpt2.settings(["--config", str(edit(first, tmp_path / "old", age))])
    assert not settings.train.shuffle and not settings.model.qk_norm  # on in speedrun and modern


def test_what_is_not_repeated_is_said_in_a_line_each(first, log, tmp_path, capsys):
    def change(config):
        config["data"] = "other"
        config["torch"] = "1.0"
        config["starts"][-1]["commit"] = "abc"
        config["starts"].append({"step": 3, "commit": "def", "changed": "--max_lr 0.1 -> 0.2"})

    changed = edit(first, tmp_path / "changed", change)
    train(log, "other", "--config", changed)
    lines = capsys.readouterr().err.splitlines()
    says = ["training data is not what", "commit def ran it", "torch 1.0 ran it",
            "changed at step 3: --max_lr 0.1 -> 0.2"]
    assert len(lines) == len(says)
    for line, part in zip(lines, says):
        assert line.startswith(f"--config {changed}") and part in line
    train(log, "other", "--config", changed)  # finished: it has its own settings
    assert capsys.readouterr().err == ""


def test_code_that_is_not_committed_and_lengths_in_minutes_are_not_repeated(first, tmp_path,
                                                                         monkeypatch):
    def change(config):
        config["starts"][0] |= {"step": 4, "from": "log/x/ckpt_00004.pt", "commit": "abc"}

    monkeypatch.setattr(repeat, "commit", lambda: {"commit": "abc"})

    changed = edit(first, tmp_path / "changed", change)
    (changed / "code.diff").write_text("another diff")
    path, config = repeat.read(str(changed))
    settings = train_gpt2.settings(["--config", str(changed), "--minutes", "1"])
    settings = settings._replace(explicit={"config"})  # as if the run had had these minutes
    found = repeat.differences(path, config, settings, Corpus(settings.train))
    says = ["are not those of", "began at step 4 of log/x", "give --max_steps 6"]
    assert len(found) == len(says)
    for line, part in zip(found, says):
        assert part in line


@pytest.mark.parametrize("content, says", [
    ("{", "is damaged"),
    ("[]", "is not the config.json of a run"),
    ('{"model_type": "gpt2"}', "is not the config.json of a run"),
    ('{"train": {"seed": -1}, "model": {}}', "--seed must be at least 0 .*not -1; name another"),
    ('{"train": {"mlp": 3}, "model": {"mlp": "x"}}', "--mlp must be"),
    ('{"train": {"checkpoint": "x"}, "model": {}}', "is of another script's run"),
])
def test_another_file_is_refused(content, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    for name in (path, tmp_path):
        with pytest.raises(BadInput, match=f"config.json.*{says}"):
            train_gpt2.settings(["--config", str(name)])


def test_flags_that_exclude_each_other(first, tmp_path):
    with pytest.raises(BadInput, match="--config and --preset each choose"):
        train_gpt2.settings(["--config", str(first), "--preset", "tiny"])
    with pytest.raises(BadInput, match="cannot read .*missing"):
        train_gpt2.settings(["--config", str(tmp_path / "missing")])
    with pytest.raises(BadInput, match="is of another script's run"):
        posttrain.prepare(["--config", str(first)])


def test_a_post_training_run_is_repeated_in_every_digit(post, log, capsys):
    posttrain.main(words(log, "post2", "--config", post))
    assert capsys.readouterr().err == ""
    assert_same_runs(log / "post2", post)
    assert checkpoint.read(log / "post2" / "ckpt_00004.pt")["model_config"]["dropout"] == 0.2


def test_flags_are_on_top_in_post_training(post, first):
    cfg = posttrain.prepare(["--config", str(post)])[0].train
    assert cfg.max_lr == pytest.approx(0.02 * 0.5) and cfg.seed == 5
    cfg = posttrain.prepare(["--config", str(post), "--lr_scale", "0.2", "--replay", "0"])[0].train
    assert cfg.max_lr == pytest.approx(0.02 * 0.2) and cfg.replay == 0
    with pytest.raises(BadInput, match="--optimizer adamw is not the checkpoint's"):
        posttrain.prepare(["--config", str(post), "--optimizer", "adamw"])
    cfg = posttrain.prepare(["--config", str(post), "--checkpoint",
                             str(first / "ckpt_00002.pt")])[0].train
    assert cfg.checkpoint.endswith("ckpt_00002.pt")
    assert posttrain.superseded({"model", "data"}) == {"checkpoint": None, "model": None}


def test_a_repeated_run_is_the_base_of_an_ablation(first):
    base = ["--config", str(first)]
    changes = ablate.default_changes(base)
    assert "mlp_gelu" in changes and "norm_layernorm" not in changes
    assert ablate.check_flags(base, changes["mlp_gelu"]) == "cpu"
