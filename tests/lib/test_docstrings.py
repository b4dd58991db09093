"""The corpus of docstrings. Run: python -m pytest tests/lib/test_docstrings.py"""

import json

from texts import cut, read_shards, reference

import fineweb
from lib import docstrings


def test_docstrings_are_cached_and_contain_real_text(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    for name in "abc":
        text = f'"""{name} {"long enough " * 20}end"""\ndef f():\n  "short"\n'
        (library / f"{name}.py").write_text(text)
    (library / "broken.py").write_text("def (")
    monkeypatch.setattr(docstrings, "PACKAGES", ("no_such_package",))
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.chdir(tmp_path)
    fineweb.main(["--docstrings", "--shard_size", "1000"])
    lines = (tmp_path / "docstrings" / "docstrings.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert sorted(texts) == [f"{name} {'long enough ' * 20}end" for name in "abc"]
    assert read_shards(tmp_path / "docstrings") == cut(reference(texts), 1000)
