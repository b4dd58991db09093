"""Text of every format -> shards, against a plain reference. Run: python -m pytest
tests/test_fineweb.py"""

import gzip
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from helpers import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from texts import (
    DOCUMENTS,
    EOT_ID,
    IDS,
    TOTAL,
    all_ids,
    check_meta,
    contents,
    cut,
    jsonl,
    make,
    make_documents,
    no_waiting,
    read_shards,
    reference,
    write_mixed,
    write_source,
    zstd,
)

import fineweb
from lib import cli, files
from lib.tokenizers import EOT


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """DOCUMENTS as a jsonl file, to be read only."""
    return write_source(tmp_path_factory.mktemp("source"), "jsonl")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Files of every format -> (list for --source, the documents). To be read only."""
    return write_mixed(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with no_waiting():
        yield


# --------------------------------------------------------------------------------------------------
# The same ids as the plain reference


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "json", "txt"])
def test_every_format_gives_the_reference_ids(form, workers, tmp_path, capsys):
    source = write_source(tmp_path / "in", form)
    make(source, tmp_path / "out", "--shard_size", 1000, "--workers", workers)
    expected = cut(IDS, 1000)
    assert read_shards(tmp_path / "out") == expected
    check_meta(tmp_path / "out", DOCUMENTS)
    in_val = expected[0][1].count(EOT_ID)
    assert f"val 1,000 tokens of {in_val} documents" in capsys.readouterr().out


def test_files_are_read_in_the_order_given_and_folders_and_globs_by_name(tmp_path, monkeypatch):
    parts = [make_documents(7, seed) for seed in range(4)]
    # characters that mean something to glob and fsspec, in real names
    folder = tmp_path / "in[1] * a::b"
    deep = folder / "deep"
    deep.mkdir(parents=True)
    b = write_source(deep, "parquet", parts[1]).rename(deep / "b[0].parquet")
    write_source(deep, "jsonl.gz", parts[0]).rename(deep / "a.jsonl.gz")
    (folder / "notes.md").write_text("no source")
    c = write_source(tmp_path / "c", "jsonl", parts[2])
    d = tmp_path / "d::e.txt"
    d.write_bytes(parts[3][0].encode())
    monkeypatch.chdir(tmp_path)
    make([d.name, folder, "c/*.js*l", "--source", b, str(c)], tmp_path / "out", "--shard_size", 200)
    order = [parts[3][0], *parts[0], *parts[1], *parts[2], *parts[1], *parts[2]]
    assert read_shards(tmp_path / "out") == cut(reference(order), 200)


def test_hidden_files_are_left_out_and_other_files_of_a_folder_are_listed(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    far = write_source(tmp_path / "far", "jsonl", DOCUMENTS[10:20]).parent
    write_source(folder, "jsonl", DOCUMENTS[:10]).rename(folder / "a.JSONL")
    (folder / "linked").symlink_to(far)
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.jsonl", "_a.jsonl"):
        (folder / name).write_bytes(jsonl([{"text": "hidden"}]))
    for name in ("._a.jsonl", "b.jsonl.bz2", "data.arrow"):
        (folder / name).write_bytes(b"\xff\xfe")

    make("in", "out", "--val_tokens", 0)
    assert all_ids(Path("out")) == reference(DOCUMENTS[:20])
    patterns = ["in/*.[jJ]*[lL]", "in/linked/*", "in/_*"]
    make(patterns, "by_pattern", "--val_tokens", 0)
    assert all_ids(Path("by_pattern")) == reference([*DOCUMENTS[:20], "hidden"])
    assert capsys.readouterr().out.count("left out of ") == 4

    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"features": {}}}, indent=1))
    with pytest.raises(cli.BadInput, match="in/dataset_infos.json has no column text"):
        make("in", "none")
    assert not Path("none").exists()
    assert capsys.readouterr().out == ""


def test_a_column_by_name_and_a_folder_named_after_the_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path, "parquet", column="content").rename("books.v2.parquet")
    flags = ["--text_column", "content", "--shard_size", "900"]
    fineweb.main(["--source", "books.v2.parquet", *flags])
    assert read_shards(tmp_path / "books") == cut(IDS, 900)
    assert (tmp_path / "books" / "books_val_000000.npy").exists()
    write_source(tmp_path / "texts", "jsonl")  # not into the folder that is read
    fineweb.main(["--source", "texts", "--shard_size", "900"])
    assert read_shards(tmp_path / "texts_shards") == cut(IDS, 900)


# --------------------------------------------------------------------------------------------------
# Rows that are left out


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_rows_without_text_are_counted_and_skipped(form, tmp_path, capsys):
    blank = [None, "", "  \n\t "]
    if form != "parquet":
        blank += [3, 4.5, True, ["a list"], {"a": "dict"}]
    rows = ["first", *blank, "second", *blank, "third"]
    source = write_source(tmp_path / "in", form, rows)
    skipped = 2 * len(blank)
    if form == "jsonl":  # rows that lack the column
        source.write_bytes(source.read_bytes() + b'{"id": 1}\nnull\n[1]\n')
        skipped += 3
    make(source, tmp_path / "out", "--shard_size", 4)
    documents = ["first", "second", "third"]
    assert read_shards(tmp_path / "out") == cut(reference(documents), 4)
    check_meta(tmp_path / "out", documents, skipped)
    assert f"{skipped} rows skipped (without text)" in capsys.readouterr().out


def test_numbers_and_bytes_are_not_text(tmp_path):
    documents = ["x y " * 30] * 300  # then a number, late in the file
    source = write_source(tmp_path / "in", "jsonl", [*documents, 5, "end"])
    make(source, tmp_path / "out", "--shard_size", 10**6)
    check_meta(tmp_path / "out", [*documents, "end"], skipped=1)
    for values in ([1, 2], [b"a", b"b"], [["a"], ["b"]]):
        pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
        with pytest.raises(cli.BadInput, match="no documents.*2 rows were without text"):
            make(tmp_path / "a.parquet", tmp_path / "none")


def test_blank_txt_files_and_null_rows_of_large_strings_are_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("\n \n")
    (tmp_path / "c.txt").write_text("text\n\n")
    column = pa.array(["one", None], pa.large_string())
    pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    sources = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt", "d.parquet")]
    make(sources, tmp_path / "out", "--shard_size", 3)
    documents = ["text\n\n", "one"]
    assert read_shards(tmp_path / "out") == cut(reference(documents), 3)
    check_meta(tmp_path / "out", documents, skipped=3)


def test_other_columns_may_contain_anything(tmp_path, capsys):
    """Through `datasets`, a column that changes type, appears late or has an unknown type made a
    file fail."""
    padding = "x" * 4000  # 12 MB of JSON: the library infers types from 10 MB at a time
    texts = (DOCUMENTS * 30)[:3000]
    rows = [{"text": text, "score": None, "padding": padding} for text in texts]
    rows[10] |= {"score": [1], "late": {"a": 1}}
    rows[2900] |= {"score": "high", "late": "x", "text": None}
    rows[2950] |= {"score": {"value": 0.5}}
    del rows[2999]["text"]
    lines = jsonl(rows) + b'{"text": "digits", "id": ' + b"9" * 5000 + b"}\n"
    (tmp_path / "a.jsonl").write_bytes(lines)
    features = {"text": {"dtype": "string", "_type": "Value"}, "tags": {"_type": "Hologram"}}
    schema = pa.schema({"tags": pa.map_(pa.string(), pa.int64()), "text": pa.string()},
                       metadata={"huggingface": json.dumps({"info": {"features": features}})})
    columns = {"tags": [[("a", 1)], None, []], "text": ["map one", "map two", None]}
    pq.write_table(pa.table(columns, schema), tmp_path / "b.parquet")
    make([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tmp_path / "out")
    documents = [row["text"] for row in rows if row.get("text")]
    assert all_ids(tmp_path / "out") == reference([*documents, "digits", "map one", "map two"])
    assert "3 rows skipped (without text)" in capsys.readouterr().out


def test_exact_duplicates_are_dropped_and_counted(tmp_path, capsys):
    distinct = list(dict.fromkeys(DOCUMENTS))
    changed = distinct[0] + " "
    rows = [*distinct[:60], *distinct[40:], distinct[0], changed, *distinct]
    source = write_source(tmp_path / "in", "jsonl", rows)
    flags = ["--shard_size", 2000, "--dedup"]
    out = tmp_path / "out"
    make(source, out, *flags)
    expected = cut(reference([*distinct, changed]), 2000)
    assert read_shards(out) == expected
    assert f"{len(rows) - len(distinct) - 1:,} duplicates left out" in capsys.readouterr().out
    (out / "out_train_000003.npy").unlink()  # written again from its own position
    make(source, out, *flags)
    assert read_shards(out) == expected
    with pytest.raises(cli.BadInput, match="made with --dedup, not with no --dedup"):
        make(source, out, "--shard_size", 2000)


def test_a_source_of_two_documents_is_warned_about(tmp_path, capsys):
    make(write_source(tmp_path, "jsonl", ["one", "two"]), tmp_path / "out")
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and "warning: the source has fewer than 3 documents" in stderr


# --------------------------------------------------------------------------------------------------
# Processes


def start(tmp_path, *flags):
    return subprocess.Popen([sys.executable, ROOT / "fineweb.py", *map(str, flags)], cwd=tmp_path,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_shards(process, out, count):
    while len(list(out.glob("*.npy"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_killed_processes_continue_to_identical_shards(mixed, tmp_path, monkeypatch, capsys):
    sources, documents = mixed
    out = tmp_path / "out"
    flags = ["--shard_size", 1000, "--workers", 2]
    kept = {}
    for count in (1, 15):
        process = start(tmp_path, "--source", *sources, "--out", "out", *flags)
        wait_for_shards(process, out, count)
        process.kill()  # SIGKILL: no handler can tidy up
        process.communicate()
        now = {path: path.read_bytes() for path in out.glob("*.npy")}
        assert kept.items() <= now.items()
        assert all(len(np.load(path)) == 1000 for path in now)  # whole, whatever the moment
        kept = now
    monkeypatch.chdir(tmp_path)
    make(sources, "out", *flags)
    printed = capsys.readouterr()
    assert "continuing after" in printed.out and printed.err == ""
    assert read_shards(out) == cut(reference(documents), 1000)
    assert all(path.read_bytes() == data for path, data in kept.items())
    check_meta(out, documents)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    make(sources, "out", *flags)  # a finished run does nothing
    assert "out/ is complete: val 1,000 tokens" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_ctrl_c_says_how_to_continue(tmp_path):
    source = write_source(tmp_path / "in", "parquet", make_documents(3000))
    process = start(tmp_path, "--source", source, "--out", "out", "--shard_size", 200)
    wait_for_shards(process, tmp_path / "out", 3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr == ("\nstopped: the shards in out/ are complete; the same command continues "
                      "after them\n")
    # a temporary file may be left
    assert all(len(np.load(path)) == 200 for path in (tmp_path / "out").glob("*.npy"))


def test_a_run_that_leaves_most_of_a_parquet_unread_exits_cleanly(tmp_path, launch):
    """pyarrow aborted at exit, six times in ten."""
    source = write_source(tmp_path / "in", "parquet", make_documents(3000))
    done = launch("fineweb.py", "--source", source, "--out", "out", "--shard_size", 2000,
                  "--max_tokens", 9000, "--workers", 2)
    assert (done.returncode, done.stderr) == (0, "")


CHILDREN = """
import multiprocessing, sys
sys.path.insert(0, {root!r})
import fineweb
if __name__ == "__main__":
    children = []
    for method in ("fork", "spawn"):
        flags = ["--source", {source!r}, "--out", method, "--shard_size", "700"]
        context = multiprocessing.get_context(method)
        children.append(context.Process(target=fineweb.main, args=(flags,)))
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
"""


def test_spawned_and_forked_children_do_the_same(tmp_path):
    source = write_source(tmp_path / "in", "parquet")
    script = CHILDREN.format(root=str(ROOT), source=str(source))
    (tmp_path / "children.py").write_text(script)
    done = subprocess.run([sys.executable, "children.py"], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    for method in ("fork", "spawn"):
        assert read_shards(tmp_path / method) == cut(IDS, 700)


needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")


@needs_dev_full
@pytest.mark.parametrize("to, says", [
    ("> /dev/full",
     "fineweb.py: error: cannot continue (No space left on device): free some disk space\n"),
    ("| true", "")], ids=["full", "closed"])
def test_an_output_that_cannot_be_written_is_not_called_the_folders_disk(
        to, says, source, tmp_path):
    words = [sys.executable, ROOT / "fineweb.py", "--source", source, "--out", "out"]
    command = f"{shlex.join(map(str, words))} {to}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False)
    assert done.stderr == says


WATCH = """
import os, sys

