"""posttrain.py, for real at a tiny size: python -m pytest tests/test_posttrain.py"""

import gc
import json
import math
import random
import re
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
    rng, rows = random.Random(seed), []
    for _ in range(n):
        turns = [part for _ in range(rng.randint(1, 2)) for part in (
            {"role": "user", "content": f"where is the {rng.choice(['cat', 'dog', 'bird'])}?"},
            {"role": "assistant", "content": f"on the {rng.choice(['mat', 'roof', 'table'])}."})]
        rows.append(
            {"messages": [{"role": "system", "content": "the cat."}] * rng.randint(0, 1) + turns})
    return rows


@pytest.fixture(scope="session")
def base(data, tmp_path_factory):
    """A function: flags of train_gpt2.py -> the checkpoint of a run of 20 steps on `data`."""
    made, folder = {}, tmp_path_factory.mktemp("base")

    def run(*flags):
        if flags not in made:
            train_gpt2.main([
                *TINY_FLAGS, "--data",
                str(data), "--log_dir",
                str(folder), "--run_name", f"run{len(made)}", "--max_steps", "20", *flags
            ])
            made[flags] = checkpoint.found(folder / f"run{len(made)}")[0][1]
        return made[flags]
    return run


@pytest.fixture
def chat_file(tmp_path):
    return write_lines(tmp_path / "chats.jsonl", chats(80))


def command(base, data, folder, *flags):
    return [str(word) for word in ("--checkpoint", base, "--data", data, "--log_dir", folder.parent,
                                   "--run_name", folder.name, *FLAGS, *flags)]


def post(*words):
    posttrain.main(command(*words))
    return words[2]


def newest(folder):
    return checkpoint.found(folder)[0][1]


