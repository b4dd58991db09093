"""generate.py, launched on a tiny checkpoint: python -m pytest tests/test_generate.py"""

import resource

import pytest
from helpers import tiny_checkpoint

import generate
from lib.cli import BadInput
from lib.decoding import Decoder, SampleConfig, sample
from lib.decoding import generate as generate_ids


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """(path, model) of an untrained model with a context of 32 tokens."""
    path = tmp_path / "ckpt_00001.pt"
    model = tiny_checkpoint(path, tokenizer, mlp="swiglu", pos="rope", norm="rmsnorm", bias=False)
    return path, model


def test_it_prints_what_sample_returns(launch, checkpoint, tokenizer):
    path, model = checkpoint
    # the prompt and 40 tokens exceed the context
    settings = dict(samples=2, max_new_tokens=40, temperature=0.8, top_k=20, top_p=0.9, seed=7)
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", value]
    prompts = ["the cat", "a dog, and more of it"]
    result = launch("generate.py", "--checkpoint", path, "--prompt", *prompts, *flags,
                    "--device", "cpu")
    assert result.returncode == 0
    assert result.stderr.count("sees only") == result.stderr.count("\n") == 2
    texts = sample(model, tokenizer, prompts, SampleConfig(**settings))
    written = "".join(f"{text}\n---\n" for text in texts)
    # launch reads text, which translates carriage returns
    assert result.stdout == written.replace("\r\n", "\n").replace("\r", "\n")
    assert len(set(texts)) == 4
    assert [text.startswith("the cat") for text in texts] == [True, True, False, False]


def test_defaults_temperature_0_stop_and_an_empty_prompt(checkpoint, capsys):
    path, _ = checkpoint
    generate.main(["--checkpoint", str(path)])
    assert capsys.readouterr().out.count("Hello, I'm a language model,") == SampleConfig().samples
    flags = ["--checkpoint", str(path), "--prompt", "", "--temperature", "0"]
    generate.main([*flags, "--samples", "2"])
    first, second, end = capsys.readouterr().out.split("\n---\n")
    assert first == second
    assert end == ""
    generate.main([*flags, "--samples", "1"])  # a single text is streamed, without a separator
    assert capsys.readouterr().out == first + "\n"
    stop = first[3:5]
    generate.main([*flags, "--samples", "1", "--stop", "nowhere", stop])
    assert capsys.readouterr().out == first[:first.index(stop)] + "\n"


def test_a_prompt_longer_than_the_context(checkpoint, tmp_path, capsys):
    path, _ = checkpoint
    prompt = "the cat sat on the mat. " * 20
    (tmp_path / "long.txt").write_text(prompt + "\n")
    flags = ["--checkpoint", str(path), "--prompt_file", str(tmp_path / "long.txt"),
             "--samples", "1", "--max_new_tokens", "3"]
    generate.main(flags)
    out, err = capsys.readouterr()
    assert out.startswith(prompt)
    assert "the first new token sees only the newest 32; from new token 2 on" in err
    with pytest.raises(BadInput, match="tokens and the context 32: shorten it"):
        generate.main([*flags, "--strict"])
    generate.main([*flags, "--strict", "--context", "512", "--rope_scaling", "yarn"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("written", [
    b"the cat\n", b"the cat\r\n", b"\xef\xbb\xbfthe cat", b"the cat",
])
def test_a_prompt_file_is_the_text_that_an_editor_shows(written, tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(written)
    assert generate.read_prompts(generate.Config(prompt_file=str(path)), set()) == ("the cat",)


@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 40])
def test_the_note_on_the_context_is_what_the_model_sees(n, checkpoint, tokenizer, monkeypatch):
    visible = []  # tokens that the model saw before each new one
    fill = Decoder.fill
    step = Decoder.step

    def counted_fill(decoder, rows, prompts):
        visible.append(len(prompts[0]))
        return fill(decoder, rows, prompts)

    def counted_step(decoder, tokens):
        visible.append(decoder.lengths[0] + 1)
        return step(decoder, tokens)

    monkeypatch.setattr(Decoder, "fill", counted_fill)
    monkeypatch.setattr(Decoder, "step", counted_step)
    _, model = checkpoint
    prompt = "\x01" * n
    ids = tokenizer.encode(prompt).tolist()
    for new in (1, 2, 3, 28, 29, 60):
        visible.clear()
        list(generate_ids(Decoder(model, 1, n + new), [ids], new, lambda logits: logits.argmax(-1)))
        # where the context was full, one step too many was computed
        seen = [count for count in visible if count <= 32]
        assert len(seen) == new
        note = generate.check_length(prompt, n, 32, new) or ""
        too_long = n > 32
        assert ("the first new token sees only the newest 32" in note) == too_long
        cut = [i for i in range(int(too_long), new) if seen[i] < n + i]
        if not cut:
            assert "from new token" not in note
            continue
        assert cut == list(range(cut[0], new))
        fewest = min(seen[cut[0]:])
        assert f"from new token {cut[0] + 1} on, each sees only the newest {fewest} to 32" in note


def test_out_of_memory_is_one_line(checkpoint):
    path, _ = checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # less than the cache needs; a kernel may promise more memory than it has
    resource.setrlimit(resource.RLIMIT_AS, (2**39, hard))
    try:
        with pytest.raises(BadInput, match="out of memory: lower --samples"):
            generate.main(["--checkpoint", str(path), "--context", str(2**20), "--samples", "4096",
                           "--max_new_tokens", "1000000", "--device", "cpu"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("flags, says", [
    ([], "name either --checkpoint or --model"),
    (["--checkpoint", "ckpt_00001.pt", "--model", "gpt2"], "name either"),
    (["--checkpoint", "empty"], "has neither a ckpt_<step>.pt nor"),
    (["--checkpoint", "ckpt_00001.pt", "--temperature", "101"], "--temperature must be"),
    (["--checkpoint", "ckpt_00001.pt", "--prompt_file", "nowhere"], "cannot read nowhere"),
    (["--checkpoint", "x", "--prompt_file", "a", "--prompt", "b"], "leave out one of them"),
])
def test_bad_flags(flags, says, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput) as error:
        generate.main(flags)
    assert says in str(error.value)


def test_bad_input_of_a_real_process_is_one_line(launch):
    result = launch("generate.py", "--checkpoint", "nowhere.pt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("generate.py: error: ")
    assert "nowhere.pt" in result.stderr
    assert result.stderr.count("\n") == 1
