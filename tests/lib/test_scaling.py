"""The scaling law against its source and by hand: python -m pytest tests/lib/test_scaling.py"""

import math
import sys

import pytest
from helpers import ROOT

from lib import scaling
from lib.scaling import Law

sys.path.insert(0, str(ROOT / "benchmarks"))
import fit_scaling

LAW = Law(floor=0.8, size=0.6, size_power=0.5, text=1.5, text_power=0.25, repeats=3.0, delay=10.0)


@pytest.fixture(scope="module")
def points():
    found = []
    for name in scaling.measured().sources:
        found += fit_scaling.read(ROOT / name)
    return found


def test_the_law_by_hand():
    # 25M parameters; 91 MB, nothing repeated
    assert LAW.loss(25e6, 91e6, 1e9) == pytest.approx(0.8 + 0.6 / 5 + 1.5 / 3)
    # 30 MB repeated: at most 30 (1 + 3) MB of new text
    assert LAW.worth(30e9, 30) == pytest.approx(120)
    assert LAW.worth(60, 30) == pytest.approx(30 * (1 + 3 * (1 - math.exp(-1 / 3))))


def test_more_text_is_always_better():
    losses = [LAW.loss(25e6, 1.02**i * 1e4, 30e6) for i in range(800)]
    assert losses == sorted(losses, reverse=True)
    steps = [a - b for a, b in zip(losses, losses[1:])]
    assert max(steps) == steps[0]  # no jump where the text is twice the delay


def test_the_coefficients_are_those_of_the_fit(points):
    law = scaling.measured().law
    assert list(law) == pytest.approx(fit_scaling.fit(points), rel=1e-3)
    predicted = fit_scaling.predict(law, points)
    for point, loss in zip(points, predicted):
        mine = law.loss(point["parameters"], point["text"], point["different"])
        assert mine == pytest.approx(loss)


def test_the_law_is_within_its_error(points):
    law = scaling.measured()
    errors = []
    for point in points:
        loss, error = law.predict(point["parameters"], point["text"], point["different"])
        errors.append((loss - point["loss"]) / error)
        assert not law.extrapolates(point["parameters"], point["text"])
    assert sum(abs(error) < 2 for error in errors) > 0.9 * len(errors)
    assert law.extrapolates(1e9, 1e8) and law.extrapolates(5e7, 1e10)


def test_the_error_grows_outside_of_what_was_measured():
    law = scaling.measured()
    _, inside = law.predict(60e6, 1e9, 1e12)
    _, outside = law.predict(1e9, 1e12, 1e12)
    assert outside > 2 * inside


def test_a_fit_finds_the_law_that_made_its_points():
    points = []
    for size in (10e6, 30e6, 100e6, 300e6):
        for text in (25e6, 1e8, 4e8, 4e9):
            loss = LAW.loss(size, text, 2e8)
            points.append(dict(parameters=size, text=text, different=2e8, loss=loss))
    found = fit_scaling.fit(points)
    for point in points:
        assert fit_scaling.predict(found, [point])[0] == pytest.approx(point["loss"], rel=3e-3)


def test_results_of_runs_are_points(tmp_path):
    run = {"name": "a", "parameters": 30e6, "tokens": 1e8, "val_loss": 3.0, "bits_per_byte": 1.1,
           "epochs": 2.0, "flops_per_token": 2.7e8, "tok_per_sec": 2e6, "processes": 2,
           "device": "X"}
    point = fit_scaling.of_results(run)
    text = 1e8 * 3.0 / math.log(2) / 1.1
    assert (point["text"], point["different"]) == pytest.approx((text, text / 2))
    assert (point["speed"], point["seconds"]) == (1e6, 50)
