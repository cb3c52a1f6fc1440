"""The one place that knows transformers' versions."""

from __future__ import annotations

import warnings

import oracles
import pytest

from rankkv import RankKVAnalyzer, RankKVCache
from rankkv.errors import UnsupportedModelError
from rankkv.models import compat


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("5.0.0", "past_key_values"),
        ("5.9.0", "past_key_values"),
        ("5.23.4", "past_key_values"),
        ("5.24.0.dev0", "cache"),
        ("5.24.0", "cache"),
        ("5.100.0", "cache"),
    ],
)
def test_keyword_of_a_cache(monkeypatch, version, name):
    monkeypatch.setattr(compat.transformers, "__version__", version)
    assert compat.cache_argument("it") == {name: "it"}


def test_the_keyword_works_without_a_deprecation_warning(tiny_llama):
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oracles.forward(model, RankKVCache(model), oracles.random_prompt(40))


@pytest.mark.parametrize("version", ["4.57.6", "4.99.0"])
def test_an_older_version_is_refused_by_name(tiny_llama, monkeypatch, version):
    model = tiny_llama()
    monkeypatch.setattr(compat.transformers, "__version__", version)
    for build in (RankKVCache, RankKVAnalyzer):
        with pytest.raises(
            UnsupportedModelError, match=rf"transformers {version} is too old.*needs 5\.0\.0.*pip"
        ):
            build(model)


def test_arguments_of_a_model(tiny_llama):
    model = tiny_llama()
    assert compat.accepts_argument(model, "logits_to_keep")
    assert not compat.accepts_argument(model, "no_such_argument")
