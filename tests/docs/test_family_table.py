"""The table of families in both READMEs is the one of the results, and these are of all families."""

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


@pytest.mark.parametrize("readme", make_family_table.WORDS)
def test_the_readme_shows_them(readme):
    text = (make_family_table.ROOT / readme).read_text(encoding="utf-8")
    assert make_family_table.make_table(RECORD, make_family_table.WORDS[readme]) in text
