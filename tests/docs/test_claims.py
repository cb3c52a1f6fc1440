"""Tests that measured figures of READMEs and pages stand in the records they name, and that records name their origin.

A block (paragraph, list or table, without code) that holds a measured figure also holds a comment that names where it
comes from: ``<!-- record: results/bench.json#heads, experiments/LOG.md#2026-11-26 -->``.  What follows ``#`` is a key
of the JSON file, or words of a heading of the log.  Figures that follow from definitions name the test or the code that
holds them: ``<!-- computed: tests/docs/test_memory_page.py -->``.  Tables between ``begin`` and ``end`` comments are
written from records, and other tests hold them to it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "README.zh-CN.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
PAGES += sorted(f"docs/recipes/{path.name}" for path in (ROOT / "docs" / "recipes").glob("*.md"))
RECORDS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "results").glob("*.json"))
#: Records whose program writes command and commit for each part.
PARTS = ("results/bench.json", "results/peers.json", "results/serving.json", "results/speed.json")

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
WRITTEN = re.compile(r"<!-- ([\w-]+):begin -->.*?<!-- \1:end -->", re.DOTALL)
SOURCE = re.compile(r"<!-- (record|computed): (.+?) -->", re.DOTALL)
#: What is no figure: code, links, marks, names with a version, papers.
NO_FIGURES = re.compile(
    r"`[^`]*`|\]\([^)]*\)|<[^>]*>|\barXiv:\S+|\b\d{4}\.\d{4,5}\b"
    r"|\b(?:Python|torch|transformers|kvpress|Ray|Llama|Qwen|Phi|CUDA|ERNIE|GLM)[\s-]\d[\d.]*"
    # The Chinese text counts the weights of the model in its own units.
    r"|1\.35 亿",
)
_NUMBER = r"(?<![\w.,/-])\d[\d,]*(?:\.\d+)?"
#: Shares, times, bytes, losses, counts out of a total, and fractions of two digits and more.
FIGURE = re.compile(
    rf"({_NUMBER})\s?(%|ms\b|s\b|MB\b|GB\b|GiB\b|GFLOP\b|hours?\b|minutes\b|seconds\b|nats\b)"
    rf"|(?<![\w.,/-])(\d+)(?= (?:of|out of) \d)|(?<![\w.,/-])(\d+\.\d\d+)(?![\w.])"
)
#: Shares of the cache that the experiments keep, and the width of intervals: settings, not measurements.
SETTINGS = {"0", "5", "10", "20", "30", "40", "50", "95", "100"}
#: Fractions that name a setting, such as a ratio.
FRACTIONS = {"0.05"}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def find_blocks(name):
    """Return the blocks of a page, without code and without tables that are written from records."""
    text = WRITTEN.sub("", FENCE.sub("", read(name)))
    blocks: list[str] = []
    for block in filter(str.strip, re.split(r"\n\s*\n", text)):
        if blocks and not SOURCE.sub("", block).strip():
            # Below a table a comment stands alone.
            blocks[-1] += f"\n{block}"
        else:
            blocks.append(block)
    return blocks


def find_figures(block):
    """Return the measured figures of a block: digits and unit."""
    figures = []
    for match in FIGURE.finditer(NO_FIGURES.sub(" ", SOURCE.sub(" ", block))):
        digits = next(part for part in (match[1], match[3], match[4]) if part).replace(",", "")
        unit = match[2] or ""
        if not (unit == "%" and digits in SETTINGS) and digits not in FRACTIONS:
            figures.append((digits, unit))
    return figures


def list_numbers(value):
    """Return all numbers of parsed JSON; those of texts too."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [float(value)]
    if isinstance(value, str):
        return [
            float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])(?:\d[\d,]*(?:\.\d+)?|\.\d+)", value)
        ]
    items = value.values() if isinstance(value, dict) else value
    return [number for item in items for number in list_numbers(item)]


def read_numbers(source):
    """Return the numbers of a record, or of the named part of it."""
    path, _, part = source.partition("#")
    text = read(path)
    if path.endswith(".json"):
        record = json.loads(text)
        for key in filter(None, part.split("/")):
            record = record[key]
        return list_numbers(record)
    if part:
        sections = re.split(r"^(?=##+ )", text, flags=re.MULTILINE)
        found = [section for section in sections if part in section.partition("\n")[0]]
        assert found, f"{path} has no heading with {part!r}"
        text = "\n".join(found)
    return list_numbers(text)


def is_held(digits, unit, numbers):
    """Return True if a number of the record rounds to the figure, in the figure's unit or as a fraction of one."""
    decimals = len(digits.partition(".")[2])
    scales = {"%": (1, 100), "ms": (1, 1000), "MB": (1, 1e-6), "GB": (1, 1e-9), "GiB": (1, 2**-30)}.get(
        unit, (1,)
    )
    if unit == "%":
        # "Takes 9 % longer" is a ratio of 1.09.
        numbers = [*numbers, *(number - 1 for number in numbers)]
    # Half a unit of the last digit, whichever way a half is rounded.
    near = 0.5001 * 10.0**-decimals
    return any(abs(number * scale - float(digits)) <= near for number in numbers for scale in scales)


@pytest.mark.parametrize("name", PAGES)
def test_measured_figures_stand_in_the_records_that_the_block_names(name):
    problems = []
    for block in find_blocks(name):
        figures = find_figures(block)
        sources = SOURCE.findall(block)
        start = " ".join(block.split())[:80]
        if figures and not sources:
            problems.append(f"{start!r} names no record for {figures}")
        numbers = []
        for kind, names in sources:
            for source in (part.strip() for part in names.split(",")):
                assert (ROOT / source.partition("#")[0]).is_file(), f"{name}: no file {source}"
                numbers += read_numbers(source) if kind == "record" else []
        if any(kind == "record" for kind, _ in sources):
            missing = [figure for figure in figures if not is_held(*figure, numbers)]
            problems += [f"{start!r}: {sources} hold no {missing}"] if missing else []
    assert not problems, f"{name}:\n" + "\n".join(problems)