KINDS = {
    "gpt2": (), "modern": ("--preset", "modern", "--n_head", "2"),
    "speedrun": ("--preset", "speedrun", "--n_layer", "2", "--n_head", "2", "--n_embd", "32",
                 "--block_size", "32", "--batch_warmup", "0"),
    "experts": ("--preset", "modern", "--n_head", "2", "--n_experts", "4", "--n_active", "2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns_to_answer(kind, base, chat_file, tmp_path, capsys):
    start = base(*KINDS[kind])
    folder = post(start, chat_file, tmp_path / "log" / "post", "--lr_scale", "1", "--sample_every",
                  "12")
    log, told = read_log(folder), capsys.readouterr().out
    assert log[12, "val"] < log[0, "val"] - 0.3
    model, tokenizer, state = load_checkpoint(newest(folder))
    assert model.config.vocab_size == tokenizer.vocab_size + 4 == 284 and state[
        "chat_template"] == JINJA
    assert state["train_config"]["optimizer"] == ("muon" if kind == "speedrun" else "adamw")
    assert "80 conversations (layout messages)" in told and "> where is the" in told
    first, last = (log[step, "val_pretraining"] for step in (0, 12))
    found = re.search(
        r"forgetting: pretraining validation loss (\S+) -> (\S+) \((\S+) nats per token\)", told)
    assert [float(number)
            for number in found.groups()] == pytest.approx([first, last, last - first], abs=2e-4)
    assert abs(last - first) > 0.01


PRETRAINED = {
    "optimizer": "muon", "max_lr": 0.03, "embedding_lr": 0.01, "head_lr": 0.004, "vector_lr": None,
    "momentum": 0.9, "data": ["a:1", "b"]
}
POSTTRAINED = PRETRAINED | {"checkpoint": "x", "lr_scale": 0.1, "data": ["c"], "replay_data": ["a"]}


@pytest.mark.parametrize(
    "before, flags, want",
    [
        (PRETRAINED, {},
         dict(optimizer="muon", max_lr=0.003, embedding_lr=0.001, head_lr=0.0004, vector_lr=None,
              lr_scale=0.1, momentum=0.9, replay_data=("a:1", "b"))),
        (PRETRAINED, dict(lr_scale=0.5, head_lr=0.2, momentum=0.8, replay_data=("d",)),
         dict(max_lr=0.015, embedding_lr=0.005, head_lr=0.2, momentum=0.8, replay_data=("d",))),
        (
            PRETRAINED,
            dict(optimizer="adamw", max_lr=1e-3),  # Muon's rates do not fit
            dict(optimizer="adamw", max_lr=1e-3, embedding_lr=None, head_lr=None, lr_scale=None)),
        (POSTTRAINED, {},
         dict(max_lr=0.03, embedding_lr=0.01, head_lr=0.004, lr_scale=1.0,
              replay_data=("a",))),  # scaled before
        (POSTTRAINED, dict(lr_scale=0.5), dict(max_lr=0.015, embedding_lr=0.005, head_lr=0.002)),
        ({"max_lr": 6e-4, "data": "old"}, {},
         dict(optimizer="adamw", max_lr=6e-5, momentum=0.95, replay_data=("old",), val_tokens=2**
              20)),
        (PRETRAINED | {"val_tokens": 65_536}, {}, dict(val_tokens=65_536)),
        (PRETRAINED | {"val_tokens": 10**7}, {}, dict(val_tokens=2**20)),
        (PRETRAINED | {"val_tokens": 65_536}, dict(val_tokens=99_999), dict(val_tokens=99_999)),
    ])
def test_what_the_checkpoint_decides(before, flags, want):
    cfg = posttrain.Config(**flags)
    cfg = resolve(cfg, posttrain.inherited(cfg, before, set(flags)))
    for name, value in want.items():
        assert getattr(cfg,
                       name) == (pytest.approx(value) if isinstance(value, float) else value), name


def test_length_validations_and_samples_without_a_flag(base, tokenizer, chat_file, tmp_path,
                                                       capsys):
    """Two epochs of 78 rows, a quarter of all being replay, in steps of 8 rows: 26 steps, validated
    after every third."""
    words = [
        "--checkpoint",
        base(), "--data", chat_file, "--log_dir", tmp_path, "--total_batch_size", "256", "--device",
        "cpu", "--val_tokens", "330"
    ]
    given = [
        "--epochs", "2", "--replay", "0.25", "--dropout", "0.1", "--sample_prompt", "the bird",
        "--max_lr", "1e-3"
    ]
    posttrain.main([str(word) for word in (*words, "--run_name", "post", *given)])
    log, told = read_log(tmp_path / "post"), capsys.readouterr().out
    assert max(log)[0] == 26 and sorted(
        step for step, kind in log if kind == "val") == [*range(0, 26, 3), 26]
    assert told.count("> the bird -> ") == 2 * 9 and "where is" not in told
    assert load_checkpoint(newest(tmp_path / "post"))[0].config.dropout == 0.1
    other = write_data(tmp_path / "other", tokenizer,
                       shards=1)  # a place in the stream is one among the rows of replay, too
    posttrain.main([
        "--log_dir",
        str(tmp_path), "--run_name", "post", "--max_steps", "27", "--replay_data",
        str(other)
    ])
    assert "other training data, read from its beginning" in capsys.readouterr().out


@pytest.mark.parametrize("tokens, row, want",
                         [(82 * 2048, 2048, 16_384), (79 * 2048, 2048, 4 * 2048),
                          (10**9, 1024, 16_384), (10**9, 1000, 16_000),
                          (10**9, 3 * 1024, 4 * 3 * 1024), (10**9, 8 * 4096, 8 * 4096),
                          (2496, 32, 128), (2496, 2 * 32, 128), (100, 32, 32)])
def test_steps_without_a_flag_are_small_enough_for_the_data(tokens, row, want):
    assert posttrain.pick_batch(tokens, row) == want


def test_little_data_is_learned_without_a_flag_and_a_run_that_goes_on_keeps_its_batch(
        base, chat_file, tmp_path, capsys):
    words = ["--log_dir", str(tmp_path), "--device", "cpu", "--val_tokens", "330"]
    posttrain.main([
        *words, "--run_name", "whole", "--checkpoint",
        str(base()), "--data",
        str(chat_file), "--save_every", "30", "--keep", "0"
    ])
    log, before = read_log(tmp_path / "whole"), checkpoint.read(newest(tmp_path / "whole"))
    assert before["train_config"]["total_batch_size"] == 128
    assert max(log)[0] > 3 * 10 and log[max(log)[0], "val"] < log[0, "val"] - 0.3
    assert "teach little" not in capsys.readouterr().out
    again = cut(tmp_path / "whole", tmp_path / "again", 30)
    posttrain.main([*words, "--run_name", "again"])
    assert_same_runs(again, tmp_path / "whole")
    posttrain.main([
        *words, "--run_name", "micro", "--checkpoint",
        str(base()), "--data",
        str(chat_file), "--micro_batch", "12", "--max_steps", "1"
    ])
    assert checkpoint.read(newest(tmp_path
                                  / "micro"))["train_config"]["total_batch_size"] == 12 * 32
    few = write_lines(tmp_path / "few.jsonl", chats(20))
    posttrain.main([*words, "--run_name", "again", "--data", str(few), "--max_steps", "60"])
    assert checkpoint.read(newest(again))["train_config"]["total_batch_size"] == 128
    posttrain.main([
        *words, "--run_name", "short", "--checkpoint",
        str(base()), "--data",
        str(few), "--epochs", "0.5"
    ])
    assert "warning: 9 steps in all teach little: give more data, or raise --epochs\n" in capsys.readouterr(
    ).out


def test_text_among_conversations_is_learned_whole(chat_file, tokenizer, tmp_path):
    text = " ".join(sentences(30))
    (tmp_path / "long.txt").write_text(text)
    both, alone = (posttrain.Data(posttrain.Config(data=tuple(map(str, files)), val_share=0.0),
                                  tokenizer, 16)
                   for files in ((chat_file, tmp_path / "long.txt"), (chat_file,)))
    learned = [
        sorted(targets[targets >= 0].tolist())
        for targets in (data.source.all()[1] for data in (both, alone))
    ]
    assert learned[0] == sorted(learned[1] + tokenizer.encode(text).tolist())
    assert f" tokens {len(learned[0]):,} are learned" in both.lines[-1]


def test_the_losses_are_those_of_a_plain_loop_over_single_conversations(base, chat_file, tmp_path):
    """No packing and no micro-batches there: each conversation a forward pass of its own, and the
    loss from its logits."""
    start = base()
    folder = post(start, chat_file, tmp_path / "log" / "post", "--max_lr", "5e-3", "--weight_decay",
                  "0.5", "--micro_batch", "2", "--seed", "5")
    model, tokenizer, _ = load_checkpoint(start)
    examples, _ = read(str(chat_file))
    train, val = hold_out(examples, 0.05, 5)
    items = [truncate(example, tokenizer, 33)[:2] for example in train]
    packing, (vocab_size, weights) = Packing(items, 32, 5,
                                             tokenizer.eot), posttrain.grow(model, tokenizer)
    model = GPT(replace(model.config, vocab_size=vocab_size)).train()
    model.load_state_dict(weights)

    def loss_of(conversations):
        """Summed over what is learned, and its number; padding ids take part, as in training."""
        nats, count = 0.0, 0
        for ids, learned in conversations:
            logits = hidden(model, torch.tensor([ids[:-1]])) @ model.lm_head.weight.T
            targets = torch.tensor(
                [[token if yes else -1 for token, yes in zip(ids[1:], learned[1:])]])
            nats = nats + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                                          reduction="sum")
            count = count + int((targets >= 0).sum())
        return nats, count

    matrices, vectors = ([p
                          for p in model.parameters()
                          if (p.dim() > 1) == big]
                         for big in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}],
        lr=5e-3, betas=(0.9, 0.95))
    losses, epochs, epoch, row = {}, [], 0, 0
    for step in range(13):
        if step % 4 == 0:
            nats, count = loss_of([truncate(example, tokenizer, 33)[:2] for example in val])
            losses[step, "val"] = nats.item() / count
        if step == 12:
            break
        members = []
        for _ in range(8):
            if row == packing.of(epoch)[1]:
                epoch, row = epoch + 1, 0
            members += packing.of(epoch)[0][row].tolist()
            row += 1
        epochs.append((step, epoch))
        nats, count = loss_of([items[i] for i in members])
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
def test_an_interrupted_run_repeats_the_undisturbed_one(kind, base, chat_file, tmp_path):
    flags = ["--replay", "0.2", "--dropout", "0.1", "--save_every", "5", "--keep", "0"]
    whole = post(base(*KINDS[kind]), chat_file, tmp_path / "log" / "whole", *flags)
    again = cut(whole, tmp_path / "log" / "again", 5)
    posttrain.main(["--log_dir", str(again.parent), "--run_name", "again"])  # its name is enough
    assert_same_runs(again, whole)
    assert scalars(again) == scalars(whole)


