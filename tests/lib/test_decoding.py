"""lib/decoding.py against whole forward passes: python -m pytest tests/lib/test_decoding.py"""

import math

import pytest
import torch
from helpers import sentences, tiny

import lib.attention
import lib.decoding
from lib.cli import BadInput, check
from lib.decoding import Decoder, NonFinite, SampleConfig, SeparateBias, Text, cast_weights, draw, generate, sample
from lib.moe import is_capturable
from lib.tokenizers import load_tokenizer
from train_gpt2 import GPT

TOGGLES = [
    dict(),
    dict(pos="rope", n_head=4),
    dict(pos="rope", norm="rmsnorm", mlp="swiglu", emb_norm=True, qk_norm=True, bias=False),
    dict(norm="rmsnorm", qk_norm=True, value_residual=True, residual_scalars=True, token_shift=True,
         softcap=3.0)
]


def greedy(logits):
    return logits.argmax(dim=-1)


def plain_varlen(q, k, v, starts_q, starts_k, max_q, max_k):
    """What torch's varlen_attn, which needs a GPU, is documented to do: q (queries, H, D), k and v
    (keys, H, D)."""
    out = torch.full_like(q, torch.nan)
    for i in range(len(starts_q) - 1):
        queries, keys = (slice(*starts[i:i + 2].tolist()) for starts in (starts_q, starts_k))
        assert queries.stop - queries.start <= max_q and keys.stop - keys.start <= max_k
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) * q.size(-1) ** -0.5
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v[keys])
    return out


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("toggles", TOGGLES)
def test_cached_logits_are_those_of_the_whole_text(toggles, flash, monkeypatch):
    """Texts of different lengths side by side, each as if alone; past the window (16 tokens),
    with its newest half at position 0."""
    monkeypatch.setattr(*((lib.attention, "varlen_attn",
                           plain_varlen) if flash else (lib.decoding, "FlashFirst", None)))
    if flash:
        monkeypatch.setattr(lib.decoding, "MaskedFirst", None)
    torch.manual_seed(0)
    model, seen = GPT(tiny(init="xavier", **toggles)).eval(), []
    for p in model.parameters():  # some start at 0
        p.data += 0.02 * torch.randn_like(p)
    prompts = [torch.randint(61, (n,)).tolist() for n in (5, 1, 16, 30, 12)]
    decoder = Decoder(model, 5, 60)
    decoder.flash = flash  # on a GPU, if captured or compiled
    steps = list(
        generate(decoder, prompts, 20,
                 lambda logits: seen.append(logits.clone()) or greedy(logits)))
    assert len(steps) == len(seen) == 20
    for row, prompt in enumerate(prompts):
        ids, visible = list(prompt), prompt[-16:]
        for step, logits in zip(steps, seen):
            torch.testing.assert_close(logits[row], model(torch.tensor([visible]))[0, -1])
            ids.append(step[row])
            visible = visible + [step[row]] if len(visible) < 16 else ids[-8:]


def test_a_row_is_begun_anew_while_others_go_on():
    model = GPT(tiny(pos="rope", init="xavier", token_shift=True)).eval()
    for block in model.transformer.h:
        block.token_shift.weight.data.normal_()
    decoder = Decoder(model, 3, 16)
    decoder.fill([0, 2], [[1, 2, 3], [4]])
    decoder.step(torch.tensor([5, 0, 6]))
    torch.testing.assert_close(
        decoder.fill([1, 2], [[7], [8, 9]]),
        torch.stack([model(torch.tensor([ids]))[0, -1] for ids in ([7], [8, 9])]))
    logits = decoder.step(torch.tensor([10, 11, 12]))
    for row, ids in enumerate(([1, 2, 3, 5, 10], [7, 11], [8, 9, 12])):
        torch.testing.assert_close(logits[row], model(torch.tensor([ids]))[0, -1])


