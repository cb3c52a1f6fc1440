"""PyramidKV and KVCompose of kvpress give the lengths of the strategies, but for what these state."""

from __future__ import annotations

from types import SimpleNamespace

import oracles
import peers
import pytest
import torch
from transformers import DynamicCache

from rankkv.budget.strategies import compute_weights
from rankkv.limits import Limits
from rankkv.models.compat import cache_argument
from rankkv.selection import Selector

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


class Composed:
    """KVCompose of kvpress on one prompt: its scores, and what it keeps, ``[layer, kv_head, token]``.

    Every head's 16 newest tokens score highest, as RankKV protects them. Layer 0 has the best scores: kvpress gives it
    at least as many tokens as any other layer, whatever its scores, and RankKV does not.
    """

    def __init__(self, model, ids, kept):
        import kvpress

        layers, length = model.config.num_hidden_layers, ids.shape[1]
        press = kvpress.KVComposePress(compression_ratio=1 - (kept * layers + 0.5) / (layers * length))
        enhance, prepare = press.enhance_scores, press.prepare_important_masks

        def enhance_more():
            enhance()
            curves = press.scores.sort(dim=-1, descending=True).values.mean(dim=1)
            press.scores[0] *= float((curves.amax(dim=0) / curves[0].clamp(min=1e-12)).max())
            press.scores[..., -16:] += 1e3

        def prepare_and_note():
            prepare()
            self.scores = press.scores.clone()
            self.kept = torch.stack([torch.stack(heads) for heads in press.important_mask_per_kv_head])

        press.enhance_scores, press.prepare_important_masks = enhance_more, prepare_and_note
        with torch.no_grad(), press(model):
            model.model(input_ids=ids, **cache_argument(DynamicCache()))


@pytest.mark.parametrize("kept", [40, 80])
@pytest.mark.parametrize("family", peers.TINY_FAMILIES)
def test_kvcompose_splits_the_same_scores_over_layers(family, kept, tally):
    ids = oracles.random_prompt(160)
    theirs = Composed(peers.build_tiny(family), ids, kept)

    def score(observation):
        return theirs.scores[observation.layer_idx][None]

    selector = Selector("theirs", score, "nothing", "kvpress", comparable=True)
    options = {"selector": selector, "strategy": "kvcompose", "budget": kept, "min_budget": 16}
    cache = oracles.prefill(peers.build_tiny(family), ids, sink_size=0, head_floor=0.0, **options)
    for layer, rows in enumerate(oracles.kept_tokens(cache)):
        for head, tokens in enumerate(rows[0]):
            other = theirs.kept[layer, head].nonzero()[:, 0]
            verdict = peers.compare_kept(torch.tensor(tokens), other, theirs.scores[layer, head])
            tally("kvcompose", verdict)
            assert verdict != "different", f"layer {layer}, head {head}"