def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.connect"):
        os.write(2, b"asked the network\\n")
        os._exit(9)

sys.addaudithook(watch)
"""


def test_local_files_need_no_network_and_no_home(tmp_path, launch):
    """Through `datasets`, each file and pass asked the hub, 10 s each where packets are dropped,
    and wrote to HOME."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH)
    write_source(tmp_path / "in", "parquet")
    write_source(tmp_path / "in", "jsonl.zst")
    env = {"HF_HUB_OFFLINE": "0", "HOME": "/proc/none", "PYTHONPATH": str(tmp_path / "site")}
    done = launch("fineweb.py", "--source", "in", "--out", "out", "--tokenizer", "bpe:300", env=env)
    assert (done.returncode, done.stderr) == (0, "") and "out/ is complete" in done.stdout


def test_the_script_itself_without_a_network(launch):
    done = launch("fineweb.py", "--source", "some/dataset",
                  env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot reach the dataset some/dataset" in done.stderr


# --------------------------------------------------------------------------------------------------
# Flags


PRESETS = [
    (["--preset", "fineweb-edu-100BT"], fineweb.FINEWEB_EDU, "sample-100BT", "edu_fineweb100B"),
    (["--preset", "fineweb-edu"], fineweb.FINEWEB_EDU, "default", "edu_fineweb"),
    (["--preset", "wikipedia", "--name", "20231101.de"], "wikimedia/wikipedia", "20231101.de",
     "wikipedia_20231101.de"),
    (["--preset", "books", "--out", "x"], "sedthh/gutenberg_english", None, "x"),
    ([], fineweb.FINEWEB_EDU, "sample-10BT", "edu_fineweb10B"),
]


@pytest.mark.parametrize("flags, dataset, name, out", PRESETS)
def test_presets_name_datasets_of_the_hub(flags, dataset, name, out):
    job = fineweb.read_flags(flags)
    assert (job.cfg.source, job.cfg.name, str(job.out)) == ((dataset,), name, out)
    assert job.cfg.text_column == ("TEXT" if "books" in flags else "text")


@pytest.mark.parametrize("flags, says", [
    (["--preset", "wikipedia"], "wikimedia/wikipedia, 20231101.en: tokens unknown; about 11.63 "
     "GB on the hub; licence CC BY-SA 3.0, GFDL"),
    (["--preset", "wikipedia", "--name", "20231101.de"], "wikimedia/wikipedia, 20231101.de: tokens "
     "unknown; size on the hub unknown; licence CC BY-SA 3.0, GFDL"),
    (["--name", "CC-MAIN-2024-10"], "HuggingFaceFW/fineweb-edu, CC-MAIN-2024-10: tokens unknown; "
     "size on the hub unknown; licence ODC-By 1.0"),
    (["--docstrings"], "None"), (["--source", "a/b"], "None")])
def test_what_is_known_about_a_corpus(flags, says):
    assert str(fineweb.corpus_of(fineweb.read_flags(flags).cfg)) == says


# --------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2


@pytest.fixture
def fails(tmp_path, monkeypatch, capfd):
    """fails(flags...) runs fineweb.py as its `__main__` does, in tmp_path -> the one line it ends
    with."""
    def run(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, flags)])
        with pytest.raises(SystemExit) as caught:
            cli.run(fineweb.main)
        stderr = capfd.readouterr().err
        assert caught.value.code == 2
        assert stderr.startswith("fineweb.py: error: ") and stderr.count("\n") == 1, stderr
        return stderr
    return run


