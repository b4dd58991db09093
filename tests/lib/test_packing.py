"""lib/packing.py against one conversation at a time: python -m pytest tests/lib/test_packing.py"""

import json
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
    "gpt2": {},
    "modern": dict(mlp="swiglu", norm="rmsnorm", pos="rope", emb_norm=True, bias=False),
    "speedrun": dict(mlp="relu2", norm="rmsnorm", pos="rope", emb_norm=True, qk_norm=True,
                     bias=False, token_shift=True, value_residual=True, residual_scalars=True,
                     softcap=15.0),
    "untied": dict(token_shift=True, tie_embeddings=False),
    "bigrams": dict(pos="rope", bigram=50),
    "experts": dict(n_experts=4, n_active=2, pos="rope"),
}


def items(n, seed=0, longest=T + 1):
    """Conversations as (ids, learned), some of the longest that fits a row."""
    rng = random.Random(seed)
    lengths = [rng.choice((longest, rng.randint(2, longest))) for _ in range(n)]
    conversations = []
    for length in lengths:
        ids = [EOT] + [rng.randrange(60) for _ in range(length - 1)]
        learned = [False] + [rng.random() < 0.6 for _ in range(length - 2)] + [True]
        conversations.append((ids, learned))
    return conversations


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
        targets = torch.tensor(ids[1:]).where(torch.tensor(learned[1:]), -1)
        total = total + F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return total


@pytest.mark.parametrize("kind", MODELS)
def test_packed_rows_have_the_losses_and_gradients_of_one_conversation_at_a_time(kind):
    model = opinionated(vocab_size=61, vocab_multiple=61, **MODELS[kind])
    conversations = items(25)
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
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-3 * scale + 1e-6,
                                   msg=name)
    with torch.no_grad():
        logits, seeing_all = model(ids, packed=Packed(documents)), model(ids)
        for row, members in enumerate(packing.of(0)[0]):
            for document, i in enumerate(members, 1):
                alone = model(torch.tensor([conversations[i][0][:-1]]))[0]
                packed = logits[row][documents[row] == document]
                torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert (logits - seeing_all).abs().max() > 0.02  # so that the comparison could fail


def test_validation_is_the_mean_over_what_is_learned():
    model = opinionated(vocab_size=61, vocab_multiple=61).eval()
    conversations = items(9)
    rows = Packing(conversations, T, None, EOT).all()
    count = sum(sum(learned[1:]) for _, learned in conversations)
    want = one_at_a_time(model, conversations).item() / count
    for micro_batch in (1, 3, 8):
        loss = mean_loss(model, rows, micro_batch, Processes("cpu"))
        assert loss == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_it_compiles_as_one_graph_that_fits_any_packing(kind):
    model = GPT(tiny(**MODELS[kind])).train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
    for seed in range(3):
        rows = Packing(items(12, seed), T, seed, EOT).all()[:, :4]
        ids, targets, documents = map(torch.from_numpy, rows)
        torch.testing.assert_close(compiled(ids, targets, Packed(documents)),
                                   model(ids, targets, Packed(documents)))
        assert len(graphs) == 1


def test_first_fit_by_hand():
    assert first_fit([5, 6, 4, 3, 1, 10, 1], 10) == [[0, 2, 4], [1, 3, 6], [5]]
    assert first_fit([], 4) == []


def rows_of(stream, sizes):
    return np.concatenate([stream.next(n * T) for n in sizes])


