"""Files of export_gguf.py in llama.cpp itself: the same ids, text and perplexity.

    make test-extra     # builds llama.cpp; prints the table of benchmarks/gguf_cpu_202611.md
"""

import random

import numpy as np
import pytest
import torch
from helpers import CHATS, save, sentences, tiny
from test_export_gguf import CASES

from lib import llamacpp
from lib.chat_template import JINJA, render
from lib.decoding import SampleConfig, sample
from lib.tokenizers import EOT, load_tokenizer, train_bpe
from train_gpt2 import GPT, load_checkpoint

llama_cpp = pytest.importorskip("llama_cpp", reason="make test-extra builds it")

F32 = 0      # types of the KV cache
F16 = 1
N_NEW = 100  # greedy tokens
PIECES = [
    " ", "  ", "\n", "\r", "\t", "\r\n", "'", "'s", "'LL", "'\u017f", "a", "bc", "Ab", "é", "е",
    "你", "1", "23", "٣", "²", ".", "!", "-", "👍", "👩\u200d👧",
    "\x00", "\x7f", "\x1c", "\u0085", "\u0300", "\u00a0", "\u2028", "\u3000", "\ufeff", "\ufffd",
    "\ue000", "\u0378", "ǅ", "ª", "𝐀", "_", "<|endoftext|>", "<|end|>", "<|user|>", "<|", "|>",
]


@pytest.fixture
def load():
    """load(path, cache=F32) -> a llama_cpp.Llama, closed after the test."""
    opened = []

    def load(path, cache=F32):
        model = llama_cpp.Llama(str(path), n_ctx=0, logits_all=True, type_k=cache, type_v=cache,
                                n_threads=1, n_threads_batch=1, verbose=False)
        opened.append(model)
        return model

    yield load
    for model in opened:
        model.close()


def their_logits(llama, ids):
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[:len(ids)]))


def perplexity(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).exp().item()


def show(capsys, *cells):
    with capsys.disabled():
        print("\n|", " | ".join(cells), "|", end="")


# --------------------------------------------------------------------------------------------------
# Ids


@pytest.fixture(params=["trained", "gpt2"])
def tokenizer_and_llama(request, load, tmp_path):
    tokenizer = load_tokenizer("gpt2")
    if request.param == "trained":
        source = "\n".join(random_texts(3000, seed=1))
        tokenizer = train_bpe([source, *sentences(200)], 600)
    model = GPT(tiny(vocab_size=tokenizer.vocab_size))
    llamacpp.write(model, tokenizer, tmp_path / "m.gguf", "f16", card="")
    return tokenizer, load(tmp_path / "m.gguf")