def test_a_link_to_itself_is_one_line(source, tmp_path, fails):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert "cannot tell what" in fails("--source", loop, "--out", "out")
    assert f"cannot read {loop} (" in fails("--source", source, "--out", loop)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz", "json"])
def test_a_missing_column_lists_the_existing_ones(form, tmp_path, fails):
    source = write_source(tmp_path / "in", form, column="content")
    line = fails("--source", source)
    assert re.search(f"{source} has no column text: name one of (content, id|id, content) by "
                     "--text_column", line)


def parquet(documents):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": documents}), file)
    return file.getvalue()


PARQUET = parquet(DOCUMENTS)
COUNTING = jsonl([{"text": str(i)} for i in range(9999)])
DAMAGED = {
    "torn.jsonl": jsonl([{"text": "ok"}] * 70)[:-5],
    "torn.json": b'[{"text": "ok"}, {"te',
    "wrong.jsonl": b'{"text": "\xff\xfe"}\n',
    "bad.jsonl.gz": b"no gzip",
    "short.jsonl.gz": gzip.compress(COUNTING[:9999])[:-300],
    "bad.jsonl.zst": b"no zstd",
    "short.jsonl.zst": zstd(COUNTING)[:-300],
    "torn.parquet": b"PAR1 torn",
    "inside.parquet": PARQUET[:2000] + bytes(4000) + PARQUET[6000:],
    "wrong.txt": b"caf\xe9 latin-1",
    "utf16.txt": "words of Windows".encode("utf-16"),
    "without_mark.txt": "words of Windows".encode("utf-16-le"),
    "short.txt.gz": gzip.compress(b"words " * 999)[:-9],
}
LATE = ("torn.jsonl", "short.jsonl.gz", "inside.parquet")  # the beginning of the file is whole


