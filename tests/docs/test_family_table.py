"""Tests of the table of families in docs/models.md: it is that of the record, and the record has every family."""

from __future__ import annotations

import json

import conformance
import families
import make_family_table
import pytest

RECORD = json.loads(make_family_table.RESULTS.read_text(encoding="utf-8"))


def test_the_results_are_those_of_all_families():
    assert list(RECORD["families"]) == list(families.FAMILIES)
    for name, family in families.FAMILIES.items():
        assert RECORD["families"][name]["model"] == family.model
        assert RECORD["families"][name]["outcome"] == family.outcome


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_row_passed_or_was_refused_as_promised(name):
    family, row = families.FAMILIES[name], RECORD["families"][name]
    assert set(row["results"]) <= set(make_family_table.BACKENDS)
    for backend, results in row["results"].items():
        assert list(results) == list(
            conformance.FLEX_WAYS if backend == "flex_attention" else conformance.WAYS
        )
        for way, result in results.items():
            if family.outcome == families.REFUSED or (way == "chunked" and family.latent_since):
                assert result.startswith("refused: ")
            elif way == "chunked" and not family.chunks:
                assert result.startswith("not offered: ")
            else:
                assert result == "pass"


def test_the_page_shows_them():
    text = make_family_table.PAGE.read_text(encoding="utf-8")
    assert make_family_table.make_table(RECORD) in text, "run python tools/make_family_table.py --table-only"
