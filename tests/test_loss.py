"""loss.py against the validation loss of training, transformers, and one token at a time:
python -m pytest tests/test_loss.py"""

import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import save_random_gpt2, sentences, tiny_checkpoint, write_data, write_lines

import loss
from lib import checkpoint as checkpoints
from lib.cli import BadInput
from lib.devices import Processes
from lib.shards import Shards, read_validation
from lib.tokenizers import load_tokenizer, train_bpe
from train_gpt2 import mean_loss

ONE = Processes("cpu")
WINDOW = 32


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """(path, model) of an untrained model with confident predictions."""
    path = tmp_path / "ckpt_00001.pt"
    return path, tiny_checkpoint(path, tokenizer, init="xavier", block_size=WINDOW)


@pytest.fixture
def notes(tmp_path):
    """A folder of texts, some longer than a window."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text(" ".join(sentences(12)), encoding="utf-8-sig")
    write_lines(folder / "b.jsonl", [{"text": f"{text} ü"} for text in sentences(9, 1)])
    (folder / "README.md").write_text("what this is")
    return folder


def table(tmp_path, *flags):
    """The rows that --json writes."""
    path = tmp_path / "loss.json"
    path.unlink(missing_ok=True)
    loss.main([*map(str, flags), "--device", "cpu", "--json", str(path)])
    return json.loads(path.read_text())["rows"]


def documents(folder, tokenizer):
    """The ids of the documents in `notes`, end-of-text first."""
    texts = [(folder / "a.txt").read_text(encoding="utf-8-sig")]
    rows = (folder / "b.jsonl").read_text().splitlines()
    texts += [json.loads(row)["text"] for row in rows]
    return texts, [[tokenizer.eot, *tokenizer.encode(text).tolist()] for text in texts]


def contexts_of(ids, window, stride):
    """From how many tokens each id but the first is predicted."""
    contexts = []
    end = 1 + window  # of the targets of a window
    for i in range(1, len(ids)):
        if i == end:
            end += stride
        start = max(min(end, len(ids)) - 1 - window, 0)
        contexts.append(i - start)
    return contexts


@torch.no_grad()
def nats_of(model, ids, window, stride):
    """The loss of each id but the first, one at a time."""
    losses = []
    for i, context in enumerate(contexts_of(ids, window, stride), 1):
        log_probs = model(torch.tensor([ids[i - context:i]]))[0, -1].log_softmax(dim=-1)
        losses.append(-log_probs[ids[i]].item())
    return losses


@pytest.mark.parametrize("val_tokens", [330, 10**6])
def test_it_is_the_validation_loss_of_training(val_tokens, checkpoint, tokenizer, data, tmp_path):
    path, model = checkpoint
    rows = read_validation(Shards(data), val_tokens, WINDOW, tokenizer)
    expected = mean_loss(model, rows, 4, ONE)
    [row] = table(tmp_path, "--checkpoint", path, "--text", data, "--val_tokens", val_tokens)
    assert row["nats_per_token"] == pytest.approx(expected, abs=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert row["tokens"] == rows[0].size
    bits = expected / math.log(2) / tokenizer.token_bytes()[rows[1]].mean()
    assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_it_is_the_loss_that_a_run_has_logged(whole, data, tmp_path):
    folder = whole("modern")
    lines = (folder / "log.txt").read_text().split("\n")
    *_, last = [line for line in lines if " val " in line]
    [row] = table(tmp_path, "--checkpoint", folder, "--text", data, "--val_tokens", 330)
    assert row["step"] == int(last.split()[0])
    assert row["nats_per_token"] == pytest.approx(float(last.split()[2]), abs=1e-5)


def test_it_is_transformers_loss(tmp_path):
    from transformers import GPT2LMHeadModel

    folder = save_random_gpt2(tmp_path / "gpt2")
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = load_tokenizer("gpt2")
    texts = ["Hello, I'm a language model,", "the cat sat on the mat. " * 3]
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    total = 0.0
    tokens = 0
    for text in texts:
        ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text).tolist()]])
        n = ids.size(1) - 1
        total += theirs(ids, labels=ids).loss.item() * n
        tokens += n
    [row] = table(tmp_path, "--checkpoint", folder, "--text", tmp_path / "a.jsonl")
    assert (row["tokens"], row["step"]) == (tokens, None)
    assert row["nats_per_token"] == pytest.approx(total / tokens, abs=1e-4)


@pytest.mark.parametrize("stride", [None, 16])
def test_windows_of_a_long_text_have_transformers_loss(stride, tmp_path):
    from transformers import GPT2LMHeadModel

    folder = save_random_gpt2(tmp_path / "gpt2")
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    text = "the bird stood on the table. " * 40
    (tmp_path / "long.txt").write_text(text)
    tokenizer = load_tokenizer("gpt2")
    ids = [tokenizer.eot, *tokenizer.encode(text).tolist()]
    expected = nats_of(lambda idx: theirs(idx).logits, ids, 48, stride or 48)
    flags = ["--stride", stride] if stride else []
    [row] = table(tmp_path, "--checkpoint", folder, "--text", tmp_path / "long.txt", *flags)
    assert row["tokens"] == len(expected) == len(ids) - 1
    assert row["nats_per_token"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert row["bits_per_byte"] == pytest.approx(sum(expected) / math.log(2) / len(text), abs=1e-4)


def test_files_and_positions_add_up(checkpoint, notes, tokenizer, tmp_path):
    path, model = checkpoint
    loss.with_padding(model)
    texts, ids = documents(notes, tokenizer)
    losses = [nats_of(model, document, WINDOW, 8) for document in ids]
    contexts = [contexts_of(document, WINDOW, 8) for document in ids]
    rows = table(tmp_path, "--checkpoint", path, "--text", notes, "--by_file", "--by_position",
                 "--stride", 8)
    found = {(row["text"], str(row["position"])): row for row in rows}
    groups = {notes / "a.txt": [0], notes / "b.jsonl": range(1, len(ids)), notes: range(len(ids))}
    assert len(found) == len(rows) == 3 * 3
    for name, indexes in groups.items():
        nats = np.concatenate([losses[i] for i in indexes])
        context = np.concatenate([contexts[i] for i in indexes])
        for first, last in ((1, WINDOW), (1, 16), (17, WINDOW)):
            position = None if (first, last) == (1, WINDOW) else [first, last]
            row = found[str(name), str(position)]
            own = nats[(context >= first) & (context <= last)]
            assert row["tokens"] == len(own)
            assert row["nats_per_token"] == pytest.approx(own.mean(), abs=1e-4)
        whole = found[str(name), "None"]
        n_bytes = sum(len(texts[i].encode()) for i in indexes)
        assert whole["bytes"] == n_bytes
        assert whole["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / n_bytes, abs=1e-4)


def test_each_model_on_each_text_with_its_own_tokenizer(checkpoint, notes, tmp_path, capsys):
    path, _ = checkpoint
    other = tmp_path / "other.pt"
    tiny_checkpoint(other, train_bpe(sentences(200), 270), block_size=48)
    words = [notes / "a.txt", notes / "README.md"]
    rows = table(tmp_path, "--checkpoint", path, other, "--text", *words)
    assert [(row["model"], row["text"]) for row in rows] == [
        (str(model), str(word)) for model in (path, other) for word in words]
    first, _, second, _ = rows
    assert first["bytes"] == second["bytes"]
    assert first["tokens"] < second["tokens"]
    assert (first["context"], second["context"]) == (WINDOW, 48)
    *_, last = capsys.readouterr().out.splitlines()
    shown = re.split(r"  +", last)
    assert shown[:4] == [str(other), "48", str(words[1]), str(rows[-1]["tokens"])]
    assert float(shown[4]) == pytest.approx(rows[-1]["nats_per_token"], abs=1e-4)


def test_a_longer_context(tokenizer, notes, tmp_path):
    path = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(path, tokenizer, init="xavier", pos="rope", block_size=WINDOW)
    flags = ["--checkpoint", path, "--text", notes]
    [plain] = table(tmp_path, *flags)
    [longer] = table(tmp_path, *flags, "--context", 64, "--rope_scaling", "yarn")
    assert (plain["context"], longer["context"]) == (WINDOW, 64)
    assert plain["tokens"] == longer["tokens"]
    assert plain["nats_per_token"] != longer["nats_per_token"]


def test_one_and_two_processes_print_the_same(launch, checkpoint, notes, data):
    path, _ = checkpoint
    flags = ["--checkpoint", path.parent, "--text", notes, data, "--device", "cpu"]
    results = [launch("loss.py", *flags, processes=n) for n in (1, 2)]
    for result in results:
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("ckpt_00001.pt, the newest\n") == 1
        assert result.stderr.count("left out of") == 1
    assert results[0].stdout == results[1].stdout


@pytest.mark.parametrize("flags, says", [
    ([], "name --text"),
    (["--text", "a.txt"], "name --checkpoint or --model"),
    (["--text", "nowhere.txt"], "cannot read nowhere.txt"),
    (["--text", "empty"], "empty/ has no .json"),
    (["--text", "image.png"], "cannot tell what image.png is"),
    (["--text", "chats.jsonl"], "holds conversations, not text"),
    (["--text", "a.txt", "--checkpoint", "ckpt_00001.pt", "--stride", "33"], "--stride 33"),
    (["--text", "a.txt", "--checkpoint", "ckpt_00001.pt", "--json", "a.txt"], "a.txt exists"),
    (["--text", "a.txt", "--checkpoint", "ckpt_00001.pt", "nan.pt"], "nan.pt: the model's logits"),
    (["--text", "toy", "--checkpoint", "ckpt_00001.pt"], "of another tokenizer than ckpt_00001.pt"),
    (["--text", "toy", "--checkpoint", "own.pt", "--val_tokens", "9"], "--val_tokens is 9"),
    (["--text", "toy", "--checkpoint", "rope.pt", "--context", "9999"], "lower --context"),
    # offline here
    (["--text", "a.txt", "--model", "gpt2"], "load it once where the hub can be reached"),
])
def test_bad_flags(flags, says, checkpoint, tmp_path, monkeypatch):
    path, _ = checkpoint
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "image.png"):
        (tmp_path / name).write_text("the cat")
    write_lines(tmp_path / "chats.jsonl", [{"prompt": "a", "completion": "b"}])
    other = train_bpe(sentences(200), 270)
    write_data(tmp_path / "toy", other)
    tiny_checkpoint(tmp_path / "own.pt", other)
    tiny_checkpoint(tmp_path / "rope.pt", other, pos="rope")
    state = checkpoints.read(path)
    state["model"]["transformer.ln_f.weight"].fill_(math.nan)
    checkpoints.write(tmp_path / "nan.pt", state)
    with pytest.raises(BadInput) as error:
        loss.main(flags)
    assert says in str(error.value)


def test_bad_input_of_a_real_process_is_one_line(launch):
    result = launch("loss.py", "--checkpoint", "nowhere.pt", "--text", "nowhere.txt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("loss.py: error: cannot read nowhere.txt")
    assert result.stderr.count("\n") == 1