# by name: bytes that contain the time must not become part of a test's name
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_and_what_is_written_stays(name, source, tmp_path, fails):
    (tmp_path / name).write_bytes(DAMAGED[name])
    flags = ["--source", source, tmp_path / name, "--out", "out", "--shard_size", 300]
    line = fails(*flags)
    remedy = "convert it to UTF-8" if name.endswith(".txt") else "repair it"
    assert f"cannot read {tmp_path / name} (" in line and f"{remedy} or leave it out" in line
    if name not in LATE:  # found before the first token
        assert not (tmp_path / "out").exists()
        return
    shards = read_shards(tmp_path / "out")
    whole = cut(IDS, 300)[:-1]  # all that comes before the damage
    assert shards[:len(whole)] == whole
    assert name in fails(*flags)  # continues, up to the same place
    assert read_shards(tmp_path / "out") == shards


VALUE = st.one_of(st.text(max_size=12), st.text(max_size=12), st.none(), st.integers(-9, 9),
                  st.just(""), st.just(" \n"), st.lists(st.text(max_size=2), max_size=2))
ROW = st.fixed_dictionaries({"text": VALUE}, optional={"id": st.integers(0, 9)})


@st.composite
def any_jsonl(draw):
    """Lines of a jsonl, some with bytes cut out or put in."""
    data = b""
    for row in draw(st.lists(ROW, min_size=1, max_size=4)):
        line = json.dumps(row, ensure_ascii=draw(st.booleans()))
        data += line.encode("utf-8", "surrogatepass") + b"\n"
    if draw(st.integers(0, 2)) == 0:
        start = draw(st.integers(0, len(data)))
        data = data[:start] + draw(st.binary(max_size=6)) + data[start + draw(st.integers(0, 6)):]
    return data


