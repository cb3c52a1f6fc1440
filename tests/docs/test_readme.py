"""Tests of both READMEs: short, in step, with snippets that print what is shown, and figures from the records."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import make_record_tables
import pytest
import structure
import transformers
from packaging.version import Version

from rankkv import RankKVCache
from rankkv.errors import UnsupportedModelError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("README.md", "README.zh-CN.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def find_blocks(name, language):
    return [code for found, code in FENCE.findall(read(name)) if found == language]


def find_commands(name):
    lines = "".join(find_blocks(name, "bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def find_tables(name):
    """Return each table as its body's rows of cells, in the order of the file."""
    tables, rows = [], []
    for line in [*FENCE.sub("", read(name)).splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            tables.append(rows[2:])
            rows = []
    return tables


def find_headings(text):
    return [line for line in FENCE.sub("", text).splitlines() if re.match("#+ ", line)]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short(name):
    """A new feature gets a row or a sentence here; its tables go to docs/."""
    data = (ROOT / name).read_bytes()
    assert data.count(b"\n") <= structure.README_LINES == 250
    assert len(data) <= structure.README_BYTES == 18_000


def test_it_has_its_parts():
    headings = [line.lstrip("# ") for line in find_headings(read(NAMES[0]))]
    assert headings == [
        "RankKV",
        "Install",
        "Quick start",
        "One context, many questions",
        "Pipeline, batch, streaming",
        "How to choose",
        "What an 8B model needs",
        "Command line",
        "How it works",
        "Supported models",
        "Questions",
        "Sources, citation, licence",
    ]
    choosing = next(table for table in find_tables(NAMES[0]) if table[0][0] == "do not know the ratio?")
    assert len(choosing) == 10
    assert len([words for words in find_commands(NAMES[0]) if words[0] == "rankkv"]) == 7
    assert read(NAMES[0]).count("<details>") == read(NAMES[0]).count("</details>") == 8
    assert len(re.findall(r"^\d+\. ", read(NAMES[0]), re.MULTILINE)) == 12


def run_python(name, model_folder):
    """Run all blocks of a README as one program; the weights come from the packaged copy instead of the hub."""
    program = "\n".join(find_blocks(name, "python"))
    assert program.count(HUB_NAME) == 1
    program = program.replace(HUB_NAME, str(model_folder))
    if Version(transformers.__version__) < Version("5.24"):
        # What the quick start says to do there.
        program = re.sub(r"\bcache=(?=\w)", "past_key_values=", program)
    namespace = {"__name__": "readme"}
    exec(compile(program, name, "exec"), namespace)
    from rankkv.integrations.pipeline import unregister

    unregister()
    return namespace


@pytest.mark.parametrize("name", NAMES)
def test_snippets_run_and_print_what_is_shown(name, capsys):
    from rankkv.models import embedded

    folder = embedded.ensure_embedded()
    namespace = run_python(name, folder)
    shown = capsys.readouterr().out
    cache, length = namespace["cache"], namespace["inputs"].input_ids.shape[1]
    assert cache.seen_tokens >= length
    assert sum(cache.budgets) == round(0.3 * length * len(cache.budgets))
    if (sys.version_info[:2], transformers.__version__) != ((3, 11), "5.24.0"):
        pytest.skip("the document is Python's own manual, and the shown output that of Python 3.11")
    for block in find_blocks(name, "text"):
        for line in block.splitlines():
            assert line in shown, line


def test_the_line_for_older_transformers_works(embedded):
    """Where ``cache`` is the argument's name, the old one must still do the same."""
    model, tokenizer = embedded
    inputs = tokenizer("One, two, three, four, five, six, seven," * 20, return_tensors="pt")
    old, cache = RankKVCache(model), RankKVCache(model)
    first = model.generate(**inputs, past_key_values=old, max_new_tokens=4, do_sample=False)
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("this transformers takes past_key_values only")
    assert first.equal(model.generate(**inputs, cache=cache, max_new_tokens=4, do_sample=False))
    assert old.kept_lengths == cache.kept_lengths


def test_both_have_the_same_structure():
    texts = [read(name) for name in NAMES]
    levels = [[line.split()[0] for line in find_headings(text)] for text in texts]
    assert levels[0] == levels[1]
    shapes = [[[len(row) for row in table] for table in find_tables(name)] for name in NAMES]
    assert shapes[0] == shapes[1]
    counts = [
        [text.count(mark) for mark in ("<details>", "<picture>", "\n- ", "\n1. ", "\n12. ")] for text in texts
    ]
    assert counts[0] == counts[1]
    links = [re.findall(r'(?:\]\(|src(?:set)?=")([^)"]+)[)"]', text) for text in texts]
    assert [link for link in links[0] if link not in NAMES] == [
        link for link in links[1] if link not in NAMES
    ]


def test_both_have_the_same_code():
    """Comments are translated; what runs and what is printed is the same."""
    english, chinese = ([language for language, _ in FENCE.findall(read(name))] for name in NAMES)
    assert english == chinese
    programs = [[ast.dump(ast.parse(block)) for block in find_blocks(name, "python")] for name in NAMES]
    assert programs[0] == programs[1]
    assert find_blocks(NAMES[0], "text") == find_blocks(NAMES[1], "text")
    assert find_blocks(NAMES[0], "bibtex") == find_blocks(NAMES[1], "bibtex")
    assert find_commands(NAMES[0]) == find_commands(NAMES[1])


def test_both_have_the_same_numbers():
    """Paragraph by paragraph, in prose and tables; words of number and their order may differ."""

    def find_numbers(name):
        text = re.sub(r"\]\([^)]*\)|<!--.*?-->", " ", FENCE.sub("", read(name)))
        # The Chinese text counts the weights in its own units.
        text = text.replace("1.35 亿", "135M")
        return sorted(re.findall(r"(?<![\w.])\d[\d.,]*\d|(?<![\w.,])\d(?![\w.,])", text))

    english, chinese = (find_numbers(name) for name in NAMES)
    assert english == chinese
    assert len(english) > 80


@pytest.mark.parametrize("name", NAMES)
def test_measured_table_is_that_of_the_records(name):
    text, made = make_record_tables.make_page(name)
    assert text == made, "run python tools/make_record_tables.py"


@pytest.mark.parametrize("name", NAMES)
def test_figures_in_prose_are_those_of_the_records(name):
    """The share that does what uniform budgets do with 20 %, from the rows themselves, and the needles found."""
    from rankkv.evaluation.statistics import compute_iso_quality_ratio

    words = read(name)
    for folder, tokens in (("ablation", "1,024"), ("ablation_long", "3,072"), ("ablation_4096", "4,096")):
        rows = [row for row in make_record_tables.read_rows(folder) if row["selector"] == "snapkv"]
        ratios = sorted({row["ratio"] for row in rows})
        texts = sorted({row["text"] for row in rows})
        excess = {(row["strategy"], row["text"], row["ratio"]): row["excess"] for row in rows}
        default = {ratio: [excess["default", text, ratio] for text in texts] for ratio in ratios}
        share = compute_iso_quality_ratio(default, [excess["uniform", text, 0.2] for text in texts])
        percent = f"{share.mean:.0%}".replace("%", " %")
        assert re.search(rf"{percent}[^。.]*?{tokens}|{tokens}[^。.]*?{percent}", words), (folder, share)
    found = {0.1: 0, 0.2: 0}
    for row in make_record_tables.read_rows("needle"):
        if row["strategy"] == "RankKV":
            found[row["ratio"]] += row["found"]
    assert re.search(rf"\b{found[0.1]}\b.*?\b{found[0.2]}\b", words, re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_memory_of_an_8b_model(name):
    """The table follows from the shape that the text names."""
    rows = [row for table in find_tables(name) for row in table if row[-1].endswith("GiB")]
    assert [re.search(r"[\d,]+(?=\W*$)", row[0])[0] for row in rows] == ["8,192", "32,768", "131,072"]
    for row, tokens in zip(rows, (8_192, 32_768, 131_072), strict=True):
        full = 2 * 32 * 8 * 128 * 2 * tokens / 2**30
        assert row[1:] == [f"{share * full:.1f} GiB" for share in (1, 0.3, 0.1)]


def test_contributing_without_make_does_what_make_does():
    makefile = read("Makefile")
    variables = dict(re.findall(r"^(\w+) [:?]= (.+)$", makefile, re.MULTILINE))

    def expand(line):
        while "$(" in line:
            line = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], line)
        return shlex.split(line)

    recipes = [line.strip().lstrip("@") for line in makefile.splitlines() if line.startswith("\t")]
    wanted = [expand(line) for line in recipes if re.match(r"\$\(BIN\)/python -m (pip|pytest -m)", line)]
    commands = find_commands("CONTRIBUTING.md")
    assert ["python3", "-m", "venv", ".venv"] in commands
    assert [words for words in commands if words[0] == ".venv/bin/python"] == wanted
    assert "(CONTRIBUTING.md#without-make)" in read(NAMES[0])
    assert "### Without make" in read("CONTRIBUTING.md")


