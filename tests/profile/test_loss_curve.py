"""Loss curves: the fit, the bound of nine in ten, and what a file may hold."""

from __future__ import annotations

import numpy as np
import pytest

from rankkv.errors import InputError, ProfileError
from rankkv.profile.loss_curve import LossCurve, fit_loss_curve


def draw(prompts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw shares lost and losses ``3 * share ** 1.5`` with lognormal noise of each prompt."""
    generator = np.random.default_rng(seed)
    share = np.exp(generator.uniform(np.log(0.01), np.log(0.6), (prompts, 6)))
    noise = generator.normal(0.0, 0.5, (prompts, 6))
    names = np.repeat(np.arange(prompts), 6).reshape(prompts, 6)
    return share.ravel(), (3.0 * share**1.5 * np.exp(noise)).ravel(), names.ravel()


def test_the_fit_finds_the_law_and_the_margin_of_its_noise():
    curve = fit_loss_curve(*draw(200))
    for share in (0.03, 0.1, 0.4):
        assert curve.predict(share)[0] == pytest.approx(3.0 * share**1.5, rel=0.25)
    # The 0.9 quantile of the noise: exp(1.2816 * 0.5).
    assert curve.margin == pytest.approx(1.9, rel=0.15)


def test_nine_of_ten_new_prompts_stay_below_the_bound():
    curve = fit_loss_curve(*draw(24))
    share, loss, _ = draw(300, seed=1)
    below = np.mean([value <= curve.predict(lost)[1] for lost, value in zip(share, loss, strict=True)])
    assert 0.84 < below < 0.97


def test_a_prediction_never_falls_and_is_inverted():
    curve = fit_loss_curve(*draw(24))
    shares = np.linspace(0.0, 1.0, 101)
    bounds = [curve.predict(share)[1] for share in shares]
    assert bounds == sorted(bounds)
    assert bounds[0] == 0.0
    for loss in (1e-4, 0.01, 0.3):
        share = curve.find_lost(loss)
        assert curve.predict(share)[1] <= loss * (1 + 1e-9)
        assert share == 1.0 or curve.predict(share * 1.001)[1] > loss


def test_a_curve_survives_its_record():
    curve = fit_loss_curve(*draw(24), {"models": ["one"]})
    again = LossCurve.from_dict(curve.to_dict())
    assert again == curve
    assert again.measured["models"] == ["one"]


@pytest.mark.parametrize(
    "change",
    [
        {"lost": [0.1]},
        {"lost": [0.2, 0.1]},
        {"lost": [0.1, 1.2]},
        {"lost": ["0.1", 0.2]},
        {"loss": [0.2, 0.1]},
        {"loss": [0.0, 0.1]},
        {"loss": [0.1, float("inf")]},
        {"margin": 0.5},
        {"margin": True},
        {"more": 1},
    ],
)
def test_a_damaged_curve_is_refused(change):
    with pytest.raises(ProfileError, match="calibrate again"):
        LossCurve.from_dict({"lost": [0.1, 0.2], "loss": [0.1, 0.2], "margin": 1.5, **change})


def test_too_few_measurements_are_refused():
    with pytest.raises(InputError, match="at least 24 measurements of 4 prompts"):
        fit_loss_curve(*draw(3))


@pytest.mark.parametrize("measured", [{"models": [1, None]}, [["models", 5]], {"strategy": 3}])
def test_a_damaged_description_is_refused(measured):
    with pytest.raises(ProfileError, match="models must be a list of names"):
        LossCurve.from_dict({"lost": [0.1, 0.2], "loss": [0.1, 0.2], "margin": 2.0, "measured": measured})