def random_texts(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        yield "".join(rng.choices(PIECES, k=rng.randint(1, 14)))


def same_ids(tokenizer, llama, text):
    theirs = llama.tokenize(text.encode(), add_bos=False, special=False)
    return theirs == tokenizer.encode(text).tolist()


def test_adversarial_texts_have_the_same_ids(tokenizer_and_llama, capsys):
    texts = ["", *PIECES, *random_texts(20_000), " " * 3000, "a" * 3000, "\n" * 3000]
    different = [text for text in texts if not same_ids(*tokenizer_and_llama, text)]
    show(capsys, tokenizer_and_llama[0].name, "adversarial", f"{len(texts):,}",
         f"{len(different):,}")
    assert different == []


def test_every_character_has_the_same_ids(tokenizer_and_llama, capsys):
    """Between letters, digits, punctuation and spaces, alone and repeated."""
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    different = []
    for c in map(chr, points):
        if not same_ids(*tokenizer_and_llama, f"a{c}b 1{c}2 .{c}! {c} {c}{c}\n{c}"):
            different.append(c)
    show(capsys, tokenizer_and_llama[0].name, "every character", f"{len(points):,}",
         f"{len(different):,}")
    assert different == []


# --------------------------------------------------------------------------------------------------
# Models


def trained(tokenizer, **changes):
    """A tiny model that has learned some of `sentences`."""
    torch.manual_seed(3)
    shape = dict(vocab_size=tokenizer.vocab_size, vocab_multiple=128, block_size=160, n_embd=64)
    model = GPT(tiny(**shape | changes))
    for name, buffer in model.named_buffers():
        if name.endswith("mlp.bias") and model.config.balance == "bias":
            buffer.normal_(std=0.1)
    idx = torch.tensor([text_ids(tokenizer, seed)[:161] for seed in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous()) / idx[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def text_ids(tokenizer, seed):
    ids = []
    for text in sentences(40, seed):
        ids += [tokenizer.eot, *tokenizer.encode(text).tolist()]
    return ids


@torch.no_grad()
def greedy(model, ids):
    ids = list(ids)
    for _ in range(N_NEW):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids


def their_greedy(llama, ids):
    """One token at a time, from the KV cache."""
    logits = their_logits(llama, ids)
    ids = list(ids)
    for _ in range(N_NEW):
        ids.append(logits[-1].argmax().item())
        llama.eval(ids[-1:])
        logits = torch.from_numpy(np.array(llama.scores[len(ids) - 1:len(ids)]))
    return ids


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_text_and_perplexity_are_equal(case, tokenizer, load, tmp_path, capsys):
    architecture, changes = CASES[case]
    with torch.enable_grad():
        model = trained(tokenizer, **changes)
    held_out = text_ids(tokenizer, 99)[:160]
    logits = model(torch.tensor([held_out]))[0]
    ours = perplexity(logits, held_out)
    differences = []
    for dtype, cache in (("f32", F32), ("f16", F16), ("q8_0", F16)):
        path = tmp_path / f"{dtype}.gguf"
        llamacpp.write(model, tokenizer, path, dtype, card="")
        llama = load(path, cache)
        assert llama.metadata["general.architecture"] == architecture
        their = their_logits(llama, held_out)
        differences.append(perplexity(their, held_out) - ours)
        if dtype == "f32":
            largest = (their - logits).abs().max().item()
            same = greedy(model, held_out[:20]) == their_greedy(llama, held_out[:20])
    show(capsys, case, architecture, f"{ours:.4f}", *(f"{d:+.5f}" for d in differences),
         f"{largest:.1e}", "yes" if same else "no")
    assert same
    assert abs(differences[0]) < 1e-3
    assert abs(differences[1]) < 1e-2
    assert abs(differences[2]) < 3e-2


def test_generated_text_is_equal(tokenizer, load, tmp_path):
    """By llama-cpp-python's own sampling and decoding of text."""
    model = trained(tokenizer, **CASES["llama"][1])
    llamacpp.write(model, tokenizer, tmp_path / "m.gguf", "f32", card="")
    llama = load(tmp_path / "m.gguf")
    settings = SampleConfig(max_new_tokens=N_NEW, temperature=0, samples=1)
    for prompt in ("the cat", "the dog slept on", "bird"):
        [answer] = llama(prompt, max_tokens=N_NEW, temperature=0)["choices"]
        assert prompt + answer["text"] == sample(model, tokenizer, [prompt], settings)[0]


# --------------------------------------------------------------------------------------------------
# Chat


def test_a_chat_model_answers(chatty, load, tmp_path):
    """By the template in the file; control tokens count, and <|end|> ends the answer."""
    model, tokenizer, state = load_checkpoint(str(chatty[0]))
    llamacpp.write(model, tokenizer, tmp_path / "m.gguf", "f16", "", state["chat_template"])
    llama = load(tmp_path / "m.gguf")
    for user, assistant in CHATS:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]
        formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            llama.metadata["tokenizer.chat_template"], eos_token="<|end|>", bos_token=EOT)
        prompt = formatter(messages=messages).prompt
        ids, _ = render(messages, tokenizer, reply=True)
        assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == ids
        [answer] = llama.create_chat_completion(messages, temperature=0)["choices"]
        assert answer["message"]["content"] == assistant
        assert answer["finish_reason"] == "stop"


def test_a_gpt2_tokenizer_in_a_chat_model(load, tmp_path):
    tokenizer = load_tokenizer("gpt2")
    model = GPT(tiny(vocab_size=tokenizer.vocab_size + 4, block_size=64))
    save(tmp_path / "ckpt_00001.pt", model, tokenizer, chat_template=JINJA)
    llamacpp.write(model, tokenizer, tmp_path / "m.gguf", "f16", "", JINJA)
    llama = load(tmp_path / "m.gguf")
    assert llama.n_vocab() == tokenizer.vocab_size + 4
    ends = [i for i in range(llama.n_vocab())
            if llama_cpp.llama_vocab_is_eog(llama._model.vocab, i)]
    assert ends == sorted([tokenizer.eot, tokenizer.reserved["<|end|>"]])
