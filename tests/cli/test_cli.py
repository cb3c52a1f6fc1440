"""The command line: what goes to which stream, exit codes, and errors in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rankkv import RankKVAnalyzer, __version__
from rankkv.cli import app
from rankkv.cli.common import build_question_prompt, parse_options, reports_errors
from rankkv.cli.display import AnswerStream, draw_bar
from rankkv.errors import ConfigError
from rankkv.utils.files import make_json_ready

PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
QUESTION = "What does the fox do?"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def small_model(small):
    from rankkv import load_model

    return load_model(small)


# -- version and help ------------------------------------------------------------------------------


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_version_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "rankkv", "--version"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (f"rankkv {__version__}\n", "")


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_neither_version_nor_help_loads_torch(flag):
    loaded = run_python(
        f"import sys; sys.argv = ['rankkv', '{flag}']\n"
        "from rankkv.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('loaded', [name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    assert loaded.splitlines()[-1] == "loaded []"
    assert __version__ in loaded or "generate" in loaded


def test_help_lists_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("demo", "analyze", "generate"))


# -- analyze ---------------------------------------------------------------------------------------


def test_analyze_prints_the_analyzers_result_as_json(small, small_model, tmp_path):
    output = tmp_path / "new" / "result.json"
    result = invoke(
        "analyze", "--model", small, "--prompt", PROMPT, "--compression-ratio", 0.4, "--scope", "window",
        "--strategy", "softmax", "--strategy-option", "temperature=0.5", "--aggregation", "mean",
        "--json", "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    model, tokenizer = small_model
    expected = RankKVAnalyzer(
        model,
        str(small),
        strategy="softmax",
        scope="window",
        aggregation="mean",
        strategy_options={"temperature": 0.5},
    ).analyze(tokenizer(PROMPT, return_tensors="pt")["input_ids"], compression_ratio=0.4)
    assert record == expected.to_dict()
    assert json.loads(output.read_text()) == record


def test_analyze_draws_one_line_a_layer_on_stderr(small):
    result = invoke("analyze", "--model", small, "--prompt", PROMPT)
    assert result.exit_code == 0
    assert result.stdout == ""
    rows = [
        line.split() for line in result.stderr.splitlines() if line.split()[:1] and line.split()[0].isdigit()
    ]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert all("█" in row[2] and "█" in row[4] for row in rows)


def test_analyze_budget_is_the_average_of_a_layer(small):
    record = json.loads(
        invoke("analyze", "--model", small, "--prompt", PROMPT, "--budget", 40, "--json").stdout
    )
    assert record["total_budget"] == sum(record["budgets"]) == 120


def test_analyze_cuts_at_max_length(small):
    record = json.loads(
        invoke("analyze", "--model", small, "--dataset", "python-docs", "--max-length", 90, "--json").stdout
    )
    assert record["seq_len"] == 90


def test_analyze_reads_a_prompt_file_with_a_byte_order_mark(small, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8-sig")
    from_file = invoke("analyze", "--model", small, "--prompt-file", file, "--json")
    assert json.loads(from_file.stdout) == json.loads(
        invoke("analyze", "--model", small, "--prompt", PROMPT, "--json").stdout
    )


# -- generate --------------------------------------------------------------------------------------


def test_generate_keeps_everything_at_ratio_one(small, small_model):
    result = invoke(
        "generate",
        "--model",
        small,
        "--prompt",
        PROMPT,
        "--compression-ratio",
        1.0,
        "--max-new-tokens",
        8,
        "--json",
    )
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    model, tokenizer = small_model
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert record["token_ids"] == output[0, ids.shape[1] :].tolist()
    assert record["answer"] == tokenizer.decode(record["token_ids"], skip_special_tokens=True)
    assert record["cache_bytes"] == record["full_cache_bytes"]


def test_generate_streams_the_same_answer_to_stdout(small):
    arguments = ["generate", "--model", small, "--prompt", PROMPT, "--max-new-tokens", 12]
    plain, as_json = invoke(*arguments), invoke(*arguments, "--json")
    record = json.loads(as_json.stdout)
    assert plain.stdout == record["answer"] + "\n"
    assert f"{record['prompt_tokens']:,} prompt tokens, {len(record['token_ids'])} generated" in plain.stderr
    assert record["cache_bytes"] < record["full_cache_bytes"]


def test_generate_by_loss_tells_the_prediction(small):
    arguments = ("generate", "--model", small, "--prompt", PROMPT, "--max-new-tokens", 2)
    result = invoke(*arguments, "--max-loss", 0.1)
    assert "for nine of ten prompts below" in result.stderr
    assert "max_loss 0.1" in result.stderr
    record = json.loads(invoke(*arguments, "--max-loss", 0.1, "--json").stdout)
    assert 0 < record["predicted_loss"] < record["loss_bound"] <= 0.1
    assert record["config"]["compression_ratio"] == 1.0
    plain = json.loads(invoke(*arguments, "--json").stdout)
    assert plain["config"]["compression_ratio"] == 0.3
    assert plain["loss_bound"] > record["loss_bound"]


def test_analyze_marks_the_knee_of_the_predicted_loss(small):
    arguments = ("analyze", "--model", small, "--prompt", PROMPT, "--losses")
    shown = invoke(*arguments).stderr
    assert shown.count("<- knee") == 1
    points = json.loads(invoke(*arguments, "--json").stdout)["predicted_losses"]
    assert [point["loss"] for point in points] == sorted((point["loss"] for point in points), reverse=True)
    assert sum(point["is_knee"] for point in points) == 1


def test_generate_passes_options_on(small):
    result = invoke(
        "generate", "--model", small, "--prompt", PROMPT, "--budget", 30, "--max-new-tokens", 2, "--json",
        "--selector", "snapkv", "--selector-option", "pooling=avg", "--selector-option", "kernel-size=3",
        "--strategy", "power", "--strategy-option", "exponent=2", "--scope", "full",
    )  # fmt: skip
    record = json.loads(result.stdout)
    assert record["config"]["selector"] == "snapkv(pooling='avg', kernel_size=3)"
    assert record["config"]["strategy_options"] == {"exponent": 2}
    assert record["config"]["scope"] == "full"
    assert sum(record["budgets"]) == 90
    # The last generated token never enters the cache.
    assert record["kept_lengths"] == [budget + len(record["token_ids"]) - 1 for budget in record["budgets"]]


def test_question_goes_through_the_chat_template(embedded):
    tokenizer = embedded[1]
    ids = build_question_prompt(tokenizer, PROMPT, QUESTION)
    text = tokenizer.decode(ids[0])
    assert text.rstrip().endswith("<|im_start|>assistant")
    assert text.index(PROMPT.strip()) < text.index(QUESTION) < text.index("<|im_start|>assistant")
    assert tokenizer.decode(build_question_prompt(tokenizer, PROMPT, None)[0]) == PROMPT


def test_question_without_a_template_is_plain_text(small_model, tmp_path):
    from transformers import AutoTokenizer

    small_model[1].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = None
    text = tokenizer.decode(build_question_prompt(tokenizer, "A document.", QUESTION)[0])
    assert text == f"A document.\n\n{QUESTION}\n"


def test_embedded_model_answers_from_a_compressed_cache():
    result = invoke(
        "generate",
        "--prompt",
        PROMPT,
        "--question",
        QUESTION,
        "--compression-ratio",
        0.5,
        "--max-new-tokens",
        12,
        "--json",
    )
    record = json.loads(result.stdout)
    assert record["answer"].strip()
    assert len(record["budgets"]) == 30
    assert sum(record["budgets"]) == round(0.5 * 30 * record["prompt_tokens"])


def test_stream_never_splits_a_character(embedded):
    tokenizer = embedded[1]
    text = "naïve 🦊 漢字 🏳️‍🌈 end"
    pieces: list[str] = []
    stream = AnswerStream(tokenizer, pieces.append)
    for token_id in tokenizer(text)["input_ids"]:
        stream.put(token_id)
    assert stream.end() == "".join(pieces) == text
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", " \n\t"], "the prompt is empty"),
        (["generate"], "exactly one of --prompt or --prompt-file"),
        (
            ["generate", "--prompt", "a", "--prompt-file", "b"],
            "--prompt and --prompt-file are given together",
        ),
        (["generate", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["generate", "--prompt-file", "."], "cannot read"),
        (["generate", "--prompt", "a", "--compression-ratio", "0"], "outside (0, 1]"),
        (["generate", "--prompt", "a", "--compression-ratio", "1.5"], "outside (0, 1]"),
        (["generate", "--prompt", "a", "--compression-ratio", "nan"], "outside (0, 1]"),
        (["generate", "--prompt", "a", "--max-loss", "0"], "max_loss=0.0 is outside (0, 10]"),
        (["generate", "--prompt", "a", "--max-loss", "0.1", "--selector", "h2o"], "'h2o' was not measured"),
        (["generate", "--prompt", "a", "--selector", "snapvk"], "did you mean 'snapkv'?"),
        (["generate", "--prompt", "a", "--selector-option", "pooling"], "must be of the form name=value"),
        (["generate", "--prompt", "a", "--selector-option", "colour=red"], "has no option 'colour'"),
        (["generate", "--prompt", "a", "--strategy", "unifrom"], "did you mean 'uniform'?"),
        (
            ["generate", "--prompt", "a", "--strategy", "power", "--strategy-option", "exponent=high"],
            "exponent must be a number",
        ),
        (["generate", "--prompt", "a", "--scope", "evictabel"], "did you mean 'evictable'?"),
        (["generate", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["generate", "--prompt", "a", "--budget", "0"], "--budget is 0"),
        (["analyze", "--prompt", ""], "the prompt is empty"),
        (["analyze"], "exactly one of --prompt, --prompt-file or --dataset"),
        (
            ["analyze", "--prompt", "a", "--dataset", "python-docs"],
            "--prompt and --dataset are given together",
        ),
        (["analyze", "--dataset", "nowhere.txt"], "nowhere.txt"),
        (["analyze", "--dataset", "wikitext"], "python-docs"),
        (["analyze", "--prompt", "a", "--aggregation", "concatt"], "did you mean 'concat'?"),
        (["analyze", "--prompt", "a", "--max-length", "0"], "--max-length is 0"),
        (["analyze", "--prompt", "a", "--output", "."], "it is a folder"),
        (["demo", "--compression-ratio", "-1"], "outside (0, 1]"),
        (["demo", "--tokens", "0"], "--tokens is 0"),
        (["demo", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, fragment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The model does not exist: what is wrong with the options must show before it is looked for.
    result = invoke(*arguments, "--model", "./no-such-model")
    assert result.exit_code == 2
    assert result.stdout == ""
    *progress, error = result.stderr.splitlines()
    assert error.startswith("Error: ")
    assert fragment in error
    assert not any(line.startswith(("Error", "Traceback")) for line in progress)


def test_file_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("café".encode("latin-1"))
    result = invoke("generate", "--prompt-file", file)
    assert result.exit_code == 2
    assert f"{str(file)!r} is not UTF-8 (byte 3" in result.stderr


@pytest.mark.parametrize("command", ["analyze", "generate"])
def test_budget_below_the_floor_names_the_smallest(command, small):
    result = invoke(command, "--model", small, "--prompt", PROMPT, "--budget", 10)
    assert result.exit_code == 2
    assert "give at least budget=16" in result.stderr.splitlines()[-1]


def test_unreachable_hub_names_the_embedded_model_in_a_real_process():
    done = subprocess.run(
        [sys.executable, "-m", "rankkv", "generate", "--model", "nobody/nothing", "--prompt", "a"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "use the model 'embedded', which needs no network" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_interrupt_ends_with_130():
    @reports_errors
    def wait() -> None:
        raise KeyboardInterrupt

    single = typer.Typer()
    single.command()(wait)
    result = CliRunner().invoke(single, [])
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"


def test_option_given_twice_is_an_error():
    with pytest.raises(ConfigError, match="gives 'seed' twice"):
        parse_options(["seed=1", "seed=2"], "--strategy-option")


# -- helpers ---------------------------------------------------------------------------------------


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1e-6, 1e6), st.integers(1, 60))
def test_bars_grow_with_their_values_and_stay_inside(one, other, largest, width):
    small_bar, large_bar = (draw_bar(value, largest, width) for value in sorted((one, other)))
    assert len(small_bar) <= len(large_bar) <= width


def test_json_has_no_nan():
    record = make_json_ready({"ranks": [1.0, float("nan"), float("inf")], "nested": ({"a": float("-inf")},)})
    assert record == {"ranks": [1.0, None, None], "nested": [{"a": None}]}


def test_analyze_shows_what_the_strategy_measured(small):
    result = invoke("analyze", "--model", small, "--prompt", PROMPT, "--strategy", "cake")
    assert result.exit_code == 0, result.output
    heads = [line.split() for line in result.output.splitlines() if line.strip().startswith("layer")]
    assert heads == [["layer", "cake", "budget"]]