def texts_of(data):
    """What Python's own parser finds in the bytes of a jsonl; None if a line is not an object."""
    try:
        rows = [json.loads(line) for line in data.decode().split("\n") if line.strip()]
        texts = [row.get("text") for row in rows]
    except (ValueError, AttributeError):
        return None
    return [text for text in texts if isinstance(text, str) and text.strip()]


def test_any_bytes_are_bad_input_or_shards_of_what_json_finds_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = iter(range(10**6))
    outcomes = set()

    @settings(derandomize=True, deadline=None, max_examples=25,
              suppress_health_check=list(HealthCheck))
    @given(data=st.one_of(any_jsonl(), any_jsonl(), any_jsonl(), st.binary(max_size=60)))
    @example(b'{"text": "a"}\n{"text": "b c"}\n')
    @example(b'{"text": "a"}\n{"text": "b')
    @example(b'\xff\xfe{"text": "a"}\n')
    @example(b"[" * 100_000)
    def check(data):
        name = f"case{next(count)}"
        Path(f"{name}.jsonl").write_bytes(data)
        try:
            make(f"{name}.jsonl", name, "--workers", 1)
        except cli.BadInput as error:
            assert name in str(error) or "no documents" in str(error)
            assert not list(Path(name).glob("*.npy"))
            outcomes.add("bad input")
            return
        texts = texts_of(data)
        assert texts, data  # the folder is complete, so there was something to read
        ids = all_ids(Path(name))
        assert ids == reference(texts)
        text = tiktoken.get_encoding("gpt2").decode(ids)
        assert text == "".join(EOT + document for document in texts)
        outcomes.add("shards")

    check()
    assert outcomes == {"bad input", "shards"}


