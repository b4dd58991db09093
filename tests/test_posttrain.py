"""posttrain.py, for real at a tiny size: python -m pytest tests/test_posttrain.py"""

import gc
import json
import random
import re
import shlex
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROOT,
    TINY_FLAGS,
    hellaswag_items,
    read_log,
    save_random_gpt2,
    sentences,
    tiny_checkpoint,
    write_data,
    write_lines,
)
from runs import assert_same_runs, cut, lines, scalars, steps_saved

import chat
import generate
import posttrain
import train_gpt2
from lib import checkpoint
from lib.chat_template import END, JINJA
from lib.cli import BadInput, resolve
from lib.conversations import hold_out, read, truncate
from lib.devices import Processes
from lib.packing import Packing
from lib.shards import Shards
from lib.tokenizers import load_tokenizer, train_bpe
from train_gpt2 import GPT, load_checkpoint, mean_loss

FLAGS = ["--total_batch_size", "256", "--device", "cpu", "--max_steps", "12", "--sample_every", "0",
         "--val_tokens", "330", "--eval_every", "4"]


def chats(n, seed=0):
    """Rows of the layout `messages` that a tiny model learns quickly, of one or two turns, some
    with a system message."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        turns = []
        for _ in range(rng.randint(1, 2)):
            animal = rng.choice(["cat", "dog", "bird"])
            place = rng.choice(["mat", "roof", "table"])
            turns.append({"role": "user", "content": f"where is the {animal}?"})
            turns.append({"role": "assistant", "content": f"on the {place}."})
        if rng.randint(0, 1):
            turns.insert(0, {"role": "system", "content": "the cat."})
        rows.append({"messages": turns})
    return rows


def pairs(questions, answers):
    """Rows of the layout `prompt/completion`."""
    return [{"prompt": question, "completion": answer}
            for question, answer in zip(questions, answers, strict=True)]


@pytest.fixture(scope="session")
def base(data, tmp_path_factory):
    """A function: flags of train_gpt2.py -> the checkpoint of a run of 20 steps on `data`."""
    made = {}
    folder = tmp_path_factory.mktemp("base")

    def run(*flags):
        if flags not in made:
            name = f"run{len(made)}"
            train_gpt2.main([*TINY_FLAGS, "--data", str(data), "--log_dir", str(folder),
                             "--run_name", name, "--max_steps", "20", *flags])
            made[flags] = newest(folder / name)
        return made[flags]
    return run


@pytest.fixture
def chat_file(tmp_path):
    return write_lines(tmp_path / "chats.jsonl", chats(80))


@pytest.fixture
def log(tmp_path):
    """The folder of the runs of a test."""
    return tmp_path / "log"


def command(base, data, folder, *flags):
    return [str(word) for word in ("--checkpoint", base, "--data", data, "--log_dir", folder.parent,
                                   "--run_name", folder.name, *FLAGS, *flags)]


def main(*words):
    """posttrain.py with these words."""
    posttrain.main([str(word) for word in words])


def post(base, data, folder, *flags):
    """Post-train a checkpoint for 12 steps -> the run folder."""
    posttrain.main(command(base, data, folder, *flags))
    return folder


def again(folder, *flags):
    """Continue a run by its name."""
    main("--log_dir", folder.parent, "--run_name", folder.name, *flags)


def newest(folder):
    return checkpoint.found(folder)[0][1]


def saved(folder):
    """The content of a run's newest checkpoint."""
    return checkpoint.read(newest(folder))