def test_commands_exist():
    import typer

    from rankkv.cli import app

    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    group = typer.main.get_command(app)
    seen = set()
    for words in find_commands(NAMES[0]):
        program, rest = words[0], words[1:]
        seen.add(program)
        if program == "make":
            assert set(rest) <= targets
        elif program == "rankkv":
            # Parses the options with their types, and runs nothing.
            context = group.commands[rest[0]].make_context(rest[0], rest[1:])
            files = context.params.get("prompt_file") or []
            for path in files if isinstance(files, list) else [files]:
                assert (ROOT / path).is_file()
        else:
            assert [program, *rest[:1]] == ["pip", "install"]
    assert seen == {"make", "pip", "rankkv"}


@pytest.mark.slow
def test_the_question_on_the_command_line_is_answered(capfd, monkeypatch):
    """The text has the number, and the small model gives it back from a compressed cache."""
    from rankkv.cli import main

    (words,) = [words for words in find_commands(NAMES[0]) if words[:2] == ["rankkv", "generate"]]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    with contextlib.suppress(SystemExit):
        main()
    assert "131,072 bytes per token" in capfd.readouterr().out


def find_tree(name):
    """Return the paths of the annotated tree, folders with a slash at the end."""
    (block,) = [block for block in find_blocks(name, "text") if block.startswith("rankkv/\n")]
    paths, folders = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = []
        for word in line.split():
            if not re.fullmatch(
                r"\.?[A-Za-z_][\w.-]*/|\w[\w.-]*\.\w+|\.\w+|Makefile|LICENSE|Dockerfile", word
            ):
                break
            names.append(word)
        assert names, f"no path in the tree's line {line!r}"
        del folders[depth:]
        paths += ["".join(folders) + word for word in names]
        folders.append(names[0])
    return paths