def test_a_figure_without_a_record_is_found():
    """The rule itself, on sentences that must and must not pass."""
    assert find_figures("It takes 9 % to 13.5 % longer, 1.152 of the time, 34 of 60 codes, 178 s.") == [
        ("9", "%"), ("13.5", "%"), ("1.152", ""), ("34", ""), ("178", "s"),
    ]  # fmt: skip
    assert not find_figures(
        "With 10 % kept, transformers 5.24, `0.123`, arXiv:2404.14469, [page](a-0.55.md)."
    )
    assert is_held("11", "%", [0.108])
    assert is_held("0.108", "", [0.10812])
    assert not is_held("0.108", "", [0.1089])
    assert is_held("575", "MB", [574_924_032])


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_names_the_command_and_the_commit_that_made_it(name):
    record = json.loads(read(name))
    parts = list(record.values()) if name in PARTS else [record]
    for part in parts:
        places = [part, *(part.get(key) for key in ("machine", "versions", "environment"))]
        found = [place for place in places if isinstance(place, dict) and place.get("commit")]
        assert found, f"{name} names no commit"
        assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", found[0]["commit"])
        assert found[0].get("command"), f"{name} names no command"


def test_programs_write_command_and_commit():
    from rankkv.evaluation.results import _describe_command, describe_environment, describe_origin

    origin = describe_origin()
    assert origin["command"].split()[0] in ("python", "pytest", "python3")
    assert origin == {key: describe_environment()[key] for key in ("command", "commit")}
    where = str(ROOT)
    for words, told in (
        (
            ["/usr/bin/python3.11", "/opt/venv/bin/rankkv", "demo", "--tokens", "512"],
            "rankkv demo --tokens 512",
        ),
        (["/usr/bin/python3.11", "-m", "benchmarks"], "python -m benchmarks"),
        (
            [f"{where}/.venv/bin/python", f"{where}/tools/mutants.py", "--jobs", "1"],
            "python tools/mutants.py --jobs 1",
        ),
        (["python", "-m", "x", "/home/someone/texts/a.txt"], "python -m x a.txt"),
    ):
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(ROOT)
            assert _describe_command(words) == told


def test_the_arithmetic_of_the_performance_page():
    """By shape: 30 layers of 9 query and 3 kv heads of 64, hidden 576, 49,152 words."""
    layers, heads, dim, hidden, tokens, window = 30, 9, 64, 576, 2048, 32
    weights = 134_515_008
    words = 49_152 * hidden
    page = " ".join(read("docs/performance.md").split())

    def says(text):
        assert text in page, text

    step = 4 * weights
    says(f"| {step:,} |")
    kept, full = step + 46_080 * 800, step + 46_080 * 8_000
    says(f"{kept / 1e6:.0f} MB instead of {full / 1e6:.0f} MB: at best {kept / full:.2f} of the time")
    products = 2 * (weights - words) * tokens
    attention = layers * heads * 2 * 2 * dim * tokens**2 / 2
    says(f"{products / 1e9:.0f} GFLOP in the weights, {attention / 1e9:.0f} GFLOP in causal attention")
    scores = layers * heads * window * tokens * 2 * dim
    says(f"| attention of the window (32 queries) | {scores / 1e9:.1f} |")
    gram = layers * heads * window**2 * tokens * 2
    says(f"| Gram matrices in float64 | {gram / 1e9:.1f} |")
    says(f"attention of the 32 queries before it | {scores / 1e9:.1f} |")
    mixed = layers * heads * window * (tokens - window) * 2 * dim
    says(f"mixing values | {mixed / 1e9:.1f} |")
    from rankkv.limits import make_budget_grid

    # Budgets above the floor at 30 % kept, the largest one below it, and the whole output.
    tried = sum(budget > round(0.3 * tokens) // 2 for budget in make_budget_grid(tokens)) + 2
    projections = layers * tried * window * 2 * hidden**2
    says(f"output projections | {projections / 1e9:.1f} |")
    share = (2 * scores + gram + mixed + projections) / (products + attention)
    says(f"This is {share:.0%}".replace("%", " %"))
    from rankkv.cache.compressor import _RELEASE_SLACK

    says(f"one layer and {_RELEASE_SLACK:.0%} may".replace("%", " %"))


def test_the_reliability_page_tells_what_its_records_hold():
    page, log = read("docs/reliability.md"), read("experiments/LOG.md")
    summary = json.loads(read("results/mutants.json"))["summary"]
    noticed = {name: count.get("killed", 0) + count.get("timeout", 0) for name, count in summary.items()}
    whole = summary["all"]["mutants"]
    assert whole >= 120
    assert f"| {whole} | {noticed['all']} noticed, {whole - noticed['all']} not |" in page
    for name in set(summary) - {"all"}:
        assert f"| `{name}` | {summary[name]['mutants']} | {noticed[name]} |" in page
    _, _, damaged = page.partition("## Damaged files")
    rows = re.findall(r"^\| [\w ()]+ \| \d+ \| \d+ \|$", damaged.partition("## Mixed calls")[0], re.MULTILINE)
    assert len(rows) == 8
    assert all(row in log for row in rows)
    (calls,) = re.findall(r"\| (\d+) calls over (\d+) families \| no wrong answer", page)
    assert f"{calls[0]} calls over {calls[1]} families, 0 failures" in log
