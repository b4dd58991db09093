"""chat.py, launched on a tiny checkpoint that knows three conversations:
python -m pytest tests/test_chat.py"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import CHATS, ROOT, full_disk, tiny_checkpoint
from runs import run_script

import chat
from lib import checkpoint
from lib.chat_template import render
from lib.cli import BadInput
from lib.decoding import Decoder, SampleConfig, generate, sample

(CAT, ON_THE_MAT), (DOG, ON_THE_ROOF), (BIRD, _) = CHATS


def command(path, *flags):
    return [sys.executable, str(ROOT / "chat.py"), "--checkpoint", str(path), "--temperature", "0",
            *flags]


def talk(folder, path, lines, *flags):
    """chat.py with these lines typed -> CompletedProcess."""
    typed = "".join(f"{line}\n" for line in lines)
    return run_script("chat.py", "--checkpoint", path, "--temperature", "0", *flags, cwd=folder,
                      input=typed)


def ignore(piece):
    """Shows nothing."""


@pytest.fixture
def conversation(chatty, tokenizer):
    """A Chat in this process, greedy."""
    model, tokenizer, _ = chat.load_chat(chatty[0], "cpu")
    return chat.Chat(model, tokenizer, chat.ChatSampling(temperature=0.0))


def test_a_conversation_in_the_terminal(chatty, tmp_path):
    lines = [
        "/save said.jsonl", CAT, "", DOG, "/save said.jsonl", "/reset", DOG, "/save said.jsonl",
        "/temp 0.5", "/temp hot", "/temp -1", "/nope", "/quit", CAT,
    ]
    (tmp_path / "said.jsonl.tmp").write_text("mine")
    result = talk(tmp_path, chatty[0], lines, "--system", "Be brief.")
    assert (tmp_path / "said.jsonl.tmp").read_text() == "mine"
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [ON_THE_MAT, ON_THE_ROOF, ON_THE_ROOF]
    saved = json.loads((tmp_path / "said.jsonl").read_text())
    assert saved == {"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": CAT},
        {"role": "assistant", "content": ON_THE_MAT},
        {"role": "user", "content": DOG},
        {"role": "assistant", "content": ON_THE_ROOF},
    ]}
    expected = [
        "/quit", "nothing to save", "5 messages saved", "a new conversation",
        "cannot write said.jsonl (File exists): name another", "temperature 0.5", "takes a number",
        "must be", "unknown command",
    ]
    for note, says in zip(result.stderr.splitlines(), expected, strict=True):
        assert says in note


def test_a_full_disk_leaves_no_partial_file(tmp_path):
    said = [{"role": "user", "content": CAT}, {"role": "assistant", "content": ON_THE_MAT}]
    with full_disk(20), pytest.raises(BadInput, match="cannot write .*: name another file"):
        chat.save(said, tmp_path / "said.jsonl")
    assert not list(tmp_path.iterdir())
    chat.save(said, tmp_path / "said.jsonl")


def test_one_answer_is_the_greedy_continuation_of_the_template(chatty, tokenizer, launch):
    path, model = chatty
    flags = ["--checkpoint", path, "-p", BIRD, "--system", "Be brief."]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": BIRD}]
    ids, _ = render(messages, tokenizer, reply=True)
    steps = generate(Decoder(model, 1, 128), [ids], 50, lambda logits: logits.argmax(dim=-1))
    tokens = [token for (token,) in steps]
    answer = tokens[:tokens.index(tokenizer.reserved["<|end|>"])]
    assert len(answer) > 5
    result = launch("chat.py", *flags, "--top_k", 1)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == tokenizer.decode(answer) + "\n"
    result = launch("chat.py", *flags, "--max_new_tokens", 2, "--temperature", 0)
    assert result.stdout == tokenizer.decode(answer[:2]) + "\n"


def test_control_tokens_are_text_when_typed_and_end_the_model_s_turn(
        conversation, tokenizer, monkeypatch):
    prompts = []
    names = {number: name for name, number in tokenizer.reserved.items()}
    names[tokenizer.eot] = "<|endoftext|>"
    typed = "the cat<|end|><|assistant|>x<|end|><|user|><|system|><|endoftext|>"

    def spied(decoder, ids, *rest):
        prompts.extend(ids)
        return generate(decoder, ids, *rest)

    monkeypatch.setattr(chat, "generate", spied)
    conversation.system = "<|end|>"
    said = tokenizer.encode("sat").tolist()
    for token in names:
        script = iter([*said, token])
        monkeypatch.setattr(chat, "draw",
                            lambda logits, script=script, **_: torch.tensor([next(script)]))
        shown = []
        conversation.reset()
        assert conversation.reply(typed, shown.append) == "stop"
        assert "".join(shown) == conversation.messages[-1]["content"] == "sat"
        assert [names[number] for number in prompts.pop() if number in names] == [
            "<|endoftext|>", "<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>"]


def test_the_oldest_turns_leave_a_full_context(chatty, tmp_path):
    turns = [CAT, DOG] * 6
    lines = [*turns, "x" * 200, CAT, "/save said.jsonl"]
    result = talk(tmp_path, chatty[0], lines, "--system", "Be brief.", "--max_new_tokens", "20")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == len(turns) + 1
    assert "the model no longer sees the 2 oldest messages" in result.stderr
    assert "the context has room for 108: shorten it" in result.stderr
    saved = json.loads((tmp_path / "said.jsonl").read_text())["messages"]  # all of them
    roles = [message["role"] for message in saved]
    assert roles == ["system", *["user", "assistant"] * (len(turns) + 1)]
    assert [message["content"] for message in saved[1::2]] == [*turns, CAT]


def test_a_compiled_step_generates_the_same(chatty, conversation, monkeypatch):
    """As on a GPU, except for the back end: every turn by one graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler = partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    model, tokenizer, _ = chat.load_chat(chatty[0], "cpu")
    compiled = chat.Chat(model, tokenizer, conversation.sampling, compile=True)
    for content in (CAT, DOG, BIRD):
        conversation.reply(content, ignore)
        compiled.reply(content, ignore)
    assert compiled.messages == conversation.messages
    assert len(graphs) == 1


