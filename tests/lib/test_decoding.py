"""lib/decoding.py against whole forward passes: python -m pytest tests/lib/test_decoding.py"""

import math

import pytest
import torch
from helpers import sentences, tiny

import lib.attention
import lib.decoding
from lib.cli import BadInput, check
from lib.decoding import (
    Decoder,
    NonFinite,
    SampleConfig,
    SeparateBias,
    Text,
    cast_weights,
    draw,
    generate,
    sample,
)
from lib.moe import is_capturable
from lib.tokenizers import load_tokenizer
from train_gpt2 import GPT

TOGGLES = [
    dict(),
    dict(pos="rope", n_head=4),
    dict(pos="rope", norm="rmsnorm", mlp="swiglu", emb_norm=True, qk_norm=True, bias=False),
    dict(norm="rmsnorm", qk_norm=True, value_residual=True, residual_scalars=True, token_shift=True,
         softcap=3.0),
    dict(pos="rope", bigram=50),
]


def greedy(logits):
    return logits.argmax(dim=-1)


def last_logits(model, ids):
    """The logits after a text, by a whole forward pass."""
    return model(torch.tensor([ids]))[0, -1]


@pytest.fixture
def model():
    """An untrained model with token shift."""
    torch.manual_seed(0)
    model = GPT(tiny(pos="rope", init="xavier", token_shift=True)).eval()
    for block in model.transformer.h:
        block.token_shift.weight.data.normal_()
    return model


@pytest.fixture
def widths(model):
    """The shapes (rows, tokens) of the model's forward passes."""
    shapes = []
    model.transformer.wte.register_forward_hook(
        lambda module, args, out: shapes.append(tuple(out.shape[:2])))
    return shapes


# --------------------------------------------------------------------------------------------------
# The decoding step


def plain_varlen(q, k, v, starts_q, starts_k, max_q, max_k):
    """The documented behavior of torch's varlen_attn, which needs a GPU: q (queries, H, D), k and v
    (keys, H, D)."""
    out = torch.full_like(q, torch.nan)
    for i in range(len(starts_q) - 1):
        queries = slice(*starts_q[i:i + 2].tolist())
        keys = slice(*starts_k[i:i + 2].tolist())
        assert queries.stop - queries.start <= max_q
        assert keys.stop - keys.start <= max_k
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) * q.size(-1) ** -0.5
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v[keys])
    return out


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("toggles", TOGGLES)
def test_cached_logits_match_whole_forward_passes(toggles, flash, monkeypatch):
    """Texts of different lengths in one batch, each as if alone; beyond the context of 16 tokens,
    with the newer half from position 0."""
    if flash:
        monkeypatch.setattr(lib.attention, "varlen_attn", plain_varlen)
        monkeypatch.setattr(lib.decoding, "MaskedFirst", None)
    else:
        monkeypatch.setattr(lib.decoding, "FlashFirst", None)
    torch.manual_seed(0)
    model = GPT(tiny(init="xavier", **toggles)).eval()
    for p in model.parameters():  # some start at 0
        p.data += 0.02 * torch.randn_like(p)
    prompts = [torch.randint(61, (n,)).tolist() for n in (5, 1, 16, 30, 12)]
    decoder = Decoder(model, 5, 60)
    decoder.flash = flash  # on a GPU, if captured or compiled
    seen = []

    def choose(logits):
        seen.append(logits.clone())
        return greedy(logits)

    steps = list(generate(decoder, prompts, 20, choose))
    assert len(steps) == len(seen) == 20
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        visible = prompt[-16:]
        for step, logits in zip(steps, seen):
            torch.testing.assert_close(logits[row], last_logits(model, visible))
            ids.append(step[row])
            visible = visible + [step[row]] if len(visible) < 16 else ids[-8:]


def test_a_row_is_filled_again_while_others_continue(model):
    decoder = Decoder(model, 3, 16)
    decoder.fill([0, 2], [[1, 2, 3], [4]])
    decoder.step(torch.tensor([5, 0, 6]))
    expected = torch.stack([last_logits(model, ids) for ids in ([7], [8, 9])])
    torch.testing.assert_close(decoder.fill([1, 2], [[7], [8, 9]]), expected)
    logits = decoder.step(torch.tensor([10, 11, 12]))
    for row, ids in enumerate(([1, 2, 3, 5, 10], [7, 11], [8, 9, 12])):
        torch.testing.assert_close(logits[row], last_logits(model, ids))