KINDS = {
    "gpt2": (),
    "modern": ("--preset", "modern", "--n_head", "2"),
    "speedrun": ("--preset", "speedrun", "--n_layer", "2", "--n_head", "2", "--n_embd", "32",
                 "--block_size", "32", "--batch_warmup", "0"),
    "experts": ("--preset", "modern", "--n_head", "2", "--n_experts", "4", "--n_active", "2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns_to_answer(kind, base, chat_file, log, capsys):
    folder = post(base(*KINDS[kind]), chat_file, log / "post", "--lr_scale", 1, "--sample_every",
                  12)
    out = capsys.readouterr().out
    losses = read_log(folder)
    assert losses[12, "val"] < losses[0, "val"] - 0.3
    model, tokenizer, state = load_checkpoint(newest(folder))
    assert model.config.vocab_size == tokenizer.vocab_size + 4 == 284
    assert state["chat_template"] == JINJA
    assert state["train_config"]["optimizer"] == ("muon" if kind == "speedrun" else "adamw")
    assert "80 conversations (layout messages)" in out and "> where is the" in out

    first = losses[0, "val_pretraining"]
    last = losses[12, "val_pretraining"]
    found = re.search(
        r"forgetting: pretraining validation loss (\S+) -> (\S+) \((\S+) nats per token\)", out)
    printed = [float(number) for number in found.groups()]
    assert printed == pytest.approx([first, last, last - first], abs=2e-4)
    assert abs(last - first) > 0.01


PRETRAINED = {
    "optimizer": "muon", "max_lr": 0.03, "embedding_lr": 0.01, "bigram_lr": 0.3, "head_lr": 0.004,
    "vector_lr": None, "momentum": 0.9, "data": ["a:1", "b"],
}
POSTTRAINED = PRETRAINED | {"checkpoint": "x", "lr_scale": 0.1, "data": ["c"], "replay_data": ["a"]}


@pytest.mark.parametrize("before, flags, want", [
    (PRETRAINED, {},
     dict(optimizer="muon", max_lr=0.003, embedding_lr=0.001, bigram_lr=0.03, head_lr=0.0004,
          vector_lr=None, lr_scale=0.1, momentum=0.9, replay_data=("a:1", "b"))),
    (PRETRAINED, dict(lr_scale=0.5, head_lr=0.2, momentum=0.8, replay_data=("d",)),
     dict(max_lr=0.015, embedding_lr=0.005, head_lr=0.2, momentum=0.8, replay_data=("d",))),
    (PRETRAINED, dict(optimizer="adamw", max_lr=1e-3),  # Muon's rates do not fit
     dict(optimizer="adamw", max_lr=1e-3, embedding_lr=None, head_lr=None, lr_scale=None)),
    (POSTTRAINED, {},  # its rates are scaled already
     dict(max_lr=0.03, embedding_lr=0.01, head_lr=0.004, lr_scale=1.0, replay_data=("a",))),
    (POSTTRAINED, dict(lr_scale=0.5), dict(max_lr=0.015, embedding_lr=0.005, head_lr=0.002)),
    ({"max_lr": 6e-4, "data": "old"}, {},
     dict(optimizer="adamw", max_lr=6e-5, momentum=0.95, replay_data=("old",), val_tokens=2**20)),
    (PRETRAINED | {"val_tokens": 65_536}, {}, dict(val_tokens=65_536)),
    (PRETRAINED | {"val_tokens": 10**7}, {}, dict(val_tokens=2**20)),
    (PRETRAINED | {"val_tokens": 65_536}, dict(val_tokens=99_999), dict(val_tokens=99_999)),
])
def test_settings_inherited_from_the_checkpoint(before, flags, want):
    cfg = posttrain.Config(**flags)
    cfg = resolve(cfg, posttrain.inherited(cfg, before, set(flags)))
    for name, value in want.items():
        expected = pytest.approx(value) if isinstance(value, float) else value
        assert getattr(cfg, name) == expected, name


def test_length_validations_and_samples_without_a_flag(base, tokenizer, chat_file, tmp_path, log,
                                                       capsys):
    """Two epochs of 78 rows, a quarter of all being replay, in steps of 8 rows: 26 steps, validated
    after every third."""
    main("--checkpoint", base(), "--data", chat_file, "--log_dir", log, "--run_name", "post",
         "--total_batch_size", 256, "--device", "cpu", "--val_tokens", 330, "--epochs", 2,
         "--replay", 0.25, "--dropout", 0.1, "--sample_prompt", "the bird", "--max_lr", 1e-3)
    losses = read_log(log / "post")
    out = capsys.readouterr().out
    assert max(losses)[0] == 26
    assert sorted(step for step, kind in losses if kind == "val") == [*range(0, 26, 3), 26]
    assert out.count("> the bird -> ") == 2 * 9 and "where is" not in out
    assert load_checkpoint(newest(log / "post"))[0].config.dropout == 0.1
    # a position in the data includes one in the rows of replay
    other = write_data(tmp_path / "other", tokenizer, shards=1)
    again(log / "post", "--max_steps", 27, "--replay_data", other)
    assert "other training data, read from its beginning" in capsys.readouterr().out


@pytest.mark.parametrize("tokens, row, want",
                         [(82 * 2048, 2048, 16_384), (79 * 2048, 2048, 4 * 2048),
                          (10**9, 1024, 16_384), (10**9, 1000, 16_000),
                          (10**9, 3 * 1024, 4 * 3 * 1024), (10**9, 8 * 4096, 8 * 4096),
                          (2496, 32, 128), (2496, 2 * 32, 128), (100, 32, 32)])
def test_the_default_batch_is_small_enough_for_the_data(tokens, row, want):
    assert posttrain.pick_batch(tokens, row) == want


def test_little_data_is_learned_with_default_flags_and_a_resumed_run_keeps_its_batch(
        base, chat_file, tmp_path, log, capsys):
    def batch(name):
        return saved(log / name)["train_config"]["total_batch_size"]

    here = ("--log_dir", log, "--device", "cpu", "--val_tokens", 330)
    new = (*here, "--checkpoint", base(), "--data")
    main(*new, chat_file, "--run_name", "whole", "--save_every", 30, "--keep", 0)
    losses = read_log(log / "whole")
    last, _ = max(losses)
    assert batch("whole") == 128
    assert last > 3 * 10 and losses[last, "val"] < losses[0, "val"] - 0.3
    assert "teaches little" not in capsys.readouterr().out

    cut(log / "whole", log / "again", 30)
    main(*here, "--run_name", "again")
    assert_same_runs(log / "again", log / "whole")
    main(*new, chat_file, "--run_name", "micro", "--micro_batch", 12, "--max_steps", 1)
    assert batch("micro") == 12 * 32

    few = write_lines(tmp_path / "few.jsonl", chats(20))
    main(*here, "--run_name", "again", "--data", few, "--max_steps", 60)
    assert batch("again") == 128
    main(*new, few, "--run_name", "short", "--epochs", 0.5)
    assert ("warning: a run of 9 steps teaches little: give more data, or raise --epochs\n"
            in capsys.readouterr().out)


def test_text_among_conversations_is_learned_whole(chat_file, tokenizer, tmp_path):
    def read_files(*files):
        cfg = posttrain.Config(data=tuple(map(str, files)), val_share=0.0)
        return posttrain.Data(cfg, tokenizer, 16)

    def learned(data):
        _, targets, _ = data.source.all()
        return sorted(targets[targets >= 0].tolist())

    text = " ".join(sentences(30))
    (tmp_path / "long.txt").write_text(text)
    both = read_files(chat_file, tmp_path / "long.txt")
    alone = read_files(chat_file)
    assert learned(both) == sorted(learned(alone) + tokenizer.encode(text).tolist())
    assert f" tokens {len(learned(both)):,} are learned" in both.lines[-1]


def loss_of(model, conversations):
    """(ids, learned) each -> summed loss of the learned tokens, and their number. Padding ids take
    part in the softmax, as in training."""
    nats, count = 0.0, 0
    for ids, learned in conversations:
        logits = hidden(model, torch.tensor([ids[:-1]])) @ model.lm_head.weight.T
        targets = torch.tensor(ids[1:]).masked_fill(~torch.tensor(learned[1:]), -1)
        nats = nats + F.cross_entropy(logits[0], targets, ignore_index=-1, reduction="sum")
        count += sum(learned[1:])
    return nats, count


def test_the_losses_are_those_of_a_plain_loop_over_single_conversations(base, chat_file, log):
    """Without packing and micro-batches: each conversation is a forward pass of its own, and the
    loss is computed from its logits."""
    folder = post(base(), chat_file, log / "post", "--max_lr", 5e-3, "--weight_decay", 0.5,
                  "--micro_batch", 2, "--seed", 5)
    before, tokenizer, _ = load_checkpoint(base())
    examples, _ = read(str(chat_file))
    train, val = hold_out(examples, 0.05, 5)
    items = [truncate(example, tokenizer, 33)[:2] for example in train]
    val_items = [truncate(example, tokenizer, 33)[:2] for example in val]
    packing = Packing(items, 32, 5, tokenizer.eot)
    vocab_size, weights = posttrain.grow(before, tokenizer)
    model = GPT(replace(before.config, vocab_size=vocab_size)).train()
    model.load_state_dict(weights)

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}],
        lr=5e-3, betas=(0.9, 0.95))
    losses, epochs = {}, []
    epoch = row = 0
    for step in range(13):
        if step % 4 == 0:
            nats, count = loss_of(model, val_items)
            losses[step, "val"] = nats.item() / count
        if step == 12:
            break
        members = []
        for _ in range(8):
            rows, n_rows = packing.of(epoch)
            if row == n_rows:
                epoch += 1
                row = 0
                rows, _ = packing.of(epoch)
            members += rows[row].tolist()
            row += 1
        epochs.append((step, epoch))
        nats, count = loss_of(model, [items[i] for i in members])
        losses[step, "train"] = nats.item() / count
        optimizer.zero_grad()
        (nats / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / 12)
        optimizer.step()
    assert epoch > 0 and scalars(folder)["data/epoch"] == epochs
    found = read_log(folder)
    assert {key: found[key] for key in losses} == pytest.approx(losses, rel=2e-5)


