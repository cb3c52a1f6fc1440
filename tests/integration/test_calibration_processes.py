"""Calibration shared by launched processes: the profile of one process, number by number."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import launch, run

from rankkv import RankProfile

OPTIONS = ["--context-tokens", "96", "--continuation-tokens", "32", "--max-texts", "5"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> list[str]:
    """`rankkv calibrate` of a tiny model in a folder, with a tokenizer, on five pieces of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("calibration")
    words = {f"w{number}": number for number in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    tiny_llama(2).save_pretrained(folder / "model")
    text = " ".join(f"w{(place * place + place // 7) % 125 + 3}" for place in range(5 * 128))
    (folder / "text.txt").write_text(text)
    source = [str(folder / "model"), "--texts", str(folder / "text.txt")]
    return ["-m", "rankkv", "calibrate", "--model", *source, *OPTIONS]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> RankProfile:
    """What one process measures."""
    path = tmp_path_factory.mktemp("alone") / "profile.json"
    run([sys.executable, *command, "-o", str(path)])
    profile = RankProfile.load(path)
    assert profile.calibration["texts"] == 5
    return profile


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_launched_processes_measure_the_same_profile(
    command: list[str], alone: RankProfile, tmp_path: Path, launcher: str
) -> None:
    done = launch([*command, "-o", str(tmp_path / "profile.json"), "--json"], 2, launcher)
    # Written and printed once, and nothing to resume from is left.
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert json.loads(done.stdout) == json.loads((tmp_path / "profile.json").read_text())
    assert done.stderr.count("Written:") == 1
    assert RankProfile.load(tmp_path / "profile.json") == alone
