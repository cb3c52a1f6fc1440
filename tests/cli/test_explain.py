"""`rankkv generate --explain`: what it says of each line and token is what the cache holds."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rankkv import compress
from rankkv.cache.kept_tokens import analyze_kept_tokens, decode_each_token
from rankkv.cli import app

PROMPT = (
    "First line of the text.\n\nSecond, 中文 and 🧭 in it.\n"
    + "The quick brown fox jumps over the lazy dog. " * 9
)


@pytest.fixture(scope="module")
def kept(small):
    from rankkv import load_model

    model, tokenizer = load_model(small)
    return analyze_kept_tokens(
        compress(model, tokenizer(PROMPT, return_tensors="pt")["input_ids"], selector="snapkv")
    )


def build_arguments(small, *more):
    arguments = ["generate", "--model", small, "--prompt", PROMPT, "--max-new-tokens", 2, "--explain", *more]
    return [str(argument) for argument in arguments]


def test_pieces_are_the_prompt_token_by_token(embedded):
    tokenizer = embedded[1]
    ids = tokenizer(PROMPT)["input_ids"]
    pieces = decode_each_token(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == PROMPT
    assert "🧭" in "".join(piece for piece in pieces if len(piece.strip()) == 1)


def test_lines_say_their_own_average(small, kept, embedded):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, build_arguments(small))
    assert result.exit_code == 0
    assert "\x1b" not in result.stderr
    fates = kept.count_fates()
    assert f"{fates['all']:,} by every head of every layer, {fates['some']:,} by some" in result.stderr
    lines = [
        match for line in result.stderr.splitlines() if (match := re.match(r"\s*(\d+)% \S*\s+(\S.*)", line))
    ]
    assert all(len(match[0]) <= 80 for match in lines)
    text = [match[2].strip() for match in lines]
    assert text[:2] == ["First line of the text.", "Second, 中文 and 🧭 in it."]
    assert " ".join(text[2:]) == PROMPT.splitlines()[3].strip()
    pieces = decode_each_token(embedded[1], embedded[1](PROMPT)["input_ids"])
    # What the first line shows: its words, full stop and the line break that ends it.
    count = next(number for number in range(len(pieces)) if "\n" in "".join(pieces[:number]))
    shares = kept.compute_shares().tolist()
    first = sum(shares[:count]) / count
    assert abs(int(lines[0][1]) - 100 * first) <= 1


def test_json_has_each_token(small, kept):
    record = json.loads(CliRunner().invoke(app, build_arguments(small, "--json")).stdout)["kept_tokens"]
    assert "".join(record.pop("pieces")) == PROMPT
    assert record == kept.to_dict()


def test_a_terminal_gets_colours(small):
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "rankkv", *build_arguments(small)],
        stdout=subprocess.PIPE, stderr=follower, env=environment,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 4096):
            shown += piece
    except OSError:  # how Linux says that the other side has closed
        pass
    assert process.wait() == 0
    process.stdout.close()
    os.close(leader)
    last_lines = shown.decode()[shown.decode().rindex("kept by") :]
    assert "\x1b[1;7m" in last_lines
    assert "no head" in last_lines