def hidden(model, idx):
    """The hidden states behind the last norm."""
    kept = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    model(idx)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize("kind", ["modern", "speedrun"])
def test_an_interrupted_run_repeats_the_undisturbed_one(kind, base, chat_file, log):
    whole = post(base(*KINDS[kind]), chat_file, log / "whole", "--replay", 0.2, "--dropout", 0.1,
                 "--save_every", 5, "--keep", 0)
    other = cut(whole, log / "again", 5)
    again(other)  # its name is enough
    assert_same_runs(other, whole)
    assert scalars(other) == scalars(whole)


def test_a_run_started_with_the_warm_up_of_pretraining_keeps_it(base, chat_file, log):
    """As runs were before the default of --warmup_steps became 0: a quarter of 12 steps, up to the
    1e-3 that falls over the other 9."""
    whole = post(base(), chat_file, log / "whole", "--save_every", 1, "--keep", 0, "--max_lr", 1e-3)
    old = cut(whole, log / "old", 1)
    state = saved(old)
    state["train_config"]["warmup_steps"] = None
    checkpoint.write(newest(old), state)
    again(old)
    rates = dict(scalars(old)["optim/lr"])
    assert [rates[step] for step in (1, 2, 3, 6)] == pytest.approx([2e-3 / 3, 1e-3, 1e-3, 2e-3 / 3])


