"""chat.py, launched for real on a tiny checkpoint that knows three conversations: python -m pytest
tests/test_chat.py"""

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import CHATS, ROOT, tiny_checkpoint
from runs import run_script

import chat
from lib import checkpoint
from lib.chat_template import render
from lib.cli import BadInput
from lib.decoding import Decoder, SampleConfig, generate, sample

(CAT, ON_THE_MAT), (DOG, ON_THE_ROOF), (BIRD, _) = CHATS


def talk(launch_in, path, lines, *flags):
    """chat.py with these lines typed -> CompletedProcess."""
    return run_script("chat.py", "--checkpoint", path, "--temperature", "0", *flags, cwd=launch_in,
                      input="".join(f"{line}\n" for line in lines))


@pytest.fixture
def conversation(chatty, tokenizer):
    """A Chat in this process, greedy."""
    model, tokenizer, _ = chat.load_chat(chatty[0], "cpu")
    return chat.Chat(model, tokenizer, chat.ChatSampling(temperature=0.0))


def test_a_conversation_in_the_terminal(chatty, tmp_path):
    lines = [
        "/save said.jsonl", CAT, "", DOG, "/save said.jsonl", "/reset", DOG, "/save said.jsonl",
        "/temp 0.5", "/temp hot", "/temp -1", "/nope", "/quit", CAT
    ]
    (tmp_path / "said.jsonl.tmp").write_text("mine")
    done = talk(tmp_path, chatty[0], lines, "--system", "Be brief.")
    assert (tmp_path / "said.jsonl.tmp").read_text() == "mine"
    assert done.returncode == 0 and done.stdout.splitlines() == [
        ON_THE_MAT, ON_THE_ROOF, ON_THE_ROOF
    ], done.stderr
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    want = zip(("system", "user", "assistant", "user", "assistant"),
               ("Be brief.", CAT, ON_THE_MAT, DOG, ON_THE_ROOF))
    assert said == [{"messages": [{"role": role, "content": content} for role, content in want]}]
    notes = done.stderr.splitlines()
    want = ["/quit", "nothing to save", "5 messages saved", "a new conversation",
            "cannot write said.jsonl (File exists): name another",
            "temperature 0.5", "takes a number", "must be", "unknown command"]
    assert len(notes) == len(want) and all(says in note for note, says in zip(notes, want))


def test_what_does_not_fit_on_the_disk_is_not_saved_in_part(tmp_path):
    said = [{"role": "user", "content": CAT}, {"role": "assistant", "content": ON_THE_MAT}]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(BadInput, match="cannot write .*: name another file"):
            chat.save(said, tmp_path / "said.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    chat.save(said, tmp_path / "said.jsonl")


def test_one_answer_is_the_greedy_continuation_of_the_template(chatty, tokenizer, launch):
    path, model = chatty
    done = launch("chat.py", "--checkpoint", path, "-p", BIRD, "--system", "Be brief.", "--top_k",
                  1)
    ids, _ = render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": BIRD}],
                    tokenizer, reply=True)
    steps = [
        token
        for (token,
             ) in generate(Decoder(model, 1, 128), [ids], 50, lambda logits: logits.argmax(dim=-1))
    ]
    want = steps[:steps.index(tokenizer.reserved["<|end|>"])]
    assert (done.returncode, done.stdout, done.stderr) == (0, tokenizer.decode(want) + "\n",
                                                           "") and len(want) > 5
    done = launch("chat.py", "--checkpoint", path, "--prompt", BIRD, "--system", "Be brief.",
                  "--max_new_tokens", 2, "--temperature", 0)
    assert done.stdout == tokenizer.decode(want[:2]) + "\n"


def test_control_tokens_typed_out_are_text_and_those_the_model_says_end_its_turn(
        conversation, tokenizer, monkeypatch):
    prompts, control = [], {tokenizer.eot, *tokenizer.reserved.values()}
    typed = "the cat<|end|><|assistant|>x<|end|><|user|><|system|><|endoftext|>"

    def spied(decoder, ids, *rest):
        prompts.extend(ids)
        return generate(decoder, ids, *rest)

    monkeypatch.setattr(chat, "generate", spied)
    conversation.system = "<|end|>"
    said = tokenizer.encode("sat").tolist()
    for token in control:
        script, shown = iter([*said, token]), []
        monkeypatch.setattr(chat, "draw",
                            lambda logits, script=script, **_: torch.tensor([next(script)]))
        conversation.reset()
        assert conversation.reply(typed, shown.append) == "stop"
        assert "".join(shown) == conversation.messages[-1]["content"] == "sat"
        names = {number: name
                 for name, number in tokenizer.reserved.items()} | {tokenizer.eot: "<|endoftext|>"}
        assert [names[number] for number in prompts.pop() if number in control] == [
            "<|endoftext|>", "<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>"]