def numbers(step):
    """A source of rows that contain step, 2 step, 3 step, ..."""
    def read_batch(n, at):
        rows = (np.arange(at, at + n // T) + 1) * step
        return np.broadcast_to(rows[:, None, None], (n // T, 3, T)), at + n // T

    return SimpleNamespace(names=("at",), position=(0,), block_size=T, read_batch=read_batch,
                           where=lambda state: f"row {state['at']}")


def packings(seed, epochs):
    """The conversations in each row, for each of the epochs."""
    packing = Packing(items(40), T, seed, EOT)
    found = []
    for epoch in epochs:
        rows, _ = packing.of(epoch)
        found.append([tuple(row) for row in rows])
    return found


def test_every_epoch_has_every_conversation_once_in_another_packing():
    first, second, third = packings(7, range(3))
    for rows in (first, second, third):
        members = [i for row in rows for i in row]
        assert sorted(members) == list(range(40))
    assert first != second != third
    assert packings(7, [2]) == [third]  # follows from the seed and the epoch alone
    assert packings(8, [2]) != [third]


@pytest.mark.parametrize("cut", [lambda: Packing(items(40), T, 3, EOT),
                                 lambda: Joined([ids for ids, _ in items(40)], T, 3, EOT)])
def test_the_stream_is_the_same_in_batches_of_any_size_and_after_a_resume(cut):
    whole = rows_of(Rows(cut(), numbers(-1), 0.3), [60])
    assert (whole == rows_of(Rows(cut(), numbers(-1), 0.3), [7, 1, 30, 22])).all()
    stream = Rows(cut(), numbers(-1), 0.3)
    rows_of(stream, [37])
    state = stream.state_dict()
    later = Rows(cut(), numbers(-1), 0.3)
    later.load_state_dict(json.loads(json.dumps(state)))  # as a checkpoint has it
    assert (rows_of(later, [23]) == whole[37:]).all()
    assert "epoch" in stream.where(state) and "replay row" in stream.where(state)
    with pytest.raises(IndexError):
        stream.where(state | {"data": (0, 10**6)})


def test_where_leaves_what_the_prefetch_thread_reads_from():
    packing = Packing(items(40), T, 3, EOT)
    rows, _ = packing.of(1)
    assert packing.where({"epoch": 0, "row": 2}) == "epoch 0, from row 2"
    assert Rows(packing).where({"data": (0, 2), "replay": ()}) == "epoch 0, from row 2"
    assert packing.of(1)[0] is rows


def test_replay_has_its_share_of_every_span():
    rows = rows_of(Rows(numbers(1), numbers(-1), 0.3), [100])[:, 0, 0]
    assert rows[rows > 0].tolist() == list(range(1, 71))
    assert rows[rows < 0].tolist() == list(range(-1, -31, -1))
    for a in range(100):
        for b in range(a, 101):
            assert abs((rows[a:b] < 0).sum() - 0.3 * (b - a)) < 1


def test_text_is_learned_whole_and_nothing_twice():
    documents = [ids for ids, _ in items(6)]
    ids, targets, _ = Joined(documents, T, None, EOT).all()
    tokens = [token for document in documents for token in document]
    assert ids.ravel()[:len(tokens) - 1].tolist() == tokens[:-1]
    assert targets[targets >= 0].tolist() == tokens[1:]


@pytest.mark.parametrize("world_size, micro_batch", [(1, 4), (2, 2), (4, 1)])
def test_micro_batches_and_processes_divide_the_same_rows(world_size, micro_batch):
    rows, *_ = Packing(items(40), T, 1, EOT).read_batch(8 * T, 0, 0)
    ((idx, targets, packed),) = row_micro_batches(rows, 8, Processes("cpu"), True)
    parts = []
    for rank in range(world_size):
        process = SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))
        parts += row_micro_batches(rows, micro_batch, process, True)
    assert torch.equal(torch.cat([part[0] for part in parts]), idx)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    assert torch.equal(torch.cat([part[2].mask for part in parts]), packed.mask)
    assert torch.equal(torch.cat([part[2].positions for part in parts]), packed.positions)


def test_a_batch_stores_no_masks_and_plain_rows_have_no_packed():
    rows, *_ = Packing(items(40), T, 1, EOT).read_batch(8 * T, 0, 0)
    for _, _, packed in row_micro_batches(rows, 4, Processes("cpu"), True):
        assert all(value.dim() < 4 for value in vars(packed).values())
    assert all(len(part) == 2 for part in row_micro_batches(rows, 4, Processes("cpu"), False))