@pytest.mark.parametrize("processes, flags", [
    (2, ("--micro_batch", 2)),
    (1, ("--micro_batch", 1)),
    (2, ("--micro_batch", 2, "--parallel", "fsdp", "--checkpoint_activations")),
    pytest.param(2, ("--micro_batch", 2, "--compile"), marks=pytest.mark.slow),
], ids=["two", "half", "fsdp", "compiled"])
def test_two_processes_and_any_micro_batch_have_the_same_losses(processes, flags, base, chat_file,
                                                                log, launch):
    common = ("--replay", 0.2, "--max_lr", 5e-3)
    one = read_log(post(base(), chat_file, log / "one", *common, "--micro_batch", 8))
    words = command(base(), chat_file, log / "other", *common, *flags)
    result = launch("posttrain.py", *words, processes=processes)
    assert result.returncode == 0, result.stderr
    assert "was recompiled" not in result.stdout
    assert read_log(log / "other") == pytest.approx(one, rel=1e-4)
    code = (log / "other" / "posttrain.py").read_bytes()
    assert code == (ROOT / "posttrain.py").read_bytes()


def test_any_micro_batch_has_the_same_losses_with_muon_and_experts(base, chat_file, log):
    start = base(*KINDS["speedrun"], "--n_experts", "4", "--n_active", "2")
    one = post(start, chat_file, log / "8", "--replay", 0.2, "--micro_batch", 8)
    half = post(start, chat_file, log / "1", "--replay", 0.2, "--micro_batch", 1)
    assert read_log(half) == pytest.approx(read_log(one), rel=1e-5)


def test_text_in_files_and_shards_is_continued_pretraining(base, data, tmp_path, log):
    import pyarrow as pa
    import pyarrow.parquet

    texts = sentences(60)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    table = pa.table({"text": texts, "id": list(range(60))})
    pa.parquet.write_table(table, tmp_path / "b.parquet")
    for source in (tmp_path / "a.txt", tmp_path / "b.parquet", data):
        folder = post(base(), source, log / source.name, "--max_lr", 5e-3, "--replay", 0.1)
        losses = read_log(folder)
        assert losses[12, "val"] < losses[0, "val"] - 0.2
        state = saved(folder)
        assert state["model_config"]["vocab_size"] == 280 and "chat_template" not in state
    # the last source was the shards of pretraining
    assert losses[0, "val"] == losses[0, "val_pretraining"]


def test_a_share_of_the_epochs_of_shards_is_replay(data, tokenizer):
    shards = posttrain.ShardData(posttrain.Config(data=(str(data),), replay=0.1), tokenizer, 32)
    epochs, name = shards.most_repeated(1000)
    assert name == "toy" and epochs == pytest.approx(900 / Shards(data).tokens["train"])


