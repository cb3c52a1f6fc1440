"""The command line of `rankkv serve`, and what it refuses before anything heavy is imported."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rankkv.cli.application import app
from rankkv.errors import ConfigError, MissingDependencyError
from rankkv.serving import settings
from rankkv.serving.settings import ServeSettings, is_tested, parse_bytes

HEAVY = {"torch", "transformers", "fastapi", "starlette", "uvicorn", "openai", "prometheus_client"}


@pytest.mark.parametrize("arguments", [["--help"], ["embedded", "--port", "70000"], ["./nowhere"]])
def test_help_and_bad_arguments_import_nothing_heavy(arguments):
    code = (
        "import sys; from rankkv.cli.application import app\n"
        f"try: app(['serve', *{arguments!r}])\n"
        "except SystemExit as end: print('CODE', end.code)\n"
        f"print('HEAVY', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert f"CODE {0 if arguments == ['--help'] else 2}" in done.stdout


def test_importing_rankkv_does_not_import_the_server():
    code = (
        "import sys, rankkv; print([name for name in sys.modules if 'serving' in name or name == 'fastapi'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "-1"], "--port -1 must be from 0 to 65535"),
        (["--compression-ratio", "1.5"], "compression_ratio"),
        (["--max-loss", "0"], "max_loss=0.0 is outside (0, 10]"),
        (["--max-loss", "0.1", "--selector", "h2o"], "'h2o' was not measured"),
        (["--selector", "snapvk"], "did you mean 'snapkv'"),
        (["--cache-memory", "lots"], "--cache-memory 'lots' is not a size"),
        (["--cache-memory", "-1GB"], "is not a size"),
        (["--max-body", "0"], "--max-body 0 must be at least 1"),
        (["--max-queue", "0"], "--max-queue 0 must be at least 1"),
        (["--max-answer-tokens", "0"], "at least 1"),
        (["--max-context-tokens", "0"], "at least 1"),
        (["--max-contexts", "0"], "at least 1"),
        (["--grace-seconds", "-1"], "--grace-seconds"),
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--host", "example.org"], "there is no API key"),
        (["--api-key", "short"], "at least 8"),
        (["--api-key", "with a space inside"], "without spaces"),
        (["--cache-dir", __file__], "is a file: give a folder"),
        (["--dtype", "float3"], "unknown dtype"),
        (["--device-map", "nowhere!"], "is not a device"),
        (["--log-level", "loud"], "unknown log level"),
    ],
)
def test_bad_arguments_end_with_one_sentence(arguments, words):
    result = CliRunner().invoke(app, ["serve", "embedded", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_port_that_is_taken_is_said_before_the_model_loads():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "embedded", "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in " ".join(result.output.split())
    assert "Loading" not in result.output


def test_keys_of_the_environment_open_a_public_address(monkeypatch):
    monkeypatch.setenv("RANKKV_API_KEYS", "key-of-alice, key-of-bob-2")
    # It goes on to the next check, which the model's name fails.
    result = CliRunner().invoke(app, ["serve", "./nowhere", "--host", "0.0.0.0"])
    assert "no model at" in result.output


def test_a_key_is_never_printed():
    with pytest.raises(ConfigError) as caught:
        ServeSettings("embedded", api_keys=("se cret",))
    assert "se cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("1kb", 1000), ("2 GiB", 2**31), ("1.5MB", 1_500_000), ("7B", 7)]
)
def test_sizes(text, value):
    assert parse_bytes(text, "--x") == value


def test_an_untested_transformers_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(settings, "version", lambda name: "5.23.1")
    with pytest.raises(MissingDependencyError, match=r"5\.24 and this is transformers 5\.23\.1: pip install"):
        settings.check_requirements()
    assert [is_tested(found) for found in ("5.24.0", "5.24.3", "5.2.4", "5.240", "none")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(settings, "PACKAGES", ("fastapi", "a_package_that_is_missing"))
    with pytest.raises(MissingDependencyError, match=r'pip install "rankkv\[serve\]"'):
        settings.check_requirements()