def test_the_first_rows_alone_and_a_text_that_moves_into_them():
    torch.manual_seed(0)
    model, widths = GPT(tiny(pos="rope", init="xavier", token_shift=True)).eval(), []
    for block in model.transformer.h:
        block.token_shift.weight.data.normal_()
    model.transformer.wte.register_forward_hook(
        lambda module, args, out: widths.append(out.size(0)))
    decoder = Decoder(model, 4, 16)
    decoder.fill([0, 1, 2], [[1, 2, 3], [4], [5, 6]])
    decoder.step(torch.tensor([7, 8, 9]))
    decoder.move(2, 0)
    logits = decoder.step(torch.tensor([10, 11]))
    assert widths == [3, 3, 2]
    for row, ids in enumerate(([5, 6, 9, 10], [4, 8, 11])):
        torch.testing.assert_close(logits[row], model(torch.tensor([ids]))[0, -1])
    torch.testing.assert_close(decoder.fill([2], [[12]])[0], model(torch.tensor([[12]]))[0, -1])
    torch.testing.assert_close(
        decoder.step(torch.tensor([1, 2, 3]))[2],
        model(torch.tensor([[12, 3]]))[0, -1])


def test_a_new_token_costs_one_position():
    model, widths = GPT(tiny()).eval(), []
    model.transformer.wte.register_forward_hook(
        lambda module, args, out: widths.append(out.size(1)))
    next(steps := generate(Decoder(model, 2, 12), [[1, 2], [3, 4, 5]], 4, greedy))
    assert widths == [3, 1]  # the next step runs while the caller looks at the first token
    assert len(list(steps)) == 3 and widths == [3, 1, 1, 1]