def test_the_tree_of_contributing_is_the_repository():
    paths = find_tree("CONTRIBUTING.md")
    assert len(paths) == len(set(paths))
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    there = {
        str(path.relative_to(ROOT))
        for folder in ("rankkv", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert there <= set(paths), f"not in the tree: {sorted(there - set(paths))}"


@pytest.mark.parametrize("name", [*NAMES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r'(?:\]\(|src(?:set)?=")([^)"]+)[)"]', FENCE.sub("", read(name))):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            assert (ROOT / path).is_file(), target
            if anchor:
                headings = {
                    re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                    for line in find_headings(read(path))
                }
                assert anchor in headings, target


@pytest.mark.parametrize("family", ["Falcon", "Bloom", "Mpt", "T5"])
def test_models_said_to_be_refused_are(family):
    assert family.upper() in read("docs/models.md").upper() or family == "T5"
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    if family == "Mpt":
        sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4}
    if family == "T5":
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = getattr(transformers, f"{family}Config")(**sizes)
    kind = transformers.AutoModelForSeq2SeqLM if family == "T5" else transformers.AutoModelForCausalLM
    with pytest.raises(UnsupportedModelError):
        RankKVCache(kind.from_config(config))


def test_the_experiment_parses_the_documented_arguments():
    spec = importlib.util.spec_from_file_location(
        "rank_analysis_exp", ROOT / "experiments" / "rank_analysis_exp.py"
    )
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    (line,) = [line for line in find_commands("docs/analysis.md") if line[0] == "python"]
    assert (ROOT / line[1]).is_file()
    experiment.parse_arguments(line[2:])


def test_parity_totals_are_the_sums_of_the_methods():
    record = json.loads(read("results/parity.json"))
    assert record["total"] == {
        key: sum(method[key] for method in record["methods"].values()) for key in record["total"]
    }
