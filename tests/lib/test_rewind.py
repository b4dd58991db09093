"""Going back to a checkpoint: python -m pytest tests/lib/test_rewind.py"""

from lib import checkpoint
from lib.rewind import rewind


def test_rewind(tmp_path):
    kept = {"ckpt_00004.pt", "ckpt_00008.pt", "weights_00008.pt", "notes.tmp"}
    later = {"ckpt_00012.pt", "ckpt_100000.pt", "weights_00012.pt"}
    unfinished = {"ckpt_00012.pt.0123abcd.tmp", "config.json.0123abcd.tmp", "log.txt.0123abcd.tmp",
                  "weights_00012.pt.0123abcd.tmp",
                  "ckpt_00012.pt.tmp", "config.json.tmp"}  # the last two: earlier versions'
    for name in kept | later | unfinished:
        (tmp_path / name).write_text(name)
    lines = "a line of another kind\n0 val 5.000000\n0 train 5.000000\n7 train 4.000000\n"
    torn = "8 val 3.000000\n8 train 3.000000\n10 train 2.000000\n1"
    (tmp_path / "log.txt").write_text(lines + torn)
    for _ in range(2):  # the second time changes nothing
        rewind(tmp_path, 8)
        assert (tmp_path / "log.txt").read_text() == lines
        names = {path.name for path in tmp_path.iterdir()}
        assert names == kept | {f"{name}.aside" for name in later} | {"log.txt"}
        assert (tmp_path / "ckpt_00012.pt.aside").read_text() == "ckpt_00012.pt"


def test_going_back_again_keeps_every_branch(tmp_path):
    for branch in ("first", "second", "third"):
        (tmp_path / "ckpt_00012.pt").write_text(branch)
        rewind(tmp_path, 8)
    aside = [tmp_path / f"ckpt_00012.pt.aside{number}" for number in ("", ".2", ".3")]
    assert [path.read_text() for path in aside] == ["first", "second", "third"]
    assert not checkpoint.found(tmp_path)
