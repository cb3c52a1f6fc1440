"""The load of `benchmarks/serving_load.py` in its short form, and what its record calls a miss."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving_load import list_misses, main


@pytest.mark.slow
def test_a_minute_of_load_with_a_kill(tmp_path):
    output = tmp_path / "load.json"
    record = main(["--narrow", "--seconds", "60", "--output", str(output)])
    assert json.loads(output.read_text())["answers"] == record["answers"] > 0
    assert record["examples"] == []
    assert (record["wrong_answers"], record["contexts_lost"], record["other_errors"]) == (0, 0, {})
    assert record["contexts_acknowledged"] > record["contexts_acknowledged_at_the_kill"] >= 4
    # The load was one: clients left, the queue was full, and the kill cut answers.
    assert min(record["clients_that_left"], record["refused_429"], record["cut_by_the_kill"]) > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"wrong_answers": 2}, ["2 answers were wrong"]),
        ({"contexts_lost": 1}, ["1 acknowledged contexts were lost"]),
        ({"memory": {"growth": 0.06}}, ["resident memory grew by 6.0%"]),
        ({"other_errors": {"500: x": 1}}, ["other errors than 429 and cut connections: {'500: x': 1}"]),
        ({"answers": 0, "near_ties": 0}, ["there was no answer"]),
        ({"near_ties": 3}, ["3 answers differ where two tokens are said to be equally likely"]),
    ],
)
def test_every_goal_that_is_missed_is_named(change, told):
    record = {
        "wrong_answers": 0,
        "contexts_lost": 0,
        "other_errors": {},
        "answers": 100,
        "near_ties": 2,
        "memory": {"growth": 0.05},
        **change,
    }
    assert list_misses(record) == told
