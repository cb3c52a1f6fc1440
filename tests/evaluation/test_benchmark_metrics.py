"""Metrics of published benchmarks: values that the benchmarks' own scoring code gave for these texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankkv.errors import MissingDependencyError, UnknownNameError
from rankkv.evaluation.benchmarks import METRICS, get_metric
from rankkv.evaluation.benchmarks.base import load_templates

CLASSES = ["num", "number", "n", "no", "nob", "Yes"]
STORM = "The storm closed roads. Schools stayed open on Monday."
ROADS = "Roads were closed by the storm. Schools were open."

# Output, references and classes with the value of LongBench's metrics.py, InfiniteBench's compute_scores.py or
# RULER's evaluate.py.
PUBLISHED = [
    ("qa_f1", "The answer is the Eiffel Tower, in Paris.", ["Eiffel tower"], 0.5),
    ("qa_f1", "no", ["yes"], 0.0),
    ("qa_f1_zh", "在厦门大学举办的。", ["厦门大学。"], 0.4),
    ("rouge_l", STORM, [ROADS], 0.35294117148788934),
    ("rouge_l", "", [ROADS], 0.0),
    ("rouge_l_zh", "会议讨论了预算。", ["会议通过了预算方案。"], 0.7272727223140496),
    ("classification", "number", ["number"], 1.0),
    # The entry behind a removed one is not looked at: "no" stays beside "nob".
    ("classification", "nob", ["nob"], 0.5),
    ("classification", "Yes no", ["Yes"], 1 / 3),
    ("classification", "none", ["Yes"], 0.0),
    ("count", "There are 12 or 7, maybe 12.", ["12"], 2 / 3),
    ("retrieval", "Paragraph 3 or Paragraph 30", ["Paragraph 3"], 0.5),
    ("retrieval_zh", "段落3\uff0c段落7", ["段落3"], 0.5),
    ("code_similarity", "# comment\n```\n  return a + b\n", ["  return a - b"], 0.93),
    ("code_similarity", "for i in range(10):\n  x", ["for item in items:"], 0.59),
    ("string_match_all", "It is ABC-1 and def", ["abc-1", "DEF", "ghi"], 2 / 3),
    ("string_match_part", "It is ABC-1", ["ghi", "abc-1"], 1.0),
    ("word", 'The value is "f3a2".', ["f3a2"], 1.0),
    ("word", "f3a2-7", ["f3a2"], 0.0),
    ("name", "I think: bob!", ["BOB"], 1.0),
    ("first_digits", "key 042, not 7", ["042"], 1.0),
    ("first_digits", "key 7 042", ["042"], 0.0),
    ("first_number", "about 3.5 of 7", ["3.5"], 1.0),
    ("last_number", "it returns `-3`.", ["-3"], 1.0),
    ("number_sequence", "[1, 4, 9, 7]", ["1", "4", "8", "7"], 0.5),
    ("choice", "B. foo", ["foo", "B"], 1.0),
    ("choice", "I say the answer is: foo", ["foo", "B"], 1.0),
    ("choice", "the letter C", ["foo", "B"], 0.0),
    ("choice", "", ["foo", "B"], 0.0),
    ("choice_of_code", "B: it crashes", ["foo", "B"], 1.0),
    ("choice_of_code", "B it crashes", ["foo", "B"], 0.0),
    ("choice_of_code", "The correct answer is: Option foo", ["foo", "B"], 1.0),
    ("stated_choice", "**The correct answer is (C)**", ["C"], 1.0),
    ("stated_choice", "The correct answer is C, because", ["C"], 1.0),
    ("stated_choice", "C", ["C"], 0.0),
    ("contains", "{f3a2}", ["f3a2"], 1.0),
    ("character_f1_zh", "厦门大学。", ["厦门 大学"], 1.0),
]


@pytest.mark.parametrize(("name", "output", "references", "value"), PUBLISHED)
def test_values_are_those_of_the_benchmarks(name, output, references, value):
    metric = get_metric(name)
    for package in metric.packages:
        pytest.importorskip(package)
    assert metric.compute(output, references, CLASSES) == pytest.approx(value, abs=1e-12)


def test_every_metric_has_a_published_value():
    assert {case[0] for case in PUBLISHED} == set(METRICS) - {"rouge_l_sum"}


def test_rouge_of_infinitebench_takes_lines_as_sentences():
    pytest.importorskip("rouge_score")
    # Both lines are found, in another order: the summary's kind joins the lines, a plain longest sequence cannot.
    assert get_metric("rouge_l_sum").compute("b c\na d", ["a d\nb c"]) == 1.0


@given(st.sampled_from(sorted(METRICS)), st.text(max_size=40), st.text(min_size=1, max_size=20))
def test_scores_stay_between_0_and_1(name, output, reference):
    metric = METRICS[name]
    if metric.packages:
        return
    references = [reference] if name not in ("first_number", "number_sequence") else ["3", "4.5"]
    assert 0.0 <= metric.compute(output, references, [reference, "other"]) <= 1.0


def test_the_best_reference_counts():
    for name in ("qa_f1", "classification", "count", "code_similarity"):
        one, other = (
            METRICS[name].compute("12 cats", [reference], ["12 cats"]) for reference in ("12 cats", "dog")
        )
        assert METRICS[name].compute("12 cats", ["dog", "12 cats"], ["12 cats"]) == max(one, other)


def test_every_template_names_a_metric():
    for benchmark in ("longbench", "longbench_v2", "infinitebench", "scbench"):
        for task, template in load_templates(benchmark).items():
            assert template.metric in METRICS or task == "scbench_summary_with_needles", task
            assert template.prompt.count("{context}") == 1, task


def test_missing_packages_are_one_command(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"'rouge_l' needs .* pip install \"rankkv\[benchmarks\]\""
    ):
        get_metric("rouge_l").check_packages()
    with pytest.raises(UnknownNameError, match="did you mean 'qa_f1'"):
        get_metric("qa_f2")