@pytest.mark.parametrize("toggles", [*TOGGLES, dict(norm="layernorm", qk_norm=True, pos="rope")])
def test_weights_cast_once_give_the_logits_of_autocast(toggles):
    torch.manual_seed(0)
    model, idx = GPT(tiny(init="xavier", **toggles)).eval(), torch.randint(61, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        light = cast_weights(model)
        assert torch.equal(light(idx), model(idx))
        assert light.lm_head.weight.dtype == torch.bfloat16 and light.transformer.wte.weight is model.transformer.wte.weight
        logits = Decoder(model, 2, 16).fill([0, 1], idx.tolist())
        apart = cast_weights(model, separate_bias=True)
        torch.testing.assert_close(apart(idx), model(idx), rtol=0, atol=0.02)
        assert {
            type(m)
            for m in apart.modules()
            if isinstance(m, torch.nn.Linear) and m.bias is not None
        } <= {SeparateBias}
    assert logits.dtype == torch.float32 and model.lm_head.weight is model.transformer.wte.weight
    assert cast_weights(model) is model


def test_the_step_is_one_graph_for_the_compiler():
    """What is compiled or captured on a GPU; here without a back end, so that only tracing is
    tried."""
    torch.manual_seed(0)
    model, prompts = GPT(tiny(**TOGGLES[3])).eval(), [[1, 2, 3], [4]]
    decoder = Decoder(model, 2, 16)
    decoder.compiled = True
    decoder.compute = torch.compile(decoder._step, backend="eager", fullgraph=True)
    assert list(generate(decoder, prompts, 10,
                         greedy)) == list(generate(Decoder(model, 2, 16), prompts, 10, greedy))


@pytest.mark.parametrize("capability, in_bf16", [((8, 9), False), ((9, 0), True), ((10, 0), True),
                                                 ((12, 0), False)])
def test_graphs_are_captured_of_experts_only_where_grouped_mm_does_not_wait(
        capability, in_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    models = GPT(tiny()), GPT(tiny(n_experts=4)), GPT(tiny(n_experts=4)).bfloat16()
    assert [is_capturable(model, None) for model in models] == [True, False, in_bf16]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_flash_attention_of_a_step_gives_what_a_mask_gives(compile, monkeypatch):
    torch.manual_seed(0)
    model = GPT(tiny(block_size=256, n_embd=128, n_head=2, init="xavier")).eval().cuda()
    prompts = [[1] * 200, [2, 3], [4] * 250]
    with torch.autocast("cuda", torch.bfloat16):
        decoders = [Decoder(model, n, 400, graphs=True, compile=compile) for n in (3, 1)]
        monkeypatch.setattr(lib.decoding, "flash_fits", lambda device, head_dim: False)
        decoders.append(Decoder(model, 3, 400, graphs=True))
        assert [decoder.flash for decoder in decoders] == [True, True, False]
        for decoder in decoders:
            decoder.fill(range(decoder.cache.rows), prompts[:decoder.cache.rows])
        for token in range(3):
            logits = [
                decoder.step(torch.arange(decoder.cache.rows, device="cuda") + token)
                for decoder in decoders
            ]
            torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=0.05)
            torch.testing.assert_close(logits[1], logits[2][:1], rtol=0, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("toggles, compile", [(TOGGLES[2], False), (TOGGLES[2], True),
                                              (dict(n_experts=4, mlp="relu2"), False)])
def test_graphs_give_what_eager_steps_give(toggles, compile):
    torch.manual_seed(0)
    model = GPT(tiny(block_size=256, init="xavier", **toggles)).eval().cuda()
    prompts = [torch.randint(61, (n,)).tolist() for n in (100, 3)]
    with torch.autocast("cuda", torch.bfloat16, enabled="n_experts"
                        in toggles):  # of experts, captured in bf16 alone
        def both(*shape):
            eager, graphs = Decoder(model, *shape), Decoder(model, *shape, graphs=True,
                                                            compile=compile)
            eager.flash = graphs.flash  # in bf16 it rounds otherwise than a mask does
            return eager, graphs

        texts = [list(generate(decoder, prompts, 300, greedy))
                 for decoder in both(2, 400)]  # past a span and the window
        assert texts[0] == texts[1]
        for rows in (3, 5):  # captured for 4 rows, and for the 5 there are
            eager, graphs = both(5, 64)
            torch.testing.assert_close(*(decoder.fill(range(rows), [[1, 2]] * rows)
                                         for decoder in (eager, graphs)))
            for token in range(3):
                tokens = torch.arange(rows, device="cuda") + token
                torch.testing.assert_close(graphs.step(tokens), eager.step(tokens), rtol=0,
                                           atol=1e-3)
            assert graphs.graphs


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def shares(logits, *how):
    drawn = draw(
        torch.tensor([logits]).expand(4000, -1), *how, generator=torch.Generator().manual_seed(0))
    return drawn.bincount(minlength=len(logits)) / 4000


def test_draws_follow_softmax():
    logits, noise = [1.0, 0.0, -1.0, 2.0], 4 * math.sqrt(0.25 / 4000)
    for temperature in (1.0, 0.5):
        want = (torch.tensor(logits) / temperature).softmax(dim=-1)
        assert (shares(logits, temperature) - want).abs().max() < noise
    first_two = torch.tensor([0.2689, 0, 0, 0.7311])
    for how in ((1.0, 2), (1.0, 0, 0.7), (1.0, 3,
                                          0.8)):  # probabilities: 0.644, 0.237, 0.087, 0.032
        have = shares(logits, *how)
        assert (have - first_two).abs().max() < noise and have[1] == have[2] == 0, how
    for how in ((0,), (1e-50,), (1e-45,), (1e-9,), (1.0, 1), (1.0, 0, 1e-9), (1e-9, 3, 0.9)):
        assert shares(logits, *how)[3] == 1, how


def test_every_row_may_have_its_own_temperature_and_top_p():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(3000, -1)
    temperature = torch.tensor([[0.0], [1.0], [1.0]]).repeat(1000, 1)
    top_p = torch.tensor([[1.0], [0.6], [1.0]]).repeat(1000, 1)
    drawn = draw(logits, temperature, 0, top_p, torch.Generator().manual_seed(0)).view(1000, 3).T
    assert (drawn[:2] == 3).all() and abs((drawn[2] == 3).float().mean() - 0.644) < 0.07


def test_samples_end_at_the_end_of_text_and_leave_random_state_alone(tokenizer):
    torch.manual_seed(3)
    model = GPT(tiny(vocab_size=tokenizer.vocab_size, vocab_multiple=128)).train()
    model.lm_head.weight.data[tokenizer.eot] += 0.05  # likelier than others
    before, shown = torch.random.get_rng_state(), []
    settings = ["the cat", "a longer dog"], SampleConfig(samples=4, max_new_tokens=200)
    texts = sample(model, tokenizer, *settings, shown.append)
    assert torch.equal(before, torch.random.get_rng_state()) and model.training
    assert texts == sample(model, tokenizer, *settings) and texts[0] == "".join(shown)
    assert all(
        text.startswith("the cat" if i < 4 else "a longer dog") and "<|endoftext|>" not in text
        for i, text in enumerate(texts))
    assert len(set(texts)) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverged_is_said_in_one_line(value, tokenizer):
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
    dict(top_p=2.0)
])
def test_absurd_settings_are_out_of_bounds(setting):
    with pytest.raises(BadInput, match=f"--{next(iter(setting))} must be"):
        check(SampleConfig(**setting))