def test_a_run_begun_with_the_warm_up_of_pretraining_goes_on_with_it(base, chat_file, tmp_path):
    """As runs were before --warmup_steps' default became 0:
    of 12 steps a quarter, up to the 1e-3 that falls over the other 9."""
    whole = post(base(), chat_file, tmp_path / "log" / "whole", "--save_every", "1", "--keep", "0",
                 "--max_lr", "1e-3")
    path = newest(cut(whole, tmp_path / "log" / "old", 1))
    state = checkpoint.read(path)
    checkpoint.write(path, state | {"train_config": state["train_config"] | {"warmup_steps": None}})
    posttrain.main(["--log_dir", str(tmp_path / "log"), "--run_name", "old"])
    rates = dict(scalars(tmp_path / "log" / "old")["optim/lr"])
    assert [rates[step] for step in (1, 2, 3, 6)] == pytest.approx([2e-3 / 3, 1e-3, 1e-3, 2e-3 / 3])


def test_two_processes_and_any_micro_batch_give_the_same_losses(base, chat_file, tmp_path, launch):
    flags = ["--replay", "0.2", "--max_lr", "5e-3"]
    one = read_log(post(base(), chat_file, tmp_path / "log" / "one", *flags, "--micro_batch", "8"))
    for name, processes, more in (("two", 2, ("--micro_batch", "2", "--compile")),
                                  ("half", 1, ("--micro_batch", "1"))):
        result = launch("posttrain.py",
                        *command(base(), chat_file, tmp_path / "log" / name, *flags, *more),
                        processes=processes)
        assert result.returncode == 0, result.stderr
        assert "was recompiled" not in result.stdout
        assert read_log(tmp_path / "log" / name) == pytest.approx(one, rel=1e-4)
        assert (tmp_path / "log" / name
                / "posttrain.py").read_bytes() == (ROOT / "posttrain.py").read_bytes()