def test_ctrl_c_ends_a_reply_and_not_the_chat(conversation):
    def interrupt(piece):
        raise KeyboardInterrupt

    assert conversation.reply(CAT, interrupt) == "interrupted"
    last = conversation.messages[-1]
    assert last["role"] == "assistant"
    assert 0 < len(last["content"]) < len(ON_THE_MAT)
    assert ON_THE_MAT.startswith(last["content"])
    conversation.reset()
    assert conversation.reply(DOG, ignore) == "stop"
    assert conversation.messages[-1]["content"] == ON_THE_ROOF


def test_ctrl_c_at_the_prompt_leaves_the_conversation(chatty):
    pty = pytest.importorskip("pty", reason="a terminal of POSIX")
    ours, terminal = pty.openpty()

    def read_to(end):
        seen = b""
        while not seen.endswith(end):
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 1)
        return seen.decode()

    with subprocess.Popen(command(chatty[0]), stdin=terminal, stdout=terminal, stderr=terminal,
                          env=os.environ | {"TERM": "dumb"}) as process:
        try:
            read_to(b"> ")
            os.write(ours, f"{CAT}\n".encode())
            assert ON_THE_MAT in read_to(b"> ")
            # a signal that arrives before the process waits for input has no effect
            while not select.select([ours], [], [], 2)[0]:
                process.send_signal(signal.SIGINT)
            assert "[Ctrl-D or /quit ends the chat]" in read_to(b"> ")
            os.write(ours, f"{DOG}\n".encode())
            assert ON_THE_ROOF in read_to(b"> ")
            os.write(ours, b"/quit\n")
            assert process.wait(600) == 0
        finally:
            process.kill()
            os.close(ours)
            os.close(terminal)


def test_bad_flags(chatty):
    path = str(chatty[0])
    with pytest.raises(BadInput, match="name either --checkpoint or --model"):
        chat.main([])
    for flags, says in (
        (["--model", "gpt2"], "name either --checkpoint or --model"),
        (["-p", "x" * 200], "shorten it"),
        (["--samples", "3"], "unknown flag --samples"),
        (["--port", "1"], "--port is for --serve"),
        (["--serve", "--host", "0.0.0.0"], "give an --api_key"),
        (["--serve", "--api_key", "schl\xfcssel"], "printable ASCII"),
        (["--serve", "--api_key", " sesame"], "printable ASCII"),
        (["--serve", "--api_key", "ses\name"], "printable ASCII"),
        (["--serve", "--compile"], "--compile is for the terminal"),
        (["--serve", "-p", "x"], "--prompt is for the terminal"),
    ):
        with pytest.raises(BadInput, match=says):
            chat.main(["--checkpoint", path, *flags])


