"""The cells of a calibration, against caches compressed the ordinary way."""

from __future__ import annotations

import oracles
import pytest
import torch

from rankkv import compress
from rankkv.calibration import single_runs
from rankkv.models.compat import cache_argument

CONTEXT = 100


def make_ids(length=140, seed=0):
    return oracles.random_prompt(length, seed).reshape(1, -1)


def compute_divergence(model, ids, budget):
    """KL(full || compressed) and excess loss in float64, every layer compressed to ``budget`` tokens."""
    rest, targets = ids[:, CONTEXT:], ids[0, CONTEXT + 1 :]
    logs = []
    for kept in (CONTEXT, budget):
        cache = compress(model, ids[:, :CONTEXT], budget=kept, strategy="uniform", min_budget=1)
        with torch.no_grad():
            logits = model(rest, **cache_argument(cache)).logits[0, :-1]
        logs.append(logits.double().log_softmax(-1))
    full, compressed = logs
    divergence = (full.exp() * (full - compressed)).sum(-1).mean()
    loss = (full - compressed).gather(-1, targets[:, None]).mean()
    return float(loss), float(divergence)


def test_cells_of_one_layer_are_those_of_the_whole_cache(tiny_llama):
    model, ids = tiny_llama(1), make_ids()
    record = single_runs.measure_text(model, ids, CONTEXT, (0.1, 0.4), base_ratio=0.2)
    for place, budget in enumerate((10, 40)):
        loss, divergence = compute_divergence(model, ids, budget)
        assert record["excess_loss"][0][place] == pytest.approx(loss, abs=1e-4)
        assert record["divergence"][0][place] == pytest.approx(divergence, abs=1e-5)
    loss, divergence = compute_divergence(model, ids, 20)
    assert record["base_divergence"] == pytest.approx(divergence, abs=1e-5)
    # With its full cache back nothing is left of the distance.
    assert record["gain_divergence"][0] == pytest.approx(divergence, abs=1e-5)
    assert record["gain_loss"][0] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_replay_changes_no_cell(tiny_llama, tiny_neox, monkeypatch, family):
    model, ids = {"llama": tiny_llama, "neox": tiny_neox}[family](4), make_ids()
    assert len(single_runs.find_decoder_layers(model)) == 4
    replayed = single_runs.measure_text(model, ids, CONTEXT, (0.1, 0.4))
    with monkeypatch.context() as patch:
        patch.setattr(single_runs, "find_decoder_layers", lambda model: [])
        plain = single_runs.measure_text(model, ids, CONTEXT, (0.1, 0.4))
    for name in ("divergence", "excess_loss", "gain_divergence", "gain_loss"):
        torch.testing.assert_close(
            torch.tensor(replayed[name]), torch.tensor(plain[name]), atol=1e-5, rtol=1e-3
        )
    assert max(max(row) for row in plain["divergence"]) > 1e-3
    assert not any("forward" in vars(module) for module in model.modules())
