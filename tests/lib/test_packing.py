"""lib/packing.py against one conversation at a time: python -m pytest tests/lib/test_packing.py"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny

from lib.devices import Processes
from lib.packing import Joined, Packed, Packing, first_fit
from lib.streams import Rows, row_micro_batches
from train_gpt2 import GPT, mean_loss

T, EOT = 16, 60
MODELS = {
    "gpt2": {}, "modern": dict(mlp="swiglu", norm="rmsnorm", pos="rope", emb_norm=True, bias=False),
    "speedrun": dict(mlp="relu2", norm="rmsnorm", pos="rope", emb_norm=True, qk_norm=True,
                     bias=False, token_shift=True, value_residual=True, residual_scalars=True,
                     softcap=15.0), "untied": dict(token_shift=True, tie_embeddings=False),
    "experts": dict(n_experts=4, n_active=2, pos="rope"),
}


def items(n, seed=0, longest=T + 1):
    """Conversations as (ids, learned), some of the longest that fits a row."""
    rng = random.Random(seed)
    lengths = [rng.choice((longest, rng.randint(2, longest))) for _ in range(n)]
    return [([EOT,
              *(rng.randrange(60)
                for _ in range(k - 1))], [False, *(rng.random() < 0.6
                                                   for _ in range(k - 2)), True])
            for k in lengths]


def opinionated(**changes):
    """A model whose weights are all large enough to show in its loss."""
    torch.manual_seed(1)
    model = GPT(tiny(**changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and not name.endswith("mix"):
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.mul_(8.0)
    return model


def one_at_a_time(model, conversations):
    """Summed cross-entropy of what is learned: each conversation a forward pass of its own,
    unpacked, from its logits."""
    total = 0.0
    for ids, learned in conversations:
        logits = model(torch.tensor([ids[:-1]]))[0]
        targets = torch.tensor([token if yes else -1 for token, yes in zip(ids[1:], learned[1:])])
        padded = F.pad(logits, (0, model.config.padded_vocab_size - model.config.vocab_size),
                       value=-torch.inf)
        total = total + F.cross_entropy(padded, targets, ignore_index=-1, reduction="sum")
    return total


@pytest.mark.parametrize("kind", MODELS)
def test_packed_rows_have_the_losses_and_gradients_of_one_conversation_at_a_time(kind):
    model, conversations = opinionated(vocab_size=61, vocab_multiple=61, **MODELS[kind]), items(25)
    packing = Packing(conversations, T, 5, EOT)
    ids, targets, documents = map(torch.from_numpy, packing.all())
    assert len(ids) < len(conversations)
    want = one_at_a_time(model, conversations)
    want.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model(ids, targets, Packed(documents))
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4,
                                   atol=1e-3 * wanted[name].abs().max().item() + 1e-6, msg=name)
    with torch.no_grad():
        logits, seeing_all = model(ids, packed=Packed(documents)), model(ids)
        for row, members in enumerate(packing.of(0)[0]):
            for document, i in enumerate(members, 1):
                alone = model(torch.tensor([conversations[i][0][:-1]]))[0]
                torch.testing.assert_close(logits[row][documents[row] == document], alone,
                                           rtol=1e-4, atol=1e-4)
    assert (logits - seeing_all).abs().max() > 0.02  # so that the comparison could fail


def test_validation_is_the_mean_over_what_is_learned():
    model, conversations = opinionated(vocab_size=61, vocab_multiple=61).eval(), items(9)
    rows, learned = Packing(conversations, T, None,
                            EOT).all(), sum(sum(yes[1:]) for _, yes in conversations)
    for micro_batch in (1, 3, 8):
        assert mean_loss(model, rows, micro_batch, Processes("cpu")) == pytest.approx(
            one_at_a_time(model, conversations).item() / learned, rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_it_compiles_as_one_graph_that_fits_any_packing(kind):
    model = GPT(tiny(**MODELS[kind])).train()
    graphs, counts = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
    for seed in range(3):
        ids, targets, documents = map(torch.from_numpy,
                                      Packing(items(12, seed), T, seed, EOT).all()[:, :4])
        torch.testing.assert_close(compiled(ids, targets, Packed(documents)),
                                   model(ids, targets, Packed(documents)))
        counts.append(len(graphs))
    assert counts == [1, 1, 1]


def test_first_fit_by_hand():
    assert first_fit([5, 6, 4, 3, 1, 10, 1], 10) == [[0, 2, 4], [1, 3, 6], [5]]
    assert first_fit([], 4) == []


def rows_of(stream, sizes):
    return np.concatenate([stream.next(n * T) for n in sizes])


def numbers(step):
    """A source of rows that hold step, 2 step, 3 step, ..."""
    def read_batch(n, at):
        return np.broadcast_to((np.arange(at, at + n // T)[:, None, None] + 1) * step,
                               (n // T, 3, T)), at + n // T
    return SimpleNamespace(names=("at",), position=(0,), block_size=T, read_batch=read_batch,
                           where=lambda state: f"row {state['at']}")


def test_every_epoch_has_every_conversation_once_in_another_packing():
    conversations = items(40)
    packing, epochs = Packing(conversations, T, 7, EOT), []
    for epoch in range(3):
        rows, count = packing.of(epoch)
        assert sorted(i for row in rows for i in row) == list(range(40)) and count == len(rows)
        epochs.append([tuple(row) for row in rows])
    assert epochs[0] != epochs[1] != epochs[2]
    # follows from the seed and the epoch alone
    assert [tuple(row) for row in Packing(conversations, T, 7, EOT).of(2)[0]] == epochs[2]
    assert [tuple(row) for row in Packing(conversations, T, 8, EOT).of(2)[0]] != epochs[2]


@pytest.mark.parametrize("cut", [lambda seed: Packing(items(40), T, seed, EOT),
                                 lambda seed: Joined([ids for ids, _ in items(40)], T, seed, EOT)])
def test_the_stream_is_the_same_in_batches_of_any_size_and_after_a_resume(cut):
    whole = rows_of(Rows(cut(3), numbers(-1), 0.3), [60])
    assert (whole == rows_of(Rows(cut(3), numbers(-1), 0.3), [7, 1, 30, 22])).all()
    stream = Rows(cut(3), numbers(-1), 0.3)
    rows_of(stream, [37])
    state, later = stream.state_dict(), Rows(cut(3), numbers(-1), 0.3)
    # as a checkpoint has it
    later.load_state_dict(
        {name: list(value) if isinstance(value, tuple) else value for name, value in state.items()})
    assert (rows_of(later, [23]) == whole[37:]).all()
    assert "epoch" in stream.where(state) and "replay row" in stream.where(state)
    with pytest.raises(IndexError):
        stream.where(state | {"data": (0, 10**6)})


def test_asking_for_a_place_leaves_what_the_prefetch_thread_reads_from():
    packing = Packing(items(40), T, 3, EOT)
    rows, _ = packing.of(1)
    assert packing.where({"epoch": 0, "row": 2
                          }) == "epoch 0, from row 2" and packing.of(1)[0] is rows
    assert Rows(packing).where({"data": (0, 2), "replay": ()
                                }) == "epoch 0, from row 2" and packing.of(1)[0] is rows


def test_replay_has_its_share_of_every_span():
    rows = rows_of(Rows(numbers(1), numbers(-1), 0.3), [100])[:, 0, 0]
    assert rows[rows > 0].tolist() == list(range(
        1, 71)) and rows[rows < 0].tolist() == [-n for n in range(1, 31)]
    assert all(
        abs((rows[a:b] < 0).sum() - 0.3 * (b - a)) < 1 for a in range(100) for b in range(a, 101))


def test_text_is_learned_whole_and_nothing_twice():
    documents = [ids for ids, _ in items(6)]
    ids, targets, _ = Joined(documents, T, None, EOT).all()
    tokens = [token for document in documents for token in document]
    assert ids.ravel()[:len(tokens) - 1].tolist() == tokens[:-1]
    assert [t for t in targets.ravel().tolist() if t >= 0
            ] == tokens[1:] and (targets >= 0).sum() == len(tokens) - 1


def test_micro_batches_and_processes_share_out_the_same_rows():
    rows, *_ = Packing(items(40), T, 1, EOT).read_batch(8 * T, 0, 0)
    whole = row_micro_batches(rows, 8, Processes("cpu"), True)[0]
    for world_size, micro_batch in ((1, 4), (2, 2), (4, 1)):
        parts = [
            part for rank in range(world_size) for part in row_micro_batches(
                rows, micro_batch,
                SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu")), True)
        ]
        for got, want in ((torch.cat([part[0] for part in parts]), whole[0]),
                          (torch.cat([part[1] for part in parts]), whole[1]),
                          (torch.cat([part[2].mask for part in parts]), whole[2].mask),
                          (torch.cat([part[2].positions for part in parts]), whole[2].positions)):
            assert torch.equal(got, want)
    assert not any(value.dim() == 4
                   for part in parts
                   for value in vars(part[2]).values())  # masks would be the most of a batch
    assert all(len(part) == 2 for part in row_micro_batches(rows, 4, Processes("cpu"), False))
