"""Tests of the report: in a real browser, its numbers against the rows, and damaged or doubled input."""

from __future__ import annotations

import json
import re
import shutil
from datetime import date
from pathlib import Path
from statistics import fmean

import pytest
from browser import open_page, read_complaints, require_chromium
from typer.testing import CliRunner

from rankkv.cli import app
from rankkv.errors import InputError
from rankkv.evaluation.results import read_rows, write_rows
from rankkv.report import build_page, collect_results, write_figures
from rankkv.report.page import describe_task
from rankkv.report.speed import judge_target, summarize_speed
from rankkv.report.tables import summarize_quality

RESULTS = Path(__file__).resolve().parents[2] / "results"
# Markup and a program, which must stay text.
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of the shipped sweep and benchmarks, with hostile text among its prompts and names."""
    folder = tmp_path_factory.mktemp("report") / "sweep"
    shutil.copytree(RESULTS / "sweep", folder)
    for path in (folder / "portraits").glob("*.parquet"):
        rows = read_rows([path])
        for row in rows:
            row["pieces"][3] = HOSTILE
        write_rows(path, rows)
    rows = read_rows([folder / "rows.parquet"])
    write_rows(folder / "rows.parquet", [{**row, "label": f"{row['label']} {HOSTILE}"} for row in rows])
    result = CliRunner().invoke(
        app,
        [
            "report",
            str(folder),
            "--bench",
            str(RESULTS / "bench.json"),
            "--figures",
            str(folder / "f"),
            "--json",
        ],
    )
    assert result.exit_code == 0, result.stderr
    written = [Path(path) for path in json.loads(result.stdout)["written"]]
    assert all(path.stat().st_size > 1000 for path in written)
    assert {path.suffix for path in written} == {".html", ".png", ".pdf"}
    return written[0]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop", "phone at night"])
def test_the_page_in_a_browser(page, width, dark):
    require_chromium()
    with open_page(page, width=width, dark=dark) as browser:
        ask = browser.execute_script
        assert read_complaints(browser) == []
        assert ask("return document.title").startswith("RankKV report: continuation")
        assert ask("return document.documentElement.scrollWidth <= innerWidth")
        # Only what scrolls in a box of its own is wider than the page.
        assert ask(
            "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, svg')"
            " && e.getBoundingClientRect().right > innerWidth + 1).length"
        ) == 0  # fmt: skip
        top = ask("return document.querySelector('header').innerText")
        assert date.today().isoformat() in top
        assert "SnapKV + RankKV (default)" in top
        assert "paired difference" in top
        assert ask("return performance.getEntriesByType('resource').length") == 0
        charts = ask(
            "return [...document.querySelectorAll('[data-chart]')].map(e => [e.dataset.chart,"
            " !!e.querySelector('.main-svg'), e.getBoundingClientRect().right])"
        )
        assert [name for name, *_ in charts] == [
            "task", "task", "ranks", "budgets", "stretches", "head-ranks", "head-kept", "times", "sizes",
        ]  # fmt: skip
        assert all(drawn and right <= width for _, drawn, right in charts)
        paper = ask("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == dark

        # The text is the prompt, token by token, each as dark as the record says.
        (kept, *_) = json.loads(ask("return document.getElementById('payload').textContent"))["maps"]
        assert ask("return document.querySelector('[data-text]').textContent") == "".join(kept["tokens"])
        before = ask("return document.querySelector('[data-fates]').textContent")
        ask(
            "const pick = document.querySelector('[data-pick=ratio]'); pick.selectedIndex = pick.options.length - 1;"
            "pick.dispatchEvent(new Event('change')); document.querySelector('[data-place=\"3\"]').click()"
        )
        after = ask("return document.querySelector('[data-fates]').textContent")
        assert before != after
        method = ask("return document.querySelector('[data-pick=method]').value")
        ratio = max(one["ratio"] for one in kept["settings"])
        (setting,) = [one for one in kept["settings"] if (one["method"], one["ratio"]) == (method, ratio)]
        assert f"{sum(share == 0 for share in setting['token_shares'])} by none" in after
        told = ask("return document.querySelector('[data-token]').textContent")
        assert f"kept in {setting['token_layers'][3]} of {len(kept['layer_indices'])} layers" in told
        gone = ask("return document.querySelectorAll('[data-text] .gone').length")
        assert gone == sum(layers == 0 for layers in setting["token_layers"])

        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "light" if dark else "dark"}]},
        )
        assert ask("return getComputedStyle(document.body).backgroundColor") != paper
        assert read_complaints(browser) == []
        assert ask("return document.title").startswith("RankKV report: continuation")


def test_the_page_asks_no_network_for_anything(page):
    content = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in content
    markup = re.sub(r"<script.*?</script>", "", content, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", markup)
    assert "{{ 7 * 7 }}" in content


def test_numbers_are_those_of_the_rows():
    data = collect_results(RESULTS / "sweep")
    content = build_page(data)
    for task in summarize_quality(data.rows):
        rows = [row for row in data.rows if row["label"] == task.label]
        full = {row["sample"]: row["score"] for row in rows if row["method"] == "full"}
        for method, points in task.curves.items():
            for point in points:
                own = {
                    row["sample"]: row["score"]
                    for row in rows
                    if (row["method"], row["ratio"]) == (method, point.ratio)
                }
                assert point.found.score.mean == pytest.approx(fmean(own.values()))
                paired = fmean(score - full[sample] for sample, score in own.items())
                assert point.found.to_full.mean == pytest.approx(paired)
                assert f"{paired:+.3f} [" in content
                uniform = point.found.to_uniform
                assert (uniform is None) == method.endswith("uniform")


def test_an_unfinished_sweep_is_shown_and_said_to_be(tmp_path):
    rows = read_rows([RESULTS / "sweep" / "rows.parquet"])
    first = [row for row in rows if row["sample"] == rows[0]["sample"]]
    write_rows(tmp_path / "parts" / "one.parquet", first)
    assert "This sweep is not finished" in build_page(collect_results(tmp_path))
    assert "This sweep is not finished" not in build_page(collect_results(RESULTS / "sweep"))


def test_rows_of_rankkv_eval_are_read_too(tmp_path):
    def rename(row):
        setting = row["setting"]
        if row["selector"]:
            setting = f"{row['selector']}|{row['allocation']}|{row['ratio']:g}"
        own = {
            key: row[key]
            for key in row
            if key not in ("model", "label", "method", "ratio", "allocation", "selector")
        }
        return {**own, "setting": setting}

    shipped = collect_results(RESULTS / "sweep").rows
    write_rows(tmp_path / "rows.parquet", map(rename, shipped))
    expected, found = summarize_quality(shipped), summarize_quality(collect_results(tmp_path).rows)

    def read(task):
        return {
            name: [(point.ratio, point.found.score, point.found.to_uniform) for point in points]
            for name, points in task.curves.items()
        }

    assert [read(task) for task in found] == [read(task) for task in expected]


def test_scores_that_say_nothing_are_doubted(tmp_path):
    rows = [row for row in read_rows([RESULTS / "sweep" / "rows.parquet"]) if row["metric"] == "recall"]
    write_rows(
        tmp_path / "rows.parquet", [{**row, "score": 0.5, "answer_loss": 1.0, "output": ""} for row in rows]
    )
    (task,) = summarize_quality(collect_results(tmp_path).rows)
    assert any("cannot tell a good cache from a bad one" in doubt for doubt in task.doubts)
    assert any("the same output and likelihood on every sample" in doubt for doubt in task.doubts)


@pytest.mark.parametrize("part", ["ablation", "bench.json", "demo.json", "portraits"])
def test_any_part_makes_a_report(part, tmp_path):
    if part == "ablation":
        folder = RESULTS / "ablation"
    else:
        folder = tmp_path / "results"
        folder.mkdir()
        if part == "portraits":
            shutil.copytree(RESULTS / "sweep" / "portraits", folder / "portraits")
        else:
            shutil.copy(RESULTS / part, folder)
    data = collect_results(folder)
    content = build_page(data)
    sections = set(re.findall(r'<section id="(\w+)"', content))
    assert sections == {
        "ablation": {"quality", "numbers", "manifest"},
        "bench.json": {"speed"},
        "demo.json": {"speed"},
        "portraits": {"kept"},
    }[part]  # fmt: skip
    assert bool(write_figures(data, tmp_path / "figures")) == (part in ("ablation", "portraits"))


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ("demo.json", "lost with uniform SnapKV"),
        ("bench.json", "no verdict"),
        ("ablation/rows.parquet", "RankKV (with profile)"),
    ],
)
def test_a_single_record_makes_a_report(record, told, tmp_path):
    name = Path(record).name
    shutil.copy(RESULTS / record, tmp_path / name)
    result = CliRunner().invoke(app, ["report", str(tmp_path / name), "--json"])
    assert result.exit_code == 0, result.stderr
    page = Path(json.loads(result.stdout)["written"][0])
    assert page == (tmp_path / name).with_suffix(".html")
    assert told in re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_doubled_rows_count_once_and_are_told(tmp_path):
    rows = read_rows([RESULTS / "sweep" / "rows.parquet"])
    write_rows(tmp_path / "rows.parquet", [*rows, *({**row, "unit_seconds": 1.0} for row in rows[:5])])
    data = collect_results(tmp_path)
    assert data.rows == collect_results(RESULTS / "sweep").rows
    assert any(note.startswith("5 of the rows are there twice") for note in data.notes)
    assert "5 of the rows are there twice" in build_page(data)


def test_two_results_of_one_sample_are_refused(tmp_path):
    rows = read_rows([RESULTS / "sweep" / "rows.parquet"])
    write_rows(tmp_path / "rows.parquet", [*rows, {**rows[0], "score": rows[0]["score"] + 1.0}])
    with pytest.raises(InputError, match="two different results of sample '768-000' with 'full'"):
        collect_results(tmp_path)


def test_takeaway_follows_from_the_rows():
    tasks = {task.label: task for task in summarize_quality(collect_results(RESULTS / "ablation").rows)}
    named = {name: name for name in tasks["essays"].curves} | {
        "snapkv + default": "SnapKV + RankKV (default)"
    }
    told = describe_task(tasks["essays"], named)
    rows = [row for row in read_rows([RESULTS / "ablation" / "rows.parquet"]) if row["kind"] == "essays"]
    own, uniform = (
        fmean(
            row["excess"]
            for row in rows
            if (row["selector"], row["strategy"], row["ratio"]) == ("snapkv", strategy, 0.05)
        )
        for strategy in ("default", "uniform")
    )
    assert (
        f"loses {own:.3f} nats per token to the full cache, snapkv + uniform {uniform:.3f}. It is better"
        in told
    )
    assert f"{own - uniform:+.3f}" in told


def test_no_verdict_without_an_interval_of_several_pairs():
    bench = json.loads((RESULTS / "bench.json").read_text(encoding="utf-8"))
    targets = summarize_speed(bench, {})["targets"]
    assert all("verdict" in row for row in targets)
    for row in targets:
        if row["low"] is None or row["low"] == row["high"] or "4,096 tokens" in row["what"]:
            assert row["verdict"].startswith("no verdict")
    row = {"what": "steps", "target": ">= 3", "low": 2.0, "high": 2.5}
    assert judge_target(row, {}) == "not met"
    assert judge_target({**row, "high": 3.5}, {}) == "open: the interval holds the target"
    assert judge_target({**row, "low": 3.0, "high": 3.5}, {}) == "met"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no folder and no file"),
        ({"parts/one.parquet": ""}, "one.parquet' as Parquet"),
        ({"bench.json": "[" * 100_000}, "nested too deeply"),
        ({}, "holds nothing to report"),
        ({"bench.json": "{"}, "damaged or not JSON"),
        ({"demo.json": "[]"}, "holds no object"),
    ],
)
def test_folders_without_results_are_named(tmp_path, content, message):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        collect_results(folder)


def test_a_record_of_something_else_is_named(tmp_path):
    (tmp_path / "families.json").write_text('{"families": []}')
    with pytest.raises(InputError, match="is not a record that a report shows"):
        collect_results(tmp_path / "families.json")


def test_rows_of_something_else_are_named(tmp_path):
    write_rows(tmp_path / "rows.parquet", [{"colour": "red"}])
    with pytest.raises(InputError, match="they lack label, method"):
        collect_results(tmp_path)
