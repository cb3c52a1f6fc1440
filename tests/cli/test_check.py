"""The self-test of an installation, and the command that shows it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from typer.testing import CliRunner

from rankkv import RankKVCache, __version__
from rankkv.analysis.selfcheck import run_selfcheck
from rankkv.cli import app
from rankkv.models import compat
from rankkv.models.compat import OLDEST_TRANSFORMERS

CHECKS = ["identity", "budgets", "first token", "bytes"]


def list_failed(record):
    return [check["name"] for check in record["checks"] if not check["passed"]]


def test_a_sound_installation_passes(capfd):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    record = run_selfcheck()
    assert record["ok"]
    assert [check["name"] for check in record["checks"]] == CHECKS
    assert record["versions"]["rankkv"] == __version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"] == transformers.__version__
    assert record["versions"]["oldest_transformers"] == OLDEST_TRANSFORMERS
    assert record["versions"]["backend"] in ("sdpa", "eager")
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.rand(3), expected), "the user's random numbers were drawn from"


def test_a_cache_that_holds_too_much_is_found(monkeypatch):
    monkeypatch.setattr("rankkv.cache.layer.RankKVLayer.shrink", lambda *args, **kwargs: None)
    record = run_selfcheck()
    assert not record["ok"]
    assert {"budgets", "bytes"} <= set(list_failed(record))


def test_a_changed_text_is_found(monkeypatch):
    attend = RankKVCache.attend

    def spoilt(self, layer_idx, call):
        return attend(self, layer_idx, replace(call, query=-call.query))

    monkeypatch.setattr(RankKVCache, "attend", spoilt)
    assert {"identity", "first token"} <= set(list_failed(run_selfcheck()))


def test_an_error_is_reported_and_not_raised(monkeypatch):
    monkeypatch.setattr(compat.transformers, "__version__", "4.0.0")
    record = run_selfcheck()
    assert list_failed(record) == CHECKS
    assert all("transformers 4.0.0 is too old" in check["detail"] for check in record["checks"])


def test_the_command_shows_tables():
    done = CliRunner().invoke(app, ["check"])
    assert done.exit_code == 0
    for text in (__version__, torch.__version__, transformers.__version__, *CHECKS):
        assert text in done.stdout
    assert "FAILED" not in done.stdout


def test_the_command_prints_json_alone():
    done = CliRunner().invoke(app, ["check", "--json"])
    assert done.exit_code == 0
    record = json.loads(done.stdout)
    assert record["ok"] is True
    assert [check["name"] for check in record["checks"]] == CHECKS


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_exit_code_says_that_something_failed(monkeypatch, options):
    monkeypatch.setattr(compat.transformers, "__version__", "4.0.0")
    done = CliRunner().invoke(app, ["check", *options])
    assert done.exit_code == 1
    assert "too old" in done.stdout
