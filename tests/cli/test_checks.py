"""Tests that a wrong word on the command line is answered before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import make_known_names
import pytest
from typer.testing import CliRunner

from rankkv.cli import app

HEAVY = {"torch", "transformers"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, and say on stderr which heavy packages it imported."""
    program = (
        "import sys\nfrom rankkv.cli import main\nsys.argv = ['rankkv', *sys.argv[1:]]\n"
        "try:\n    main()\nfinally:\n"
        "    print('IMPORTED', *({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("generate", "--prompt", "x", "--selector", "snapvk"), "did you mean 'snapkv'"),
        (("generate", "--prompt", "x", "--strategy", "pyramids"), "did you mean 'pyramid'"),
        (
            ("generate", "--prompt", "x", "--selector-option", "poolng=avg"),
            "selector 'snapkv' has no option 'poolng'",
        ),
        (("generate", "--prompt", "x", "--compression-ratio", "1.5"), "outside (0, 1]"),
        (("generate", "--prompt", "x", "--decode", "grown"), "did you mean 'grow'"),
        (("generate", "--prompt", "x", "--storage", "int4"), "unknown storage 'int4'"),
        (("generate", "--prompt", "x", "--head-budgets", "head"), "unknown head_budgets 'head'"),
        (("generate", "--prompt", "x", "--protect", "5-9"), "start:stop"),
        (("generate", "--prompt", "x", "--device-map", "gpu"), "'gpu' is not a device"),
        (("generate", "--prompt", "x", "--dtype", "float23"), "did you mean 'float32'"),
        (("generate", "--prompt", "x", "--model", "./nowhere"), "no model at './nowhere'"),
        (("analyze", "--prompt", "x", "--aggregation", "means"), "did you mean 'mean'"),
        (("analyze", "--prompt", "x", "--scope", "all"), "unknown scope 'all'"),
        (("eval", "--selectors", "h20"), "did you mean 'h2o'"),
        (("eval", "--strategies", "nope"), "unknown strategy 'nope'"),
        (("eval", "--ratios", "2"), "outside (0, 1]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_word_is_answered_without_torch(arguments, fragment):
    done = run(*arguments)
    assert done.returncode == 2
    message, _, imported = done.stderr.partition("IMPORTED")
    assert fragment in message
    assert "Traceback" not in message
    assert not HEAVY & set(imported.split())


@pytest.mark.parametrize("arguments", [("methods",), ("methods", "--json"), ("eval", "--list"), ("--help",)])
def test_lists_go_to_stdout_without_torch(arguments):
    done = run(*arguments)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert not HEAVY & set(done.stderr.partition("IMPORTED")[2].split())


def test_the_shipped_table_is_what_the_registries_hold():
    """Run ``python tools/make_known_names.py`` after adding a method or a task."""
    assert json.loads(make_known_names.PATH.read_text(encoding="utf-8")) == make_known_names.describe_known()


def test_a_device_that_is_not_there_is_one_sentence(small):
    done = CliRunner().invoke(
        app, ["generate", "--model", str(small), "--prompt", "x", "--device-map", "cuda:7"]
    )
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so the device may be there")
    assert done.exit_code == 2
    assert "device_map='cuda:7' needs a device that torch" in done.output


def test_generate_takes_the_options_of_a_cache(small, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "one two three four five six seven " * 60}) + "\n", encoding="utf-8")
    options = ["--head-budgets", "none", "--decode", "bounded", "--storage", "int8", "--protect", "0:12"]
    more = [
        "--profile",
        "none",
        "--max-length",
        "150",
        "--min-budget",
        "20",
        "--max-new-tokens",
        "3",
        "--json",
    ]
    done = CliRunner().invoke(
        app, ["generate", "--model", str(small), "--prompt-file", str(text), *options, *more]
    )
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["prompt_tokens"] <= 152
    config = record["config"]
    assert (config["head_budgets"], config["decode"], config["storage"]) == (None, "bounded", "int8")
    assert (config["protect"], config["min_budget"], config["profile"]) == ([[0, 12]], 20, None)


def test_a_file_of_several_texts_is_not_one_prompt(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("one", "two")), encoding="utf-8")
    done = CliRunner().invoke(app, ["generate", "--prompt-file", str(text)])
    assert done.exit_code == 2
    assert "holds 2 texts" in done.output


def test_demo_writes_to_an_ignored_folder_by_default():
    import inspect

    from rankkv.cli.demo import demo

    folder = inspect.signature(demo).parameters["output_dir"].default
    ignored = (Path(__file__).resolve().parents[2] / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert f"{Path(folder).parts[0]}/" in ignored
