"""The program that evicts while tokens are decoded: its traces, its two measures, and a run of it."""

from __future__ import annotations

import re

import decode_drift
import pytest
import torch
from allocation_ablation import main

from rankkv import RankKVCache
from rankkv.evaluation.results import read_rows


class Letters:
    """Tokenize text by its letters."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def traces():
    return [decode_drift.make_trace(Letters(), kind, 5, 400) for kind in decode_drift.WRITERS]


def read(trace):
    """Return a trace's text, and each answer with what stands before it."""
    text = "".join(map(chr, trace.ids))
    return text, [(text[:start], text[start:stop].strip()) for start, stop in trace.answers]


def test_the_answers_of_a_tracking_trace_are_where_each_thing_went_last(traces):
    _, answers = read(traces[0])
    assert len(answers) > 1
    for before, answer in answers:
        thing = before.split()[-4]
        assert re.findall(rf"The {thing} goes to the (\w+)\.", before)[-1] == answer


def test_the_answers_of_an_arithmetic_trace_are_the_last_value_and_the_sum(traces):
    _, answers = read(traces[1])
    assert len(answers) > 2
    for before, answer in answers:
        line = before.splitlines()[-1]
        if "=" in line:
            terms = re.search(r"(\d+) \+ (\d+) =$", line)
            assert int(terms[1]) + int(terms[2]) == int(answer)
        else:
            assert re.findall(rf"{line[0]} is (\d+)\.", before)[-1] == answer


def test_a_seed_makes_the_same_trace_of_the_length_asked_for(traces):
    again = [decode_drift.make_trace(Letters(), kind, 5, 400) for kind in decode_drift.WRITERS]
    assert traces == again
    assert all(len(trace.ids) == 400 for trace in traces)
    assert traces[0] != decode_drift.make_trace(Letters(), "tracking", 6, 400)


def test_nothing_evicted_drifts_nowhere_and_less_kept_drifts_more(tiny_llama, traces):
    model = tiny_llama()
    full = decode_drift.predict_all(model, traces)
    drift = []
    for budget in (500, 200, 40):
        cache = RankKVCache(model, budget=budget, strategy="uniform", head_budgets=None, decode="periodic")
        scores = decode_drift.score_method(decode_drift.decode(model, cache, traces), traces, full)
        drift.append(sum(divergence for divergence, _ in scores))
        assert max(cache.kept_lengths) <= budget + cache.config.decode_interval
    assert drift[0] == pytest.approx(0.0, abs=1e-5)
    assert drift[0] + 1e-4 < drift[1] < drift[2]


def test_the_measures_are_those_of_torch_and_of_the_answers_token_by_token(traces):
    torch.manual_seed(0)
    steps, rows = len(traces[0].ids), len(traces)
    predicted, known = torch.randn(2, steps, rows, 128).log_softmax(dim=-1)
    for number, trace in enumerate(traces):
        # Every other answer is the most likely one.
        for start, stop in trace.answers[::2]:
            for place in range(start, stop):
                predicted[place - 1, number, trace.ids[place]] = 9.0
    scores = decode_drift.score_method(iter(predicted), traces, list(known.transpose(0, 1)))
    for number, (trace, (drift, right)) in enumerate(zip(traces, scores, strict=True)):
        wanted = torch.nn.functional.kl_div(
            predicted[:, number], known[:, number], log_target=True, reduction="batchmean"
        )
        assert drift == pytest.approx(float(wanted), rel=1e-4)
        assert right == pytest.approx((len(trace.answers) + 1) // 2 / len(trace.answers))


@pytest.mark.parametrize(
    ("given", "fragment"), [(["--tokens", "9"], "at least 64"), (["--methods", "h2o whole"], "'h2o whole'")]
)
def test_wrong_arguments_are_one_sentence(given, fragment, capsys, tmp_path):
    given = [*given, "--output_dir", str(tmp_path / "out")]
    assert main(given, decode_drift.parse_arguments, decode_drift.run) == 2
    assert fragment in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_program_writes_a_row_a_trace_and_goes_on_where_it_stopped(
    tmp_path, capsys, tiny_llama, embedded
):
    pytest.importorskip("pyarrow")
    path = tmp_path / "model"
    tiny_llama(vocab_size=len(embedded[1])).save_pretrained(path)
    embedded[1].save_pretrained(path)
    given = [
        "--model", str(path), "--tokens", "96", "--samples", "1", "--budgets", "24", "--interval", "8",
        "--methods", "snapkv", "h2o default", "triattention", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(given, decode_drift.parse_arguments, decode_drift.run) == 0
    told = capsys.readouterr().out
    assert "### tracking" in told
    assert "| triattention | " in told
    part = tmp_path / "out" / "parts"
    times = {file.name: file.stat().st_mtime_ns for file in part.iterdir()}
    next(part.glob("snapkv*")).unlink()
    assert main(given, decode_drift.parse_arguments, decode_drift.run) == 0
    again = {file.name: file.stat().st_mtime_ns for file in part.iterdir()}
    assert {name for name in times if times[name] != again[name]} == {"snapkv-24.parquet"}
    assert capsys.readouterr().out == told
    rows = read_rows([tmp_path / "out" / "rows.parquet"])
    # Two traces of the full cache and of each method.
    assert len(rows) == 2 * 4
    assert all(row["divergence"] > 0 and row["kept_share"] < 0.4 for row in rows if row["method"] != "full")