def test_any_micro_batch_gives_the_same_losses_with_muon_and_experts(base, chat_file, tmp_path):
    start = base(*KINDS["speedrun"], "--n_experts", "4", "--n_active", "2")
    one, half = (read_log(
        post(start, chat_file, tmp_path / "log" / size, "--replay", "0.2", "--micro_batch", size))
                 for size in "81")
    assert half == pytest.approx(one, rel=1e-5)


def test_text_in_files_and_shards_is_continued_pretraining(base, data, tokenizer, tmp_path):
    """Shards: the stream, and so the losses, of train_gpt2.py's own loop with the same weights.
    Files: the same text learned."""
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("\n".join(sentences(60)))
    pa.parquet.write_table(pa.table({"text": sentences(60), "id": list(range(60))}),
                           tmp_path / "b.parquet")
    for name, source in (("txt", tmp_path / "a.txt"), ("parquet", tmp_path / "b.parquet"),
                         ("shards", data)):
        folder = post(base(), source, tmp_path / "log" / name, "--max_lr", "5e-3", "--replay",
                      "0.1")
        log, (model, _, state) = read_log(folder), load_checkpoint(newest(folder))
        assert log[12, "val"] < log[
            0, "val"] - 0.2 and model.config.vocab_size == 280 and "chat_template" not in state
    assert log[0, "val"] == log[0, "val_pretraining"]  # of the shards that pretraining had
    shards = posttrain.ShardData(posttrain.Config(data=(str(data),), replay=0.1), tokenizer, 32)
    # a tenth is rows of --replay
    assert shards.most_repeated(1000) == (pytest.approx(900 / Shards(data).tokens["train"]), "toy")
    folder = post(base(), data, tmp_path / "log" / "plain", "--max_lr", "5e-3", "--weight_decay",
                  "0.1")
    model = load_checkpoint(base())[0].train()
    cfg = train_gpt2.TrainConfig(max_lr=5e-3)
    stream = train_gpt2.token_stream(train_gpt2.Corpus(train_gpt2.TrainConfig(data=(str(data),))),
                                     tokenizer, 1337, 32)
    optimizer = train_gpt2.make_optimizer(model, cfg)
    for step in range(12):
        tokens = torch.from_numpy(stream.next(256))
        loss = model(tokens[:-1].view(8, 32), tokens[1:].contiguous().view(8, 32)) / 256
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / 12)
        optimizer.step()
        optimizer.zero_grad()
        assert read_log(folder)[step, "train"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_mixture_of_shards_shows_how_far_every_source_is(base, data, tokenizer, tmp_path):
    other = write_data(tmp_path / "other", tokenizer, shards=1)
    shown = scalars(
        post(base(), f"{data}:1", tmp_path / "log" / "post", "--data", f"{other}:3", "--max_lr",
             "5e-3", "--max_steps", "40"))
    tokens = {name: [n for _, n in shown[f"data/tokens_{name}"]] for name in ("toy", "other")}
    assert [sum(both) for both in zip(*tokens.values())] == [256 * (step + 1) for step in range(40)]
    assert abs(tokens["other"][-1] - 0.75 * 40 * 256) <= 3 * 32 and "data/epoch" not in shown
    size = Shards(other).tokens["train"]
    assert shown["data/epoch_other"] == [(step, n // size)
                                         for step, n in enumerate(tokens["other"])]
    assert tokens["other"][-1] > size


def test_the_best_checkpoint_stays_and_is_named(base, chat_file, tmp_path, capsys):
    """Validation on other answers than those learned: its loss ends above its lowest,
    and --keep 1 keeps the newest and the best."""
    other = [{"prompt": "where is the cat?", "completion": text} for text in sentences(20)]
    folder = post(base(), write_lines(tmp_path / "few.jsonl",
                                      chats(6)), tmp_path / "log" / "post", "--max_steps", "40",
                  "--eval_every", "4", "--max_lr", "0.01", "--keep", "1", "--val_data",
                  write_lines(tmp_path / "val.jsonl", other))
    losses = {step: value for (step, kind), value in read_log(folder).items() if kind == "val"}
    best = min((step for step in losses if step), key=losses.get)
    assert best < 40 and steps_saved(folder) == [best, 40]
    told = capsys.readouterr().out
    assert f"best    validation loss {losses[best]:.4f}, at step {best}: {folder / f'ckpt_{best:05d}.pt'}" in told
    assert f"chat.py --checkpoint {folder / f'ckpt_{best:05d}.pt'}" in told
    model, tokenizer, _ = load_checkpoint(folder / f"ckpt_{best:05d}.pt")
    val = read(str(tmp_path / "val.jsonl"))[0]
    rows = Packing([truncate(example, tokenizer, 33)[:2] for example in val], 32, None,
                   tokenizer.eot).all()
    assert mean_loss(model, rows, 4, Processes("cpu")) == pytest.approx(losses[best], abs=1e-5)


def test_the_best_checkpoint_is_one_of_this_run_on_this_validation_data(
        base, chat_file, tmp_path, capsys):
    """Both go on with losses no lower than the best before them, whose checkpoint, or whose data,
    is not theirs."""
    folder = post(base(), chat_file, tmp_path / "log" / "post", "--max_lr", "5e-3")
    before = checkpoint.read(newest(folder))["best"]
    hard = [{"prompt": "the cat", "completion": text[::-1]} for text in sentences(20)]
    capsys.readouterr()
    for name, flags in (("branch", ["--max_lr", "0.5"]),
                        ("post", ["--val_data",
                                  write_lines(tmp_path / "hard.jsonl", hard)])):
        posttrain.main([
            str(word) for word in ("--resume", newest(folder), "--log_dir", folder.parent,
                                   "--run_name", name, "--max_steps", "20", *flags)
        ])
        loss, step = checkpoint.read(newest(tmp_path / "log" / name))["best"]
        assert step >= 12 and loss >= before[0]
        assert loss == pytest.approx(read_log(tmp_path / "log" / name)[step, "val"], abs=1e-5)
        path = tmp_path / "log" / name / f"ckpt_{step:05d}.pt"
        assert path.exists() and f"at step {step}: {path}" in capsys.readouterr().out


def test_what_a_run_begins_with_leaves_memory(base, chat_file, tmp_path, monkeypatch):
    start, began, loaded, plain = base(), [], posttrain.load_checkpoint, train_gpt2.train

    def load(path):
        model, tokenizer, state = loaded(path)
        began.extend(
            weakref.ref(tensor) for tensor in (*model.parameters(), *state["model"].values()))
        return model, tokenizer, state

    def train(*args):
        gc.collect()
        assert began and not any(tensor() is not None for tensor in began)
        plain(*args)

    monkeypatch.setattr(posttrain, "load_checkpoint", load)
    monkeypatch.setattr(train_gpt2, "train", train)
    assert newest(post(start, chat_file, tmp_path / "log" / "post")).name == "ckpt_00012.pt"


def test_gpt2_learns_to_chat_and_is_named_by_its_run_folder(chat_file, tmp_path, monkeypatch,
                                                            capsys):
    """From "gpt2", here a folder of that name, to a model that chat.py talks with; the base before
    is one that completes."""
    monkeypatch.chdir(tmp_path)
    save_random_gpt2(tmp_path / "gpt2")
    flags = ["--temperature", "0", "--max_new_tokens", "4", "--device", "cpu"]
    generate.main(["--model", "gpt2", "--prompt", "the cat", "--samples", "1", *flags])
    assert capsys.readouterr().out.startswith("the cat")
    chat.main(["--model", "gpt2", "-p", "the cat", *flags])
    assert "gpt2 has not learned to chat: it continues what you type" in capsys.readouterr().err
    words = [
        "--model", "gpt2", "--data",
        str(chat_file), "--run_name", "post", *FLAGS, "--max_steps", "4", "--eval_every", "2",
        "--total_batch_size", "192"
    ]
    posttrain.main(words)
    state = checkpoint.read(newest(tmp_path / "log" / "post"))
    assert state["train_config"]["max_lr"] == pytest.approx(
        6e-5) and state["train_config"]["model"] == "gpt2"
    assert (state["model_config"]["vocab_size"],
            len(state["model"]["transformer.wte.weight"])) == (50261, 50304)
    shutil.rmtree("gpt2")
    posttrain.main([*words, "--max_steps", "6"])  # goes on without it
    best = checkpoint.read(newest(tmp_path / "log" / "post"))["best"][1]
    capsys.readouterr()
    chat.main(["--checkpoint", "log/post", "-p", "where is the cat?", *flags])
    assert f"log/post: ckpt_{best:05d}.pt, the " in capsys.readouterr().err


def test_a_second_round_and_what_else_reads_the_checkpoint(base, chat_file, data, tmp_path, launch):
    start = base(*KINDS["modern"])
    first = newest(post(start, chat_file, tmp_path / "log" / "first"))
    second = newest(post(first, chat_file, tmp_path / "log" / "second"))
    before, after = checkpoint.read(first)["train_config"], checkpoint.read(second)["train_config"]
    assert before["max_lr"] == pytest.approx(0.1 * 5e-3) and after["max_lr"] == before["max_lr"]
    assert after["replay_data"] == [str(data)]
    text = newest(
        post(second, write_lines(tmp_path / "t.jsonl", [{"text": text} for text in sentences(40)]),
             tmp_path / "log" / "text"))
    assert checkpoint.read(text)["chat_template"] == JINJA and load_checkpoint(
        text)[0].config.vocab_size == 284
    result = launch("generate.py", "--checkpoint", second, "--prompt", "the cat",
                    "--max_new_tokens", "40", "--device", "cpu")
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
    turn, more = (tokenizer.decode(part)
                  for part in (ids[:ids.index(tokenizer.reserved[END])], ids))
    assert len(turn) > len(prompt) and len(more) > len(turn)  # so that what follows could show
    result = launch("generate.py", "--checkpoint", path, "--prompt", prompt, "--max_new_tokens",
                    "20", "--temperature", "0", "--samples", "1", "--device", "cpu")
    assert result.returncode == 0 and result.stdout == f"{turn}\n", result.stderr


def test_growing_keeps_what_the_model_computes(tokenizer, tmp_path):
    """Tables with room for the ids of chat, with none, and with a head of its own. A turn is as
    likely to end as a text was."""
    for name, changes in {
            "room": {}, "none": dict(vocab_multiple=1), "some": dict(vocab_multiple=94),
            "untied": dict(tie_embeddings=False, vocab_multiple=2)
    }.items():
        before = tiny_checkpoint(tmp_path / f"{name}.pt", tokenizer, **changes)
        vocab_size, weights = posttrain.grow(before, tokenizer)
        after = GPT(type(before.config)(**before.config.__dict__
                                        | {"vocab_size": vocab_size})).eval()
        after.load_state_dict(weights)
        idx = torch.randint(280, (2, 16))
        logits = after(idx)
        assert vocab_size == 284 and torch.equal(logits[..., :280], before(idx))
        expected = before(idx).mean(dim=-1, keepdim=True).repeat(1, 1, 4)
        expected[..., tokenizer.reserved[END] - 280] = logits[..., tokenizer.eot]
        torch.testing.assert_close(logits[..., 280:], expected, atol=1e-5, rtol=1e-4)
        assert after.config.padded_vocab_size == len(after.lm_head.weight) and bool(
            after.lm_head.weight.isfinite().all())


def test_bad_input_ends_in_one_line_before_anything_is_written(base, data, chat_file, tmp_path,
                                                               launch):
    other = write_data(tmp_path / "other", train_bpe(sentences(300, 5), 290))
    pretraining, no_val = base().parent, without_val(data, tmp_path / "no_val")
    odd = write_lines(tmp_path / "odd.jsonl", [{"question": "a", "reply": "b"}])
    bad = write_lines(tmp_path / "bad.jsonl",
                      [{"messages": []}, {"messages": [{"role": "tool", "content": "x"}]}])
    one = write_lines(tmp_path / "one.jsonl", chats(1))
    text = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in sentences(9)])
    csv = write_lines(tmp_path / "table.csv", ["a", "b"])
    few = write_lines(tmp_path / "few.jsonl", [*chats(1), "nonsense", 7])
    lost = write_lines(tmp_path / "lost.jsonl",
                       [{"prompt": "the cat " * 50, "completion": "the dog"}, "nonsense"])
    some = tmp_path / "some.jsonl"
    some.write_text(json.dumps(chats(1)[0]) + "\nnonsense\n")
    long = write_lines(tmp_path / "long.jsonl",
                       [{"prompt": "the cat " * 50, "completion": "the dog"}] * 2
                       + [{"prompt": "the", "completion": "the cat " * 50}])
    (tmp_path / "folder").mkdir()
    shutil.copy(chat_file, tmp_path / "folder")
    write_lines(tmp_path / "folder" / "dataset_infos.json", [{"default": {}}])
    cases = [
        (["--data", chat_file], "name either --checkpoint"),
        (["--checkpoint", base()], "name --data"),
        (command(base(), tmp_path / "none.jsonl", tmp_path / "log" / "x"), "cannot read"),
        (command(base(), tmp_path / "none", tmp_path / "log" / "x"), "cannot read"),
        (command(base(), csv, tmp_path / "log" / "x"), "cannot tell what"),
        (command(base(), odd,
                 tmp_path / "log" / "x"), "no layout is known of a row with question, reply"),
        (command(base(), tmp_path / "folder", tmp_path / "log" / "x"),
         "infos.json, line 1: .* default .*: rename its columns, or move it out of the folder"),
        (command(base(), bad, tmp_path / "log" / "x"), "no usable row.*line 1: no messages"),
        (command(base(), some, tmp_path / "log" / "x", "--strict"), "line 2: not JSON"),
        (command(base(), one, tmp_path / "log" / "x"), "--val_share 0"),
        (command(base(), few, tmp_path / "log" / "x"),
         r"--val_share 0 \(.*few.jsonl: 1 conversations .*; skipped 2 malformed rows: line 2: not an object;"
         ),
        (command(base(), chat_file, tmp_path / "log" / "x", "--val_data", lost),
         r"nothing of --val_data can .*validation on .*lost.jsonl: .*skipped 1 malf.*1 too long"),
        (command(base(), lost, tmp_path / "log" / "x", "--val_data",
                 chat_file), "nothing of --data can .*lost.jsonl: 1 conv.*skipped 1 malf"),
        (command(base(), long, tmp_path / "log" / "x", "--strict"), "longer than the context"),
        (command(base(), other, tmp_path / "log" / "x"), "another tokenizer"),
        (command(base(), chat_file, tmp_path / "log" / "x", "--replay", "0.1", "--replay_data",
                 other), "another tokenizer"),
        (command(base(), chat_file, tmp_path / "log" / "x", "--replay", "0.1", "--replay_data",
                 tmp_path), "does not hold any shards.*name another --replay_data$"),
        (command(base(), chat_file, tmp_path / "log" / "x", "--replay_data",
                 no_val), "--val_tokens"),
        (command(base(), chat_file, tmp_path / "log" / "x", "--optimizer",
                 "muon"), "give --max_lr"),
        (command(base(), chat_file, tmp_path / "log" / "x", "--epochs",
                 "2"), "--epochs and --max_steps each set the length"),  # no flag that it has not
        ([*command(base(), chat_file, tmp_path / "log" / "x"), "--data",
          data], "not mixed with files"),
        ([*command(base(), data, tmp_path / "log" / "x"), "--data",
          tmp_path / "typo"], "cannot read .*typo"),
        (command(base(), data, tmp_path / "log" / "x", "--val_share",
                 "0.5"), "--val_share is for files"),
        (command(base(), data, tmp_path / "log" / "x", "--strict"), "--strict is for files"),
        (command(base(), data, tmp_path / "log" / "x", "--val_data",
                 chat_file), "--val_data is for files"),
        (command(base(), text, tmp_path / "log" / "x", "--val_data", chat_file),
         r"none to train on.*\(.*text.jsonl: 9 texts; validation on .*chats.jsonl"),
        (["--run_name", pretraining.name, "--log_dir",
          pretraining.parent], "not a checkpoint of a post-training run"),
    ]
    for words, says in cases:
        with pytest.raises(BadInput, match=says):
            posttrain.main([str(word) for word in words])
    assert not (tmp_path / "log").exists()
    result = launch("posttrain.py", *command(base(), odd, tmp_path / "log" / "x"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_a_run_goes_on_from_its_own_checkpoint_alone(base, data, chat_file, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "old")
    folder = post(base(), chat_file, tmp_path / "log" / "post", "--replay_data", tmp_path / "old")
    assert "forgetting: pretraining" in capsys.readouterr().out
    for words in ((newest(folder), chat_file, folder), (base(), chat_file, folder, "--lr_scale",
                                                        "0.5")):
        with pytest.raises(BadInput, match="began with"):
            post(*words)
    with pytest.raises(BadInput, match="continue it with posttrain.py"):
        train_gpt2.main(["--log_dir", str(folder.parent), "--run_name", "post"])
    shutil.rmtree(tmp_path / "old")
    same = base().parent / ".." / base().parent.name / base().name
    posttrain.main([
        str(word) for word in ("--log_dir", folder.parent, "--run_name", "post", "--max_steps",
                               "14", "--dropout", "0.1", "--checkpoint", same)
    ])
    assert (13, "train") in read_log(folder)
    told = capsys.readouterr().out
    assert "changed: --max_steps 12 -> 14, --dropout 0.0 -> 0.1\n" in told and "forgetting: pretraining" not in told
    assert load_checkpoint(newest(folder))[0].config.dropout == 0.1


def test_without_pretraining_data_the_run_goes_without_its_validation(tokenizer, chat_file,
                                                                      tmp_path, capsys):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer)
    folder = post(tmp_path / "ckpt_00001.pt", chat_file, tmp_path / "log" / "post")
    assert {kind for _, kind in read_log(folder)} == {"train", "val"} and math.isfinite(
        read_log(folder)[12, "val"])
    assert "not measuring forgetting" in capsys.readouterr().out
    assert load_tokenizer(checkpoint.read(newest(folder))["tokenizer"]).spec == tokenizer.spec
    assert len(lines(folder)) == 16 and np.isfinite(list(read_log(folder).values())).all()


def without_val(data, folder):
    shutil.copytree(data, folder)
    for path in folder.glob("*_val_*"):
        path.unlink()
    return folder


def test_replay_needs_no_validation_data(base, data, chat_file, tmp_path, capsys):
    flags = ["--replay", "0.2", "--max_lr", "5e-3"]
    with_it, without = (read_log(
        post(base(), chat_file, tmp_path / "log" / name, *flags, "--replay_data", folder))
                        for name, folder in (("with", data),
                                             ("without", without_val(data, tmp_path / "no_val"))))
    assert without == {key: value for key, value in with_it.items() if key[1] != "val_pretraining"
                       } != with_it
    assert (
        f"pretraining text for 20.0% of the rows: {tmp_path / 'no_val'}; not measuring forgetting: "
        in capsys.readouterr().out)