@pytest.mark.parametrize("rows", [[], [None, "", "  "]])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "json"])
def test_no_documents(rows, form, tmp_path, fails, tokenizer):
    source = write_source(tmp_path / "in", form, rows)
    if form == "parquet":
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), source)
    tokenizer.save(tmp_path / "mine.json")
    line = fails("--source", source, "--tokenizer", "mine.json", "--out", "a/b")
    assert not (tmp_path / "a").exists()
    assert "no documents" in line and f"({len(rows)} rows were without text)" in line


GOOD = ["--source", "good/data.jsonl"]


@pytest.mark.parametrize("flags, named", [  # the file, dataset or flag that the line names
    (["--source", "absent.parquet"], "absent.parquet"),
    (["--source", "*.jsonl.gz"], "*.jsonl.gz"),
    (["--source", "empty_folder"], "empty_folder"),
    (["--source", "gone/"], "gone/"),
    (["--source", "notes.*"], "notes.md"),
    (["--source", "pipe.jsonl"], "pipe.jsonl (not a regular file)"),
    (["--source", "good", "links"], "links/dangling.txt"),
    (["--source", "some/dataset"], "some/dataset"),
    ([], "HuggingFaceFW/fineweb-edu"),
    (["--docstrings", *GOOD], "--docstrings and --source"),
    (["--docstrings", "--name", "x"], "--name"),
    (["--preset", "books", *GOOD], "--preset, --docstrings and --source"),
    (["--preset", "books", "--docstrings"], "--preset, --docstrings"),
    ([*GOOD, "--name", "sample-10BT"], "--name"),
    (["--source", "good", "--out", "good/out"], "--out good/out is in the folder good"),
    ([*GOOD, "--out", "notes.md"], "cannot write to notes.md"),
    ([*GOOD, "--tokenizer", "gpt5"], "unknown tokenizer 'gpt5'"),
    ([*GOOD, "--tokenizer", "torn.json"], "torn.json is damaged"),
    ([*GOOD, "--tokenizer", "bpe:x"], "--tokenizer bpe:x"),
    ([*GOOD, "--tokenizer", "bpe:1000000000000"], "--tokenizer bpe:1000000000000"),
    ([*GOOD, "--tokenizer", "bpe:1000001"], "1,000,000 ids"),
    ([*GOOD, "--tokenizer", "bpe:99999"], "too small for a BPE of 99999"),
    ([*GOOD, "--shard_size", "0"], "--shard_size must be at least 1"),
    ([*GOOD, "--max_tokens", "1"], "--max_tokens must be at least 2"),
    ([*GOOD, "--val_tokens", "1e9"], "--val_tokens 1,000,000,000 leaves nothing"),
    ([*GOOD, "--val_tokens", TOTAL], f"--val_tokens {TOTAL:,} leaves nothing"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_bad_input(flags, named, source, tmp_path, fails):
    for folder in ("good", "empty_folder", "links"):
        (tmp_path / folder).mkdir()
    shutil.copy(source, tmp_path / "good" / "data.jsonl")
    (tmp_path / "links" / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "torn.json").write_text('{"model": ')
    before = set(tmp_path.rglob("*"))
    assert named in fails(*flags)
    assert set(tmp_path.rglob("*")) == before  # no --out
    assert (tmp_path / "notes.md").read_text() == "notes"


def test_shards_of_other_settings_are_not_touched(source, tmp_path, fails, monkeypatch):
    flags = ["--source", source, "--out", "out", "--shard_size", 500]
    monkeypatch.chdir(tmp_path)
    fineweb.main([str(flag) for flag in flags])
    before = contents(tmp_path / "out")
    for name, value in [("shard_size", 400), ("tokenizer", "cl100k_base"), ("tokenizer", "bpe:300"),
                        ("val_tokens", 0), ("max_tokens", 9), ("text_column", "body"),
                        ("source", "x.txt")]:
        line = fails(*flags, f"--{name}", value)
        assert re.search(f"out/ has shards made with (no )?--{name}[ ,]", line)
        assert "give another --out" in line
    (tmp_path / "foreign").mkdir()
    np.save(tmp_path / "foreign" / "edufineweb_train_000001.npy", np.zeros(3, np.uint16))
    line = fails("--source", source, "--out", "foreign")
    assert "shards of another program (edufineweb_train_000001.npy)" in line
    (tmp_path / "busy").mkdir()
    with files.locked(tmp_path / "busy", ""):
        assert "busy is in use by another process" in fails("--source", source, "--out", "busy")
    assert not list((tmp_path / "busy").iterdir())
    assert contents(tmp_path / "out") == before


@needs_dev_full
def test_a_full_disk_keeps_what_is_written_and_the_run_continues(
        source, tmp_path, fails, monkeypatch):
    flags = ["--source", source, "--out", "out", "--shard_size", 500]
    for name in ("out_val_000000.npy", "out_train_000002.npy", "meta.json"):
        def open_full(path, mode, name=name):
            is_full = mode == "xb" and path.name.startswith(f"{name}.")
            return open("/dev/full", "wb") if is_full else open(path, mode)

        with monkeypatch.context() as patch:
            patch.setattr(files, "open", open_full, raising=False)
            assert "the disk of out/ is full" in fails(*flags)
        shards = read_shards(tmp_path / "out")
        assert shards == cut(IDS, 500)[:len(shards)]
    fineweb.main([str(flag) for flag in flags])
    assert read_shards(tmp_path / "out") == cut(IDS, 500)
    check_meta(tmp_path / "out", DOCUMENTS)
