"""Both READMEs: their snippets run, their commands exist, their tables say what the code says."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from rankkv import RankKVCache, RankKVConfig
from rankkv.errors import UnsupportedModelError
from rankkv.rank_analysis import AGGREGATIONS, SCOPES

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("README.md", "README.zh-CN.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


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


def find_table(name, first_cells):
    """Return the one table whose first cells hold all of ``first_cells``."""
    matching = [table for table in find_tables(name) if set(first_cells) <= {row[0] for row in table}]
    assert len(matching) == 1, f"{name} needs exactly one table of {first_cells}, found {len(matching)}"
    return matching[0]


def code(text):
    return f"`{text}`"


def run_python(name):
    program = "\n".join(find_blocks(name, "python"))
    if Version(transformers.__version__) < Version("5.24"):
        # What the quick start says to do there.
        program = re.sub(r"\bcache=(cache|shared\.copy\(\))(?=[,)])", r"past_key_values=\1", program)
    namespace = {"__name__": "readme"}
    exec(compile(program, name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("name", NAMES)
def test_snippets_run(name, capsys):
    namespace = run_python(name)
    shown = capsys.readouterr().out
    assert shown.startswith(
        namespace["tokenizer"].decode(namespace["output"][0, namespace["context"].shape[1] :])
    )
    # The one left is the chunked prefill: the whole context seen, three tenths of it kept.
    cache, length = namespace["cache"], namespace["context"].shape[1]
    assert cache.seen_tokens == length
    assert sum(cache.kept_lengths) == sum(cache.budgets) == round(0.3 * length * len(cache.budgets))


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
    english, chinese = (FENCE.sub("", read(name)).splitlines() for name in NAMES)
    levels = [
        [len(line.split()[0]) for line in lines if re.match("#+ ", line)] for lines in (english, chinese)
    ]
    assert levels[0] == levels[1]
    assert [len(table) for table in find_tables(NAMES[0])] == [len(table) for table in find_tables(NAMES[1])]
    links = [re.findall(r"!?\[[^\]]*\]\(([^)]+)\)", read(name)) for name in NAMES]
    assert sorted(set(links[0]) - set(NAMES)) == sorted(set(links[1]) - set(NAMES))


def test_both_have_the_same_code():
    """Comments are translated; what runs is the same."""
    english, chinese = ([language for language, _ in FENCE.findall(read(name))] for name in NAMES)
    assert english == chinese
    programs = [[ast.dump(ast.parse(block)) for block in find_blocks(name, "python")] for name in NAMES]
    assert programs[0] == programs[1]
    assert find_commands(NAMES[0]) == find_commands(NAMES[1])


def test_both_print_the_same_numbers():
    """In tables of measurements; the words beside them are translated."""
    numeric = re.compile(r"^[\d.,%$/ -]+$")
    rows = [
        [[cell for cell in row[1:] if numeric.match(cell)] for table in find_tables(name) for row in table]
        for name in NAMES
    ]
    assert rows[0] == rows[1]
    assert sum(len(row) for row in rows[0]) > 70


def test_without_make_does_what_make_does():
    makefile = read("Makefile")
    variables = dict(re.findall(r"^(\w+) [:?]= (.+)$", makefile, re.MULTILINE))

    def expand(line):
        while "$(" in line:
            line = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], line)
        return shlex.split(line)

    recipes = [line.strip().lstrip("@") for line in makefile.splitlines() if line.startswith("\t")]
    wanted = [
        expand(line) for line in recipes if re.match(r"\$\(BIN\)/(python -m (pip|pytest -m)|rankkv)", line)
    ]
    commands = find_commands(NAMES[0])
    assert ["python3", "-m", "venv", ".venv"] in commands
    assert [words for words in commands if words[0].startswith(".venv/")] == wanted


def test_commands_exist():
    import typer

    from rankkv.cli import app

    spec = importlib.util.spec_from_file_location(
        "rank_analysis_exp", ROOT / "experiments/rank_analysis_exp.py"
    )
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    group = typer.main.get_command(app)
    seen = set()
    for words in find_commands(NAMES[0]):
        program, rest = Path(words[0]).name, words[1:]
        seen.add(program)
        if program == "make":
            assert set(rest) <= targets
        elif program == "rankkv":
            # Parses the options with their types, and runs nothing.
            context = group.commands[rest[0]].make_context(rest[0], rest[1:])
            files = context.params.get("prompt_file") or []
            for path in files if isinstance(files, list) else [files]:
                assert (ROOT / path).is_file()
        elif rest[0].endswith(".py"):
            assert (ROOT / rest[0]).is_file()
            experiment.parse_arguments(rest[1:])
        else:
            assert rest[:2] in (["-m", "pip"], ["-m", "pytest"], ["-m", "venv"])
    assert seen == {"make", "rankkv", "python", "python3"}


@pytest.mark.parametrize("name", NAMES)
def test_options_are_those_of_the_config(name):
    rows = find_table(name, ["`compression_ratio`", "`window_size`"])
    fields = [(field.name, field.default) for field in dataclasses.fields(RankKVConfig)]
    assert [(row[0], row[1]) for row in rows] == [(code(field), code(repr(value))) for field, value in fields]
    parameters = inspect.signature(RankKVCache).parameters
    assert [(field, parameters[field].default) for field, _ in fields] == fields
    assert re.findall(r"`(\w+)`", rows[[row[0] for row in rows].index("`aggregation`")][2]) == list(
        AGGREGATIONS
    )
    assert [re.match(r'`"(\w+)"`', row[0])[1] for row in find_table(name, ['`"full"`'])] == list(SCOPES)


def find_tree(name):
    """Return the paths of the annotated tree, folders with a slash at the end."""
    (block,) = [block for block in find_blocks(name, "text") if block.startswith("rankkv/\n")]
    paths, folders = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = []
        for word in line.split():
            if not re.fullmatch(r"\.?[A-Za-z_][\w.-]*/|\w[\w-]*\.\w+|Makefile|LICENSE", word):
                break
            names.append(word)
        assert names, f"no path in the tree's line {line!r}"
        del folders[depth:]
        paths += ["".join(folders) + word for word in names]
        folders.append(names[0])
    return paths


@pytest.mark.parametrize("name", NAMES)
def test_tree_is_the_repository(name):
    paths = find_tree(name)
    assert len(paths) == len(set(paths))
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    there = {
        str(path.relative_to(ROOT))
        for folder in ("rankkv", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert there <= set(paths), f"not in the tree of {name}: {sorted(there - set(paths))}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", read(name)):
        if not target.startswith("https://"):
            assert (ROOT / target).is_file(), target


def read_committed(path):
    """Return a file as committed: a user's own demo must not fail the tests."""
    try:
        done = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{path} is not under version control here")
    return done.stdout.decode()