def test_shards_have_the_losses_of_pretraining_with_the_same_weights(base, data, tokenizer, log):
    """train_gpt2.py's stream and optimizer in a plain loop."""
    folder = post(base(), data, log / "plain", "--max_lr", 5e-3, "--weight_decay", 0.1)
    found = read_log(folder)
    model = load_checkpoint(base())[0].train()
    corpus = train_gpt2.Corpus(train_gpt2.TrainConfig(data=(str(data),)))
    stream = train_gpt2.token_stream(corpus, tokenizer, 1337, 32)
    optimizer = train_gpt2.make_optimizer(model, train_gpt2.TrainConfig(max_lr=5e-3))
    for step in range(12):
        tokens = torch.from_numpy(stream.next(256))
        loss = model(tokens[:-1].view(8, 32), tokens[1:].contiguous().view(8, 32)) / 256
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / 12)
        optimizer.step()
        optimizer.zero_grad()
        assert found[step, "train"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_mixture_of_shards_shows_the_progress_of_every_source(base, data, tokenizer, tmp_path,
                                                                log):
    other = write_data(tmp_path / "other", tokenizer, shards=1)
    folder = post(base(), f"{data}:1", log / "post", "--data", f"{other}:3", "--max_lr", 5e-3,
                  "--max_steps", 40)
    shown = scalars(folder)
    toy = [n for _, n in shown["data/tokens_toy"]]
    others = [n for _, n in shown["data/tokens_other"]]
    assert [a + b for a, b in zip(toy, others)] == [256 * (step + 1) for step in range(40)]
    assert abs(others[-1] - 0.75 * 40 * 256) <= 3 * 32
    size = Shards(other).tokens["train"]
    assert others[-1] > size
    assert shown["data/epoch_other"] == [(step, n // size) for step, n in enumerate(others)]
    assert "data/epoch" not in shown


def test_the_best_checkpoint_stays_and_is_named(base, tmp_path, log, capsys):
    """Validation on other answers than those learned: its loss ends above its lowest,
    and --keep 1 keeps the newest and the best."""
    few = write_lines(tmp_path / "few.jsonl", chats(6))
    answers = sentences(20)
    val = write_lines(tmp_path / "val.jsonl", pairs(["where is the cat?"] * 20, answers))
    folder = post(base(), few, log / "post", "--max_steps", 40, "--eval_every", 4, "--max_lr", 0.01,
                  "--keep", 1, "--val_data", val)
    losses = {step: value for (step, kind), value in read_log(folder).items() if kind == "val"}
    best = min((step for step in losses if step), key=losses.get)
    assert best < 40 and steps_saved(folder) == [best, 40]
    path = folder / f"ckpt_{best:05d}.pt"
    out = capsys.readouterr().out
    assert f"best    validation loss {losses[best]:.4f}, at step {best}: {path}" in out
    assert f"chat.py --checkpoint {shlex.quote(str(path))}" in out

    model, tokenizer, _ = load_checkpoint(path)
    examples, _ = read(str(val))
    items = [truncate(example, tokenizer, 33)[:2] for example in examples]
    rows = Packing(items, 32, None, tokenizer.eot).all()
    assert mean_loss(model, rows, 4, Processes("cpu")) == pytest.approx(losses[best], abs=1e-5)


@pytest.fixture
def overfit(base, tmp_path, log):
    """overfit(name, *flags) -> the words of a run whose validation, on other answers than those
    learned, soon gets worse."""
    few = write_lines(tmp_path / "few.jsonl", chats(6))
    answers = sentences(20)
    val = write_lines(tmp_path / "val.jsonl", pairs(["where is the cat?"] * 20, answers))

    def words(name, *flags):
        return command(base(), few, log / name, "--val_data", val, "--max_steps", 40,
                       "--eval_every", 4, "--max_lr", 0.01, "--save_every", 2, "--keep", 0, *flags)

    return words


def patience_ends(losses, patience):
    """(step of the best validation, step at which `patience` ends a run) by the losses of a whole
    run."""
    best = None
    for step in sorted(losses):
        if step and (best is None or losses[step] < losses[best]):
            best = step
        if best is not None and (step - best) // 4 >= patience:
            return best, step
    raise AssertionError("the validation loss does not rise")


def test_patience_stops_a_run_and_keeps_its_best_checkpoint(overfit, log, capsys, launch):
    main(*overfit("whole"))
    losses = {step: loss for (step, kind), loss in read_log(log / "whole").items() if kind == "val"}
    best, end = patience_ends(losses, 3)
    assert end < 40
    capsys.readouterr()
    main(*overfit("early", "--patience", 3, "--keep", 1))
    printed = capsys.readouterr().out
    path = log / "early" / f"ckpt_{best:05d}.pt"
    assert "patience: the last 3 validations were not below " in printed
    assert f"{losses[best]:.4f} of step {best}; a higher --patience continues" in printed
    assert f"chat.py --checkpoint {shlex.quote(str(path))}" in printed
    assert steps_saved(log / "early") == [best, end]
    assert lines(log / "early") == [line for line in lines(log / "whole")
                                    if int(line.split()[0]) < end or line.startswith(f"{end} val")]

    # the same command stops there again; a higher patience continues to the end
    before = lines(log / "early")
    again(log / "early")
    assert "patience: the last 3 validations" in capsys.readouterr().out
    assert lines(log / "early") == before and steps_saved(log / "early") == [best, end]
    again(log / "early", "--patience", 99)
    assert_same_runs(log / "early", log / "whole")
    assert "patience:" not in capsys.readouterr().out

    # two processes decide alike
    result = launch("posttrain.py", *overfit("two", "--patience", 3), processes=2)
    assert result.returncode == 0, result.stderr
    assert "patience: the last 3 validations" in result.stdout
    assert steps_saved(log / "two")[-1] == end


@pytest.mark.parametrize("ago", [1, 2, 4, 6, 8])
def test_patience_counts_over_an_interruption(ago, overfit, log):
    main(*overfit("early", "--patience", 2))
    end = steps_saved(log / "early")[-1]
    other = cut(log / "early", log / "again", end - ago)
    again(other)
    assert_same_runs(other, log / "early")


def test_patience_does_not_end_a_run_at_its_last_step(overfit, log, capsys):
    main(*overfit("whole"))
    losses = {step: loss for (step, kind), loss in read_log(log / "whole").items() if kind == "val"}
    best, _ = patience_ends(losses, 3)
    main(*overfit("exact", "--patience", (40 - best) // 4))
    assert saved(log / "exact")["finished"]
    assert "patience:" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, says", [
    (["--eval_every", 0], "--patience needs validations: give --eval_every"),
    (["--val_share", 0], "--patience needs validation data: give --val_share"),
    (["--no-keep_best"], "--patience keeps the best checkpoint: leave --no-keep_best out"),
])
def test_patience_needs_validations(flags, says, base, chat_file, log):
    with pytest.raises(BadInput, match=says):
        post(base(), chat_file, log / "x", "--patience", 2, *flags)
    assert not log.exists()


def test_the_best_checkpoint_is_one_of_this_run_on_this_validation_data(base, chat_file, tmp_path,
                                                                        log, capsys):
    """Both runs continue with losses no lower than the best before them, whose checkpoint, or whose
    data, is not theirs."""
    folder = post(base(), chat_file, log / "post", "--max_lr", 5e-3)
    before, _ = saved(folder)["best"]
    backwards = [text[::-1] for text in sentences(20)]
    hard = write_lines(tmp_path / "hard.jsonl", pairs(["the cat"] * 20, backwards))
    capsys.readouterr()
    start = newest(folder)
    for name, flags in (("branch", ("--max_lr", 0.5)), ("post", ("--val_data", hard))):
        main("--resume", start, "--log_dir", log, "--run_name", name, "--max_steps", 20, *flags)
        loss, step = saved(log / name)["best"]
        assert step >= 12 and loss >= before
        assert loss == pytest.approx(read_log(log / name)[step, "val"], abs=1e-5)
        path = log / name / f"ckpt_{step:05d}.pt"
        assert path.exists() and f"at step {step}: {path}" in capsys.readouterr().out


def test_the_initial_weights_are_freed(base, chat_file, log, monkeypatch):
    start = base()
    loaded = []  # weak references to what was loaded
    real_load = posttrain.load_checkpoint
    real_train = train_gpt2.train

    def load(path):
        model, tokenizer, state = real_load(path)
        for tensor in (*model.parameters(), *state["model"].values()):
            loaded.append(weakref.ref(tensor))
        return model, tokenizer, state

    def train(*args):
        gc.collect()
        assert loaded and all(tensor() is None for tensor in loaded)
        real_train(*args)

    monkeypatch.setattr(posttrain, "load_checkpoint", load)
    monkeypatch.setattr(train_gpt2, "train", train)
    assert newest(post(start, chat_file, log / "post")).name == "ckpt_00012.pt"


def test_gpt2_learns_to_chat_and_is_named_by_its_run_folder(chat_file, tmp_path, monkeypatch,
                                                            capsys):
    """From "gpt2", here a folder of that name that only completes text, to a model for chat.py."""
    monkeypatch.chdir(tmp_path)
    save_random_gpt2(tmp_path / "gpt2")
    flags = ["--temperature", "0", "--max_new_tokens", "4", "--device", "cpu"]
    generate.main(["--model", "gpt2", "--prompt", "the cat", "--samples", "1", *flags])
    assert capsys.readouterr().out.startswith("the cat")
    chat.main(["--model", "gpt2", "-p", "the cat", *flags])
    assert "gpt2 has not learned to chat: it continues your text" in capsys.readouterr().err

    words = ("--model", "gpt2", "--data", chat_file, "--run_name", "post", *FLAGS, "--eval_every",
             2, "--total_batch_size", 192)
    main(*words, "--max_steps", 4)
    state = saved(tmp_path / "log" / "post")
    assert state["train_config"]["max_lr"] == pytest.approx(6e-5)
    assert state["train_config"]["model"] == "gpt2"
    assert state["model_config"]["vocab_size"] == 50261
    assert len(state["model"]["transformer.wte.weight"]) == 50304

    shutil.rmtree("gpt2")
    main(*words, "--max_steps", 6)  # continues without it
    _, best = saved(tmp_path / "log" / "post")["best"]
    capsys.readouterr()
    chat.main(["--checkpoint", "log/post", "-p", "where is the cat?", *flags])
    assert f"log/post: ckpt_{best:05d}.pt, the " in capsys.readouterr().err


def test_a_second_round_and_other_scripts_read_the_checkpoint(base, chat_file, data, tmp_path, log,
                                                           launch):
    first = newest(post(base(*KINDS["modern"]), chat_file, log / "first"))
    second = newest(post(first, chat_file, log / "second"))
    before = checkpoint.read(first)["train_config"]
    after = checkpoint.read(second)["train_config"]
    assert before["max_lr"] == pytest.approx(0.1 * 5e-3) and after["max_lr"] == before["max_lr"]
    assert after["replay_data"] == [str(data)]

    texts = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in sentences(40)])
    state = saved(post(second, texts, log / "text"))
    assert state["chat_template"] == JINJA and state["model_config"]["vocab_size"] == 284

    result = launch("generate.py", "--checkpoint", second, "--prompt", "the cat",
                    "--max_new_tokens", 40, "--device", "cpu")
    assert result.returncode == 0 and result.stdout.startswith("the cat"), result.stderr
    items = write_lines(tmp_path / "h.jsonl", hellaswag_items(4))
    result = launch("hellaswag.py", "--checkpoint", second, "--file", items, "--device", "cpu")
    assert result.returncode == 0 and "acc_norm" in result.stdout, result.stderr


def test_generate_ends_with_the_turn(chatty, tokenizer, launch):
    path, model = chatty
    prompt = "the cat sat on the roof"
    ids = tokenizer.encode(prompt).tolist()
    for _ in range(20):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    turn = tokenizer.decode(ids[:ids.index(tokenizer.reserved[END])])
    assert len(prompt) < len(turn) < len(tokenizer.decode(ids))  # what follows could show
    result = launch("generate.py", "--checkpoint", path, "--prompt", prompt, "--max_new_tokens",
                    20, "--temperature", 0, "--samples", 1, "--device", "cpu")
    assert result.returncode == 0 and result.stdout == f"{turn}\n", result.stderr


@pytest.mark.parametrize("changes", [
    {}, dict(vocab_multiple=1), dict(vocab_multiple=94),
    dict(tie_embeddings=False, vocab_multiple=2),
], ids=["room", "no room", "some room", "untied"])
def test_growing_keeps_what_the_model_computes(changes, tokenizer, tmp_path):
    """A turn is as likely to end as a text was."""
    before = tiny_checkpoint(tmp_path / "ckpt.pt", tokenizer, **changes)
    vocab_size, weights = posttrain.grow(before, tokenizer)
    after = GPT(replace(before.config, vocab_size=vocab_size)).eval()
    after.load_state_dict(weights)
    idx = torch.randint(280, (2, 16))
    logits = after(idx)
    assert vocab_size == 284 and torch.equal(logits[..., :280], before(idx))
    expected = before(idx).mean(dim=-1, keepdim=True).repeat(1, 1, 4)
    expected[..., tokenizer.reserved[END] - 280] = logits[..., tokenizer.eot]
    torch.testing.assert_close(logits[..., 280:], expected, atol=1e-5, rtol=1e-4)
    assert after.config.padded_vocab_size == len(after.lm_head.weight)
    assert after.lm_head.weight.isfinite().all()


@pytest.fixture
def bad(data, chat_file, tmp_path):
    """{name: path} of data that cannot be used, or not by every flag."""
    def lines_of(name, rows):
        return write_lines(tmp_path / name, rows)

    long = {"prompt": "the cat " * 50, "completion": "the dog"}
    long_answer = {"prompt": "the", "completion": "the cat " * 50}
    strange_role = {"messages": [{"role": "tool", "content": "x"}]}
    (tmp_path / "half.jsonl").write_text(json.dumps(chats(1)[0]) + "\nnonsense\n")
    (tmp_path / "folder").mkdir()
    shutil.copy(chat_file, tmp_path / "folder")
    lines_of("folder/dataset_infos.json", [{"default": {}}])
    return {
        "missing": tmp_path / "none.jsonl",
        "missing folder": tmp_path / "none",
        "empty folder": tmp_path,
        "csv": lines_of("table.csv", ["a", "b"]),
        "unknown layout": lines_of("odd.jsonl", [{"question": "a", "reply": "b"}]),
        "foreign file": tmp_path / "folder",
        "no conversation": lines_of("bad.jsonl", [{"messages": []}, strange_role]),
        "half": tmp_path / "half.jsonl",
        "one": lines_of("one.jsonl", chats(1)),
        "few": lines_of("few.jsonl", [*chats(1), "nonsense", 7]),
        "too long": lines_of("lost.jsonl", [long, "nonsense"]),
        "some too long": lines_of("long.jsonl", [long, long, long_answer]),
        "text": lines_of("text.jsonl", [{"text": text} for text in sentences(9)]),
        "other tokenizer": write_data(tmp_path / "other", train_bpe(sentences(300, 5), 290)),
        "no val split": without_val(data, tmp_path / "no_val"),
        "chats": chat_file,
        "shards": data,
    }


@pytest.mark.parametrize("source, flags, says", [
    ("missing", [], "cannot read"),
    ("missing folder", [], "cannot read"),
    ("csv", [], "cannot tell what"),
    ("unknown layout", [], "no layout is known of a row with question, reply"),
    ("foreign file", [],
     "infos.json, line 1: .* default .*: rename its columns, or move it out of the folder"),
    ("no conversation", [], "no usable row.*line 1: no messages"),
    ("half", ["--strict"], "line 2: not JSON"),
    ("one", [], "--val_share 0"),
    ("few", [], r"--val_share 0 \(.*: 1 conversations .*; skipped 2 malformed rows: line 2: not"),
    ("chats", ["--val_data", "too long"],
     r"nothing in --val_data can .*validation on .*lost.jsonl: .*skipped 1 malf.*1 too long"),
    ("too long", ["--val_data", "chats"],
     "nothing in --data can .*lost.jsonl: 1 conv.*skipped 1 malf"),
    ("some too long", ["--strict"], "longer than the context"),
    ("other tokenizer", [], "another tokenizer"),
    ("chats", ["--replay", "0.1", "--replay_data", "other tokenizer"], "another tokenizer"),
    ("chats", ["--replay", "0.1", "--replay_data", "empty folder"],
     "does not contain any shards.*name another --replay_data$"),
    ("chats", ["--replay_data", "no val split"], "--val_tokens"),
    ("chats", ["--optimizer", "muon"], "give --max_lr"),
    ("chats", ["--epochs", "2"], "--epochs and --max_steps each set the length"),
    ("chats", ["--data", "shards"], "cannot be mixed with files"),
    ("shards", ["--data", "missing"], "cannot read"),
    ("shards", ["--val_share", "0.5"], "--val_share is for files"),
    ("shards", ["--strict"], "--strict is for files"),
    ("shards", ["--val_data", "chats"], "--val_data is for files"),
    ("text", ["--val_data", "chats"],
     r"none to train on.*\(.*text.jsonl: 9 texts; validation on .*chats.jsonl"),
])
def test_bad_data_and_flags_are_refused_before_anything_is_written(source, flags, says, bad, base,
                                                                   log):
    words = [bad.get(word, word) for word in flags]
    with pytest.raises(BadInput, match=says):
        post(base(), bad[source], log / "x", *words)
    assert not log.exists()


def test_what_a_run_needs_is_named_in_one_line(base, chat_file, log, bad, launch):
    with pytest.raises(BadInput, match="name either --checkpoint"):
        main("--data", chat_file)
    with pytest.raises(BadInput, match="give --data"):
        main("--checkpoint", base())
    pretraining = base().parent
    with pytest.raises(BadInput, match="not a checkpoint of a post-training run"):
        again(pretraining)
    result = launch("posttrain.py", *command(base(), bad["unknown layout"], log / "x"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_a_run_continues_only_from_its_own_checkpoint(base, data, chat_file, tmp_path, log,
                                                       capsys):
    shutil.copytree(data, tmp_path / "old")
    folder = post(base(), chat_file, log / "post", "--replay_data", tmp_path / "old")
    assert "forgetting: pretraining" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--checkpoint"):  # another beginning than the run's
        post(newest(folder), chat_file, folder)
    with pytest.raises(BadInput, match="--lr_scale"):
        post(base(), chat_file, folder, "--lr_scale", 0.5)
    with pytest.raises(BadInput, match="continue it with posttrain.py"):
        train_gpt2.main(["--log_dir", str(log), "--run_name", "post"])

    shutil.rmtree(tmp_path / "old")
    same = base().parent / ".." / base().parent.name / base().name
    again(folder, "--max_steps", 14, "--dropout", 0.1, "--checkpoint", same)
    assert (13, "train") in read_log(folder)
    out = capsys.readouterr().out
    assert "changed: --max_steps 12 -> 14, --dropout 0.0 -> 0.1\n" in out
    assert "forgetting: pretraining" not in out
    assert saved(folder)["model_config"]["dropout"] == 0.1


def test_without_pretraining_data_forgetting_is_not_measured(tokenizer, chat_file, tmp_path, log,
                                                             capsys):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer)
    folder = post(tmp_path / "ckpt_00001.pt", chat_file, log / "post")
    losses = read_log(folder)
    assert {kind for _, kind in losses} == {"train", "val"}
    assert len(lines(folder)) == 16 and np.isfinite(list(losses.values())).all()
    assert "not measuring forgetting" in capsys.readouterr().out
    assert load_tokenizer(saved(folder)["tokenizer"]).spec == tokenizer.spec


def without_val(data, folder):
    """A copy of token shards without their val split."""
    shutil.copytree(data, folder)
    for path in folder.glob("*_val_*"):
        path.unlink()
    return folder


def test_replay_needs_no_validation_data(base, data, chat_file, tmp_path, log, capsys):
    no_val = without_val(data, tmp_path / "no_val")
    flags = ("--replay", 0.2, "--max_lr", 5e-3, "--replay_data")
    with_it = read_log(post(base(), chat_file, log / "with", *flags, data))
    without = read_log(post(base(), chat_file, log / "without", *flags, no_val))
    others = {key: value for key, value in with_it.items() if key[1] != "val_pretraining"}
    assert without == others != with_it
    assert (f"pretraining text for 20.0% of the rows: {no_val}; not measuring forgetting: "
            in capsys.readouterr().out)
