"""The pyramid of kvpress has the lengths of the strategy, but for what the strategy's docstring states."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rankkv.budget.strategies import compute_weights
from rankkv.limits import Limits

WINDOW = 16
LAYERS = 9


def measure_press(length, kept, beta):
    import kvpress

    press = kvpress.PyramidKVPress(1 - kept, window_size=WINDOW, beta=beta)
    config = SimpleNamespace(num_hidden_layers=LAYERS)
    layers = [SimpleNamespace(config=config, layer_idx=index) for index in range(LAYERS)]
    return [press.get_layer_budget(layer, length) for layer in layers]


def compute_lengths(length, kept, beta, window):
    limits = Limits(round(kept * length * LAYERS), length, window)
    weights = compute_weights([1.0] * LAYERS, "pyramid", beta=beta, limits=limits)
    return (weights / weights.sum() * kept * length * LAYERS).tolist()


@pytest.mark.parametrize(("length", "kept", "beta"), [(4000, 0.2, 5), (1000, 0.4, 4), (2000, 0.1, 10)])
def test_counts_the_window_inside_the_pyramid(length, kept, beta):
    theirs = measure_press(length, kept, beta)
    assert theirs == pytest.approx(compute_lengths(length, kept, beta, window=0), abs=0.5)
    ours = compute_lengths(length, kept, beta, window=WINDOW)
    # Beside the window there is less to draw a pyramid of: it falls less steeply to the same mean.
    assert theirs[0] > ours[0] + 1
    assert theirs[-1] < ours[-1] - 1
    assert sum(theirs) == pytest.approx(sum(ours), abs=LAYERS / 2)


def test_is_uniform_where_the_last_layer_would_hold_less_than_the_window():
    assert measure_press(1000, 0.2, 20) == [200] * LAYERS
    ours = compute_lengths(1000, 0.2, 20, window=WINDOW)
    assert ours[-1] == pytest.approx(16 + 184 / 20)
    assert ours[0] > 2 * ours[-1]
