"""Doubtful answers: what the program counts, and that it goes on where it stopped."""

from __future__ import annotations

import answer_doubts
import pytest
from allocation_ablation import main

from rankkv.evaluation.results import read_rows
from rankkv.models.texts import python_docs_text


def test_only_answers_that_are_right_with_the_full_cache_count():
    def build(ratio, question, right, least):
        return {"text": "a", "ratio": ratio, "question": question, "right": right, "least": least}

    # Question 3 is wrong with the full cache.
    rows = [build(1.0, question, float(question != 3), 0.9) for question in range(4)]
    rows += [
        build(0.1, 0, 0.0, 0.2),
        build(0.1, 1, 0.0, 0.8),
        build(0.1, 2, 1.0, 0.5),
        build(0.1, 3, 0.0, 0.1),
    ]
    told = answer_doubts.summarize(rows, 0.4)
    assert "(3 of 4, 1 contexts)" in told
    assert told.splitlines()[-1] == "| 10% | 2 | 50% | 1 | 0% | 0.50 |"


@pytest.mark.slow
def test_the_program_goes_on_where_it_stopped(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(python_docs_text()[:60_000])
    given = [
        "--texts", f"text={text}", "--samples", "1", "--context", "320", "--ratios", "0.3",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    for _ in range(2):
        assert main(given, answer_doubts.parse_arguments, answer_doubts.run) == 0
        assert "| 30% |" in capsys.readouterr().out
    rows = read_rows([tmp_path / "out" / "rows.parquet"])
    assert len(rows) == 2 * 4
    assert all(0.0 < row["least"] <= 1.0 for row in rows)


@pytest.mark.parametrize(("option", "value"), [("--samples", "0"), ("--least", "1.5")])
def test_bad_options_are_refused_before_the_model_loads(option, value, capsys):
    assert main([option, value], answer_doubts.parse_arguments, answer_doubts.run) == 2
    assert option in capsys.readouterr().err
