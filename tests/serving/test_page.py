"""docs/serving.md as a reader follows it: its commands and its program run against a live server."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from live import run_live

from rankkv.cli.application import app
from rankkv.serving import app as server_code

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_five_commands_and_the_program_run(tiny, tmp_path):
    first, *commands = find_blocks("sh")
    assert first.splitlines() == ['pip install ".[serve]"', f"rankkv serve {MODEL}"]
    with run_live(*tiny, tmp_path, name=MODEL) as live:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        printed = ""
        for block in commands:
            block = block.replace("127.0.0.1:8000", f"127.0.0.1:{live.port}")
            done = subprocess.run(
                ["sh", "-ec", block], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
            )
            printed += done.stdout.replace("}{", "}\n{") + "\n"
        made, *answers = [json.loads(line) for line in printed.splitlines() if line]
        assert made["name"] == "memory"
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert cached == [made["tokens"]] * 3
        (program,) = find_blocks("py")
        exec(program.replace("127.0.0.1:8000", f"127.0.0.1:{live.port}"), {})
        assert live.metric('rankkv_context_lookups_total{result="hit"}') == 5


def test_the_page_names_every_option_and_every_error():
    import typer

    command = typer.main.get_command(app).commands["serve"]
    options = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    table = PAGE.partition("## Options")[2].partition("## Memory")[0]
    assert set(re.findall(r"`(--[a-z-]+)`", table)) == options - {"--help"}
    told = set(
        re.findall(r"`([a-z]+(?:_[a-z]+)*)`", PAGE.partition("## Errors")[2].partition("## What is")[0])
    )
    assert told - {"message", "tools"} == {*list_codes(), "invalid_request_error", "server_error"}


def list_codes():
    """List the short names of all errors in the code: the third argument of a RequestError or of build_body."""
    codes = set()
    for path in Path(server_code.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("RequestError", "build_body"):
                given = [*node.args[2:3], *(word.value for word in node.keywords if word.arg == "code")]
                codes |= {code.value for code in given if isinstance(code, ast.Constant)}
    return codes - {"client_left"}