# ----------------------------------------------------------------------------------------------------------------------
# Text


def test_pieces_of_text_are_whole_characters():
    tokenizer = load_tokenizer("gpt2")
    for text in ("plain", "naïve 日本語 🙂🙃 e\u0301", " \n\n\t x", "\x00\x7f"):
        ids = tokenizer.encode(text).tolist()
        written = Text(tokenizer, len(ids) + 5)
        pieces = [written.add(token) for token in ids]
        assert "".join(
            pieces) == written.text == text and "\ufffd" not in text and written.ended is None
        assert written.add(tokenizer.eot) == "" and (written.ended, written.text) == ("stop", text)
    cut = Text(tokenizer, 1)
    assert cut.add(
        tokenizer.encode("🙂").tolist()[0]) == cut.text == "\ufffd" and cut.ended == "length"


@pytest.mark.parametrize(
    "stop",
    [["at"], ["sat on"], ["the mat", "on the"], ["zzz", "."], [" "], ["on the mats"], [""], []])
def test_stop_strings_are_found_wherever_tokens_end(stop, tokenizer):
    text = "the cat sat on the mat. the dog"
    want = min([text] + [text[:text.find(s)] for s in stop if s and s in text], key=len)
    for ids in (tokenizer.encode(text).tolist(), list(text.encode())):
        ids = ids if ids != list(text.encode()) else [int(tokenizer.encode(c)[0])
                                                      for c in text]  # a character at a time
        written = Text(tokenizer, 99, stop)
        pieces = [written.add(token) for token in [*ids, tokenizer.eot]]
        assert "".join(pieces) == written.text == want and written.ended == "stop"


def test_other_ends(tokenizer):
    ids = tokenizer.encode(sentences(1)[0]).tolist()
    written = Text(tokenizer, 99, ends=ids[2:3])
    assert [bool(written.add(token))
            for token in ids[:4]] == [True, True, False, False] and written.ended == "stop"


def test_a_chat_model_ends_its_turn_and_no_control_token_is_written(tokenizer):
    ids = tokenizer.encode("the cat").tolist()
    written = Text(tokenizer, 99)
    for token in (*ids, tokenizer.reserved["<|user|>"], *ids, tokenizer.reserved["<|end|>"], *ids):
        written.add(token)
    assert (written.text, written.ended) == ("the catthe cat", "stop")
    assert tokenizer.decode([*ids, *tokenizer.reserved.values()]) == "the cat"