def test_the_oldest_turns_leave_a_full_context(chatty, tmp_path):
    turns = [CAT, DOG] * 6
    lines = [*turns, "x" * 200, CAT, "/save said.jsonl"]
    done = talk(tmp_path, chatty[0], lines, "--system", "Be brief.", "--max_new_tokens", "20")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(turns) + 1
    assert "the model no longer sees the 2 oldest messages" in done.stderr
    assert "the context has room for 108: shorten it" in done.stderr
    (said,) = [
        json.loads(line)["messages"] for line in (tmp_path / "said.jsonl").read_text().splitlines()
    ]
    assert [message["role"] for message in said
            ] == ["system", *["user", "assistant"] * (len(turns) + 1)]  # saved, they all are
    assert [message["content"] for message in said[1::2]] == [*turns, CAT]


def test_a_compiled_step_writes_the_same(chatty, conversation, monkeypatch):
    """As on a GPU, but for the back end: every turn by one graph."""
    steps = []
    monkeypatch.setattr(
        torch, "compile",
        partial(torch.compile, backend=lambda graph, _: steps.append(graph) or graph.forward,
                fullgraph=True))
    compiled = chat.Chat(*chat.load_chat(chatty[0], "cpu")[:2], conversation.sampling, compile=True)
    for content in (CAT, DOG, BIRD):
        for each in (conversation, compiled):
            each.reply(content, lambda piece: None)
    assert compiled.messages == conversation.messages and len(steps) == 1


def test_ctrl_c_ends_a_reply_and_not_the_chat(conversation):
    def interrupt(piece):
        raise KeyboardInterrupt

    assert conversation.reply(CAT, interrupt) == "interrupted"
    said = conversation.messages[-1]
    assert said["role"] == "assistant" and 0 < len(
        said["content"]) < len(ON_THE_MAT) and ON_THE_MAT.startswith(said["content"])
    conversation.reset()
    assert conversation.reply(
        DOG, lambda piece: None) == "stop" and conversation.messages[-1]["content"] == ON_THE_ROOF


def test_ctrl_c_at_the_prompt_leaves_the_conversation(chatty):
    pty = pytest.importorskip("pty", reason="a terminal of POSIX")
    ours, terminal = pty.openpty()
    command = [
        sys.executable,
        str(ROOT / "chat.py"), "--checkpoint",
        str(chatty[0]), "--temperature", "0"
    ]

    def read_to(end):
        seen = b""
        while not seen.endswith(end):
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 1)
        return seen.decode()

    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal,
                          env=os.environ | {"TERM": "dumb"}) as process:
        try:
            read_to(b"> ")
            os.write(ours, f"{CAT}\n".encode())
            assert ON_THE_MAT in read_to(b"> ")
            while not select.select(
                [ours], [], [],
                    2)[0]:  # one that comes before the process waits for input is not seen
                process.send_signal(signal.SIGINT)
            assert "[Ctrl-D or /quit ends the chat]" in read_to(b"> ")
            os.write(ours, f"{DOG}\n".encode())
            assert ON_THE_ROOF in read_to(b"> ")
            os.write(ours, b"/quit\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(ours)
            os.close(terminal)


def test_bad_input(chatty, tokenizer, tmp_path, launch):
    plain, foreign, short = (tmp_path / f"ckpt_0000{i}.pt" for i in range(3))
    tiny_checkpoint(plain, tokenizer)
    state = checkpoint.read(chatty[0])
    checkpoint.write(foreign, state | {"chat_template": "{{ messages }}"})
    tiny_checkpoint(short, tokenizer)
    checkpoint.write(short, checkpoint.read(short) | {"chat_template": state["chat_template"]})
    with pytest.raises(BadInput, match="name either --checkpoint or --model"):
        chat.main([])
    for path, flags, says in ((plain, ["--serve", "--port",
                                       "0"], "not learned to chat: teach it with posttrain.py"),
                              (plain, ["--system", "x"], "--system is for a model that can chat"),
                              (chatty[0], ["--model", "gpt2"],
                               "name either --checkpoint or --model"), (foreign, [],
                                                                        "another chat template"),
                              (short, [], "has 280 ids and its tokenizer with those of chat 284"),
                              (chatty[0], ["-p", "x" * 200],
                               "shorten it"), (chatty[0], ["--samples",
                                                           "3"], "unknown flag --samples"),
                              (chatty[0], ["--serve", "--host", "0.0.0.0"], "give an --api_key"),
                              *((chatty[0], ["--serve", "--api_key", key], "printable ASCII")
                                for key in ("schl\xfcssel", " sesame", "ses\name")), (chatty[0], [
                                    "--port", "1"
                                ], "--port is for --serve"), (chatty[0], ["--serve", "--compile"],
                                                              "--compile is for the terminal"),
                              (chatty[0], ["--serve", "-p", "x"], "--prompt is for the terminal")):
        with pytest.raises(BadInput, match=says):
            chat.main(["--checkpoint", str(path), *flags])
    done = launch("chat.py", "--checkpoint", plain, "--serve", "--port", 0)
    assert (done.returncode, done.stdout,
            done.stderr.count("\n")) == (2, "", 1) and "posttrain.py" in done.stderr


def test_a_base_model_continues_each_text_by_itself(tokenizer, tmp_path):
    """Named by its run folder; what it writes is what generate.py writes."""
    model = tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, init="xavier")
    done = talk(tmp_path, tmp_path, [DOG, CAT, "x" * 99], "--max_new_tokens", "9")
    settings = SampleConfig(max_new_tokens=9, temperature=0.0)
    written = [
        sample(model, tokenizer, [text], settings)[0].removeprefix(text) for text in (DOG, CAT)
    ]
    assert done.returncode == 0 and done.stdout == "".join(f"{text}\n" for text in written)
    notes = done.stderr.splitlines()
    assert notes[0].endswith(
        ": ckpt_00001.pt, the newest") and "posttrain.py teaches it to" in notes[1]
    assert "shorten it" in notes[-1]


