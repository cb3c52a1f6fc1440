"""The report in a real browser, its numbers against the rows, and what it makes of folders that hold other things."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from browser import open_page, read_complaints, require_chromium
from typer.testing import CliRunner

from rankkv.cli import app
from rankkv.errors import InputError
from rankkv.evaluation.results import read_rows, write_rows
from rankkv.report import build_page, collect_results, write_figures
from rankkv.report.tables import summarize_quality

RESULTS = Path(__file__).resolve().parents[2] / "results"
# What would be markup, a program, or the end of one, if any of it were taken for more than text.
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
        assert ask("return document.title") == "RankKV report"
        assert ask("return document.documentElement.scrollWidth <= innerWidth")
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
        (portrait, *_) = json.loads(ask("return document.getElementById('payload').textContent"))["portraits"]
        assert ask("return document.querySelector('[data-text]').textContent") == "".join(portrait["pieces"])
        before = ask("return document.querySelector('[data-fates]').textContent")
        ask(
            "const pick = document.querySelector('[data-pick=ratio]'); pick.selectedIndex = pick.options.length - 1;"
            "pick.dispatchEvent(new Event('change')); document.querySelector('[data-place=\"3\"]').click()"
        )
        after = ask("return document.querySelector('[data-fates]').textContent")
        assert before != after
        method = ask("return document.querySelector('[data-pick=method]').value")
        ratio = max(cell["ratio"] for cell in portrait["cells"])
        (cell,) = [one for one in portrait["cells"] if (one["method"], one["ratio"]) == (method, ratio)]
        assert f"{sum(share == 0 for share in cell['token_shares'])} by none" in after
        told = ask("return document.querySelector('[data-token]').textContent")
        assert f"kept in {cell['token_layers'][3]} of {len(portrait['layer_indices'])} layers" in told
        gone = ask("return document.querySelectorAll('[data-text] .gone').length")
        assert gone == sum(layers == 0 for layers in cell["token_layers"])

        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "light" if dark else "dark"}]},
        )
        assert ask("return getComputedStyle(document.body).backgroundColor") != paper
        assert read_complaints(browser) == []
        assert ask("return document.title") == "RankKV report"


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
    ("content", "message"),
    [
        (None, "is no folder"),
        ({}, "holds nothing to report"),
        ({"bench.json": "{"}, "cannot read"),
        ({"demo.json": "[]"}, "holds no object"),
    ],
)
def test_folders_without_results_are_named(tmp_path, content, message):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        collect_results(folder)


def test_rows_of_something_else_are_named(tmp_path):
    write_rows(tmp_path / "rows.parquet", [{"colour": "red"}])
    with pytest.raises(InputError, match="they lack label, method"):
        collect_results(tmp_path)