@pytest.mark.parametrize("name", NAMES)
def test_demo_table_is_the_demo_record(name):
    record = json.loads(read_committed("results/demo.json"))
    (rows,) = [table for table in find_tables(name) if table[-1][0] == "RankKV"]
    for row, run in zip(rows, record["runs"], strict=True):
        assert row[1:4] == [
            f"{run['cache_bytes']:,}",
            f"{run['ttft_seconds']:.1f}",
            f"{1e3 * run['tpot_seconds']:.0f}",
        ]
        assert (row[4] in ("yes", "是")) == run["has_fact"]
        assert row[5] == " ".join(run["answer"].split())
    load = record["machine"].get("load_average_at_start")
    was_busy = load is None or load > 0.75 * record["machine"]["cpus"]
    assert was_busy == (("do not compare the times" in read(name)) or ("时间不可比较" in read(name)))
    assert f"{record['document']['tokens']:,}" in read(name)
    assert f"{record['runs'][0]['prompt_tokens']:,}" in read(name)


@pytest.mark.parametrize("family", ["Falcon", "Bloom", "Mpt", "T5"])
def test_models_said_to_be_refused_are(family):
    assert family.upper() in read(NAMES[0]).upper() or family == "T5"
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    if family == "Mpt":
        sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4}
    if family == "T5":
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = getattr(transformers, f"{family}Config")(**sizes)
    kind = transformers.AutoModelForSeq2SeqLM if family == "T5" else transformers.AutoModelForCausalLM
    with pytest.raises(UnsupportedModelError):
        RankKVCache(kind.from_config(config))


@pytest.mark.parametrize("name", NAMES)
def test_parity_table_is_the_committed_record(name):
    record = json.loads(read_committed("results/parity.json"))
    counts = [record["total"][key] for key in ("sets", "equal", "tie", "stated", "different")]
    assert [str(count) for count in counts] in [row for table in find_tables(name) for row in table]
    assert record["total"] == {
        key: sum(method[key] for method in record["methods"].values()) for key in record["total"]
    }


@pytest.mark.parametrize("name", NAMES)
def test_ablation_tables_are_the_committed_summary(name):
    summary = (ROOT / "results" / "ablation" / "summary.md").read_text(encoding="utf-8")
    for selector in ("snapkv", "h2o"):
        table = re.search(rf"^### {selector}, all texts .*?\n\n(.*?)\n\n", summary, re.MULTILINE | re.DOTALL)[
            1
        ]
        for line in table.splitlines()[2:]:
            assert line in read(name)
