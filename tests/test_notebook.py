"""notebooks/tiny.ipynb: its cells run in order, without Jupyter. Run: make test-slow, or
python -m pytest -m slow tests/test_notebook.py"""

import json
import sys

import pytest
from helpers import ROOT

NOTEBOOK = json.loads((ROOT / "notebooks" / "tiny.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_stripped():
    for cell in CODE:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_the_cells_run_in_order(tmp_path, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr("sys.path", [*sys.path])
    namespace = {}
    for cell in CODE:
        source = "".join(cell["source"])
        exec(source.replace("STEPS = 100", "STEPS = 6"), namespace)
    assert namespace["STEPS"] == 6
    figure = namespace["plt"].gcf()
    train, val = figure.axes[0].lines
    assert len(train.get_xdata()) == 6
    assert len(val.get_xdata()) >= 1
    assert capsys.readouterr().out.count("Return the") >= 2
    namespace["plt"].close(figure)