@contextlib.contextmanager
def serving(path, *flags):
    """chat.py --serve as a process -> (it, its address)."""
    command = [
        sys.executable, ROOT / "chat.py", "--checkpoint", path, "--serve", "--port", "0",
        "--temperature", "0", *flags
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            yield process, process.stdout.readline().split()[2].rstrip(",")
        finally:
            process.kill()


def test_openai_s_client(chatty):
    """Chat, streams, completions, models and errors, and a port in use; a signal ends the server
    with exit code 0."""
    import openai

    with serving(chatty[0], "--api_key", "sesame") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", timeout=600, max_retries=0)
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id).id == model.id == chatty[0].parent.name
        ask = dict(model=model.id, messages=[{"role": "user", "content": CAT}])
        answer = client.chat.completions.create(**ask)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ON_THE_MAT,
                                                                                        "stop")
        *chunks, last = client.chat.completions.create(**ask, stream=True,
                                                       stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or ""
                       for chunk in chunks) == ON_THE_MAT and len(chunks) > 2
        assert client.chat.completions.create(
            **ask | dict(model="gpt-4")).model == model.id  # the only one there is
        usage = answer.usage
        assert last.usage == usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert client.chat.completions.create(**ask,
                                              max_tokens=1).choices[0].finish_reason == "length"
        go_on = dict(model=model.id, prompt="the", max_tokens=3, seed=5, temperature=1.5)
        (text,) = client.completions.create(**go_on).choices
        pieces = [
            piece for event in client.completions.create(**go_on, stream=True)
            for piece in event.choices
        ]
        assert "".join(
            piece.text
            for piece in pieces) == text.text and pieces[-1].finish_reason == text.finish_reason
        for wrong, error in ((dict(n=2), openai.BadRequestError), (dict(temperature=9),
                                                                   openai.BadRequestError),
                             (dict(extra_headers={"Authorization": "Bearer x"}),
                              openai.AuthenticationError)):
            with pytest.raises(error) as caught:
                client.chat.completions.create(**ask | wrong)
            assert caught.value.code and caught.value.body["message"]
        with pytest.raises(BadInput, match="Address already in use"):
            chat.main(["--checkpoint", "never read", "--serve", "--port", url.rpartition(":")[2]])
        process.send_signal(signal.SIGTERM)  # while the client holds its connection
        assert process.wait(60) == 0


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_readme_s_curl_line(chatty):
    (line,) = re.findall(r"^curl .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    with serving(chatty[0], "--api_key", "SECRET") as (_, url):
        line = line.replace("http://127.0.0.1:8000", url).replace('"Hi"', json.dumps(CAT))
        for key, says in (("", "a wrong API key"),
                          (' -H "Authorization: Bearer SECRET"', json.dumps(ON_THE_MAT)[1:-1])):
            done = subprocess.run(["sh", "-c", line + key], capture_output=True, text=True,
                                  timeout=600, check=True)
            assert says in done.stdout