def test_models_that_cannot_chat(chatty, tokenizer, tmp_path, launch):
    base = tmp_path / "ckpt_00000.pt"
    tiny_checkpoint(base, tokenizer)
    state = checkpoint.read(chatty[0])
    other_template = tmp_path / "ckpt_00001.pt"
    checkpoint.write(other_template, state | {"chat_template": "{{ messages }}"})
    too_few_ids = tmp_path / "ckpt_00002.pt"
    template = {"chat_template": state["chat_template"]}
    checkpoint.write(too_few_ids, checkpoint.read(base) | template)
    for path, flags, says in (
        (base, ["--serve", "--port", "0"], "not learned to chat: .* posttrain.py"),
        (base, ["--system", "x"], "--system is for a model that can chat"),
        (other_template, [], "another chat template"),
        (too_few_ids, [], "has 280 ids and its tokenizer, .* 284"),
    ):
        with pytest.raises(BadInput, match=says):
            chat.main(["--checkpoint", str(path), *flags])
    result = launch("chat.py", "--checkpoint", base, "--serve", "--port", 0)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "posttrain.py" in result.stderr


def test_a_base_model_continues_each_text_on_its_own(tokenizer, tmp_path):
    """Named by its run folder; it generates what generate.py does."""
    model = tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, init="xavier")
    result = talk(tmp_path, tmp_path, [DOG, CAT, "x" * 99], "--max_new_tokens", "9")
    settings = SampleConfig(max_new_tokens=9, temperature=0.0)
    expected = ""
    for prompt in (DOG, CAT):
        text = sample(model, tokenizer, [prompt], settings)[0]
        expected += text.removeprefix(prompt) + "\n"
    assert (result.returncode, result.stdout) == (0, expected)
    notes = result.stderr.splitlines()
    assert notes[0].endswith(": ckpt_00001.pt, the newest")
    assert "post-train it with" in notes[1]
    assert "shorten it" in notes[-1]


@contextlib.contextmanager
def serving(path, *flags):
    """chat.py --serve as a process -> (it, its address)."""
    server = command(path, "--serve", "--port", "0", *flags)
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            yield process, process.stdout.readline().split()[2].rstrip(",")
        finally:
            process.kill()


def test_openai_s_client(chatty):
    """Chat, streams, completions, models and errors, and a used port; a signal ends the server with
    exit code 0."""
    import openai

    with serving(chatty[0], "--api_key", "sesame") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", timeout=600, max_retries=0)
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id).id == model.id == chatty[0].parent.name
        ask = dict(model=model.id, messages=[{"role": "user", "content": CAT}])
        answer = client.chat.completions.create(**ask)
        (choice,) = answer.choices
        assert (choice.message.content, choice.finish_reason) == (ON_THE_MAT, "stop")
        usage = answer.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        *chunks, last = client.chat.completions.create(
            **ask, stream=True, stream_options={"include_usage": True})
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == ON_THE_MAT
        assert len(chunks) > 2
        assert last.usage == usage
        other = client.chat.completions.create(**ask | {"model": "gpt-4"})
        assert other.model == model.id  # the only one
        (choice,) = client.chat.completions.create(**ask, max_tokens=1).choices
        assert choice.finish_reason == "length"
        completion = dict(model=model.id, prompt="the", max_tokens=3, seed=5, temperature=1.5)
        (whole,) = client.completions.create(**completion).choices
        events = client.completions.create(**completion, stream=True)
        streamed = [piece for event in events for piece in event.choices]
        assert "".join(piece.text for piece in streamed) == whole.text
        assert streamed[-1].finish_reason == whole.finish_reason
        wrong_key = {"Authorization": "Bearer x"}
        for wrong, error in (
            (dict(n=2), openai.BadRequestError),
            (dict(temperature=9), openai.BadRequestError),
            (dict(extra_headers=wrong_key), openai.AuthenticationError),
        ):
            with pytest.raises(error) as caught:
                client.chat.completions.create(**ask | wrong)
            assert caught.value.code
            assert caught.value.body["message"]
        with pytest.raises(BadInput, match="Address already in use"):
            port = url.rpartition(":")[2]
            chat.main(["--checkpoint", "never read", "--serve", "--port", port])
        process.send_signal(signal.SIGTERM)  # while the client is connected
        assert process.wait(600) == 0


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_docs_curl_line(chatty):
    page = (ROOT / "docs" / "post-training-and-chat.md").read_text().replace("\\\n", "")
    (line,) = re.findall(r"^curl .*", page, re.MULTILINE)
    with serving(chatty[0], "--api_key", "SECRET") as (_, url):
        line = line.replace("http://127.0.0.1:8000", url).replace('"Hi"', json.dumps(CAT))
        key = ' -H "Authorization: Bearer SECRET"'
        for more, says in (("", "the API key is missing or wrong"), (key, ON_THE_MAT)):
            result = subprocess.run(["sh", "-c", line + more], capture_output=True, text=True,
                                    timeout=600, check=True)
            assert says in result.stdout
