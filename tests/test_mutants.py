"""Tests of the mutants: each is a change of the code, and the tables that choose them name what is there."""

from __future__ import annotations

import ast
from collections import Counter

import mutants
import pytest

DRAWN = mutants.draw_mutants(mutants.COUNT)


def test_every_mutant_is_another_program():
    assert len({mutant.name for mutant in DRAWN}) == len(DRAWN)
    for mutant in DRAWN:
        source = (mutants.ROOT / "rankkv" / mutant.path).read_bytes()
        changed = source[: mutant.start] + mutant.new.encode() + source[mutant.stop :]
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant


def test_every_package_has_its_share():
    counts = Counter(mutant.path.split("/")[0] for mutant in DRAWN)
    assert set(counts) == set(mutants.PACKAGES)
    assert min(counts.values()) >= 24
    assert len(DRAWN) >= 120


def test_known_changes_are_found(tmp_path):
    (tmp_path / "module.py").write_text(
        '"""Docstring: 1 < 2."""\n\n\ndef clip(x, low=0.5):\n    if x < low and not x:\n'
        '        raise ValueError("1 + 1")\n    x += 1\n    return min(x - 1, low)\n'
    )
    found = {
        (mutant.line, mutant.change) for mutant in mutants.find_mutants(tmp_path / "module.py", tmp_path)
    }
    assert found == {
        (4, "0.5 -> 1.0"),
        (5, "and -> or"),
        (5, "< -> <="),
        (5, "< -> >="),
        (5, "not dropped"),
        (7, "statement dropped"),
        (7, "1 -> 2"),
        (8, "min -> max"),
        (8, "- -> +"),
        (8, "1 -> 2"),
    }


@pytest.mark.parametrize("prefix", mutants.TESTS)
def test_named_tests_exist(prefix):
    assert list((mutants.ROOT / "rankkv").glob(f"{prefix}*"))
    for names in mutants.TESTS[prefix]:
        for name in names.split():
            assert (mutants.ROOT / "tests" / f"{name}.py").is_file()


def test_what_is_left_out_is_still_a_mutant():
    folder = mutants.ROOT / "rankkv"
    known = {
        (mutant.path, mutant.after)
        for path in {path for path, _ in mutants.EQUIVALENT}
        for mutant in mutants.find_mutants(folder / path, folder)
    }
    assert set(mutants.EQUIVALENT) <= known