def test_a_step_of_the_first_rows_and_a_text_moved_there(model, widths):
    decoder = Decoder(model, 4, 16)
    decoder.fill([0, 1, 2], [[1, 2, 3], [4], [5, 6]])
    decoder.step(torch.tensor([7, 8, 9]))
    decoder.move(2, 0)
    logits = decoder.step(torch.tensor([10, 11]))
    assert [rows for rows, _ in widths] == [3, 3, 2]
    for row, ids in enumerate(([5, 6, 9, 10], [4, 8, 11])):
        torch.testing.assert_close(logits[row], last_logits(model, ids))
    torch.testing.assert_close(decoder.fill([2], [[12]])[0], last_logits(model, [12]))
    logits = decoder.step(torch.tensor([1, 2, 3]))
    torch.testing.assert_close(logits[2], last_logits(model, [12, 3]))


def test_a_new_token_costs_one_position(model, widths):
    steps = generate(Decoder(model, 2, 12), [[1, 2], [3, 4, 5]], 4, greedy)
    next(steps)
    # the second step runs while the caller handles the first token
    assert [tokens for _, tokens in widths] == [3, 1]
    assert len(list(steps)) == 3
    assert [tokens for _, tokens in widths] == [3, 1, 1, 1]


@pytest.mark.parametrize("toggles", [*TOGGLES, dict(norm="layernorm", qk_norm=True, pos="rope")])
def test_weights_cast_once_have_the_logits_of_autocast(toggles):
    torch.manual_seed(0)
    model = GPT(tiny(init="xavier", **toggles)).eval()
    idx = torch.randint(61, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        light = cast_weights(model)
        assert torch.equal(light(idx), model(idx))
        assert light.lm_head.weight.dtype == torch.bfloat16
        assert light.transformer.wte.weight is model.transformer.wte.weight
        logits = Decoder(model, 2, 16).fill([0, 1], idx.tolist())
        apart = cast_weights(model, separate_bias=True)
        torch.testing.assert_close(apart(idx), model(idx), rtol=0, atol=0.02)
        linears = [m for m in apart.modules() if isinstance(m, torch.nn.Linear)]
        assert {type(m) for m in linears if m.bias is not None} <= {SeparateBias}
    assert logits.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight  # unchanged
    assert cast_weights(model) is model
    model.unshard = None  # marks a sharded model, whose modules cannot be copied
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cast_weights(model) is model


def test_the_step_is_one_graph_for_the_compiler():
    """As compiled or captured on a GPU; here without a back end, so that only tracing is tested."""
    torch.manual_seed(0)
    model = GPT(tiny(**TOGGLES[3])).eval()
    prompts = [[1, 2, 3], [4]]
    decoder = Decoder(model, 2, 16)
    decoder.compiled = True
    decoder.compute = torch.compile(decoder._step, backend="eager", fullgraph=True)
    eager = Decoder(model, 2, 16)
    compiled_tokens = list(generate(decoder, prompts, 10, greedy))
    assert compiled_tokens == list(generate(eager, prompts, 10, greedy))


@pytest.mark.parametrize("capability, in_bf16", [
    ((8, 9), False),
    ((9, 0), True),
    ((10, 0), True),
    ((12, 0), False),
])
def test_experts_are_captured_only_where_grouped_mm_does_not_sync(
        capability, in_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert is_capturable(GPT(tiny()), None)
    experts = GPT(tiny(n_experts=4))
    assert not is_capturable(experts, None)
    assert is_capturable(experts.bfloat16(), None) == in_bf16


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_flash_attention_of_a_step_matches_a_mask(compile, monkeypatch):
    torch.manual_seed(0)
    model = GPT(tiny(block_size=256, n_embd=128, n_head=2, init="xavier")).eval().cuda()
    prompts = [[1] * 200, [2, 3], [4] * 250]
    with torch.autocast("cuda", torch.bfloat16):
        flash = Decoder(model, 3, 400, graphs=True, compile=compile)
        single = Decoder(model, 1, 400, graphs=True, compile=compile)
        monkeypatch.setattr(lib.decoding, "flash_fits", lambda device, head_dim: False)
        masked = Decoder(model, 3, 400, graphs=True)
        assert flash.flash and single.flash and not masked.flash
        for decoder in (flash, single, masked):
            rows = decoder.cache.rows
            decoder.fill(range(rows), prompts[:rows])
        for token in range(3):
            tokens = torch.arange(3, device="cuda") + token
            expected = masked.step(tokens)
            torch.testing.assert_close(flash.step(tokens), expected, rtol=0, atol=0.05)
            torch.testing.assert_close(single.step(tokens[:1]), expected[:1], rtol=0, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("toggles, compile", [
    (TOGGLES[2], False),
    (TOGGLES[2], True),
    (dict(n_experts=4, mlp="relu2"), False),
])
def test_graphs_match_eager_steps(toggles, compile):
    torch.manual_seed(0)
    model = GPT(tiny(block_size=256, init="xavier", **toggles)).eval().cuda()
    prompts = [torch.randint(61, (n,)).tolist() for n in (100, 3)]

    def both(rows, length):
        eager = Decoder(model, rows, length)
        graphs = Decoder(model, rows, length, graphs=True, compile=compile)
        eager.flash = graphs.flash  # in bf16 it rounds differently than a mask
        return eager, graphs

    # experts are captured in bf16 only
    with torch.autocast("cuda", torch.bfloat16, enabled="n_experts" in toggles):
        eager, graphs = both(2, 400)  # beyond a span and the context
        tokens = list(generate(graphs, prompts, 300, greedy))
        assert tokens == list(generate(eager, prompts, 300, greedy))
        for rows in (3, 5):  # captured for 4 rows, and for all 5
            eager, graphs = both(5, 64)
            filled = graphs.fill(range(rows), [[1, 2]] * rows)
            torch.testing.assert_close(filled, eager.fill(range(rows), [[1, 2]] * rows))
            for token in range(3):
                tokens = torch.arange(rows, device="cuda") + token
                logits = graphs.step(tokens)
                torch.testing.assert_close(logits, eager.step(tokens), rtol=0, atol=1e-3)
            assert graphs.graphs


# --------------------------------------------------------------------------------------------------
# Sampling


def shares(logits, *settings):
    """How often each index is drawn, of 4,000."""
    rows = torch.tensor([logits]).expand(4000, -1)
    drawn = draw(rows, *settings, generator=torch.Generator().manual_seed(0))
    return drawn.bincount(minlength=len(logits)) / 4000


def test_draws_follow_softmax():
    logits = [1.0, 0.0, -1.0, 2.0]  # probabilities: 0.237, 0.087, 0.032, 0.644
    noise = 4 * math.sqrt(0.25 / 4000)
    for temperature in (1.0, 0.5):
        expected = (torch.tensor(logits) / temperature).softmax(dim=-1)
        assert (shares(logits, temperature) - expected).abs().max() < noise
    first_two = torch.tensor([0.2689, 0, 0, 0.7311])
    for settings in ((1.0, 2), (1.0, 0, 0.7), (1.0, 3, 0.8)):
        found = shares(logits, *settings)
        assert (found - first_two).abs().max() < noise, settings
        assert found[1] == found[2] == 0, settings
    always = [(0,), (1e-50,), (1e-45,), (1e-9,), (1.0, 1), (1.0, 0, 1e-9), (1e-9, 3, 0.9)]
    for settings in always:
        assert shares(logits, *settings)[3] == 1, settings


def test_each_row_may_have_its_own_temperature_and_top_p():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(3000, -1)
    temperature = torch.tensor([[0.0], [1.0], [1.0]]).repeat(1000, 1)
    top_p = torch.tensor([[1.0], [0.6], [1.0]]).repeat(1000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits, temperature, 0, top_p, generator).view(1000, 3)
    assert (drawn[:, :2] == 3).all()
    assert abs((drawn[:, 2] == 3).float().mean() - 0.644) < 0.07


def test_samples_end_at_the_end_of_text_and_leave_random_state_alone(tokenizer):
    torch.manual_seed(3)
    model = GPT(tiny(vocab_size=tokenizer.vocab_size, vocab_multiple=128)).train()
    model.lm_head.weight.data[tokenizer.eot] += 0.05  # likelier than others
    before = torch.random.get_rng_state()
    prompts = ["the cat", "a longer dog"]
    settings = SampleConfig(samples=4, max_new_tokens=200)
    shown = []
    texts = sample(model, tokenizer, prompts, settings, shown.append)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    assert texts == sample(model, tokenizer, prompts, settings)
    assert texts[0] == "".join(shown)
    assert all(text.startswith("the cat") for text in texts[:4])
    assert all(text.startswith("a longer dog") for text in texts[4:])
    assert not any("<|endoftext|>" in text for text in texts)
    assert len(set(texts)) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_bad_input(value, tokenizer):
    model = GPT(tiny(vocab_size=tokenizer.vocab_size)).train()
    model.transformer.h[0].mlp.c_fc.weight.data[3, 3] = value
    for settings in (SampleConfig(), SampleConfig(temperature=0.0), SampleConfig(top_p=0.5)):
        with pytest.raises(NonFinite, match="NaN or infinite: .* name an earlier checkpoint"):
            sample(model, tokenizer, ["the cat"], settings)
    assert model.training


@pytest.mark.parametrize("setting", [
    dict(samples=10**9),
    dict(max_new_tokens=10**308),
    dict(temperature=math.nan),
    dict(seed=2**63),
    dict(top_p=0.0),
    dict(top_p=2.0),
])
def test_settings_out_of_bounds(setting):
    with pytest.raises(BadInput, match=f"--{next(iter(setting))} must be"):
        check(SampleConfig(**setting))


# --------------------------------------------------------------------------------------------------
# Text


def test_pieces_of_text_are_whole_characters():
    tokenizer = load_tokenizer("gpt2")
    for string in ("plain", "naïve 日本語 🙂🙃 e\u0301", " \n\n\t x", "\x00\x7f"):
        ids = tokenizer.encode(string).tolist()
        text = Text(tokenizer, len(ids) + 5)
        pieces = [text.add(token) for token in ids]
        assert "".join(pieces) == text.text == string
        assert text.ended is None
        assert text.add(tokenizer.eot) == ""
        assert (text.ended, text.text) == ("stop", string)
    cut = Text(tokenizer, 1)
    first = tokenizer.encode("🙂").tolist()[0]
    assert cut.add(first) == cut.text == "\ufffd"
    assert cut.ended == "length"


@pytest.mark.parametrize("stop", [
    ["at"], ["sat on"], ["the mat", "on the"], ["zzz", "."], [" "], ["on the mats"], [""], [],
])
def test_stop_strings_are_found_across_tokens(stop, tokenizer):
    string = "the cat sat on the mat. the dog"
    found = [string.find(one) for one in stop if one and one in string]
    expected = string[:min(found, default=len(string))]
    by_character = [int(tokenizer.encode(character)[0]) for character in string]
    for ids in (tokenizer.encode(string).tolist(), by_character):
        text = Text(tokenizer, 99, stop)
        pieces = [text.add(token) for token in [*ids, tokenizer.eot]]
        assert "".join(pieces) == text.text == expected
        assert text.ended == "stop"


def test_other_end_tokens(tokenizer):
    ids = tokenizer.encode(sentences(1)[0]).tolist()
    text = Text(tokenizer, 99, ends=ids[2:3])
    pieces = [text.add(token) for token in ids[:4]]
    assert [bool(piece) for piece in pieces] == [True, True, False, False]
    assert text.ended == "stop"


def test_control_tokens_end_a_turn_and_are_not_text(tokenizer):
    ids = tokenizer.encode("the cat").tolist()
    text = Text(tokenizer, 99)
    for token in (*ids, tokenizer.reserved["<|user|>"], *ids, tokenizer.reserved["<|end|>"], *ids):
        text.add(token)
    assert (text.text, text.ended) == ("the catthe cat", "stop")
    assert tokenizer.decode([*ids, *tokenizer.reserved.values()]) == "the cat"
