"""Calibration shared by launched processes: the profile of one process, number by number."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from calibrating import OPTIONS, PIECES, write_model_and_text
from launching import launch, run

from rankkv import RankProfile


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> list[str]:
    """`rankkv calibrate` of a tiny model in a folder, on five pieces of text."""
    model, text = write_model_and_text(tmp_path_factory.mktemp("calibration"), tiny_llama(2))
    return ["-m", "rankkv", "calibrate", "--model", str(model), "--texts", str(text), *OPTIONS]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> RankProfile:
    """What one process measures."""
    path = tmp_path_factory.mktemp("alone") / "profile.json"
    run([sys.executable, *command, "-o", str(path)])
    profile = RankProfile.load(path)
    assert profile.calibration["texts"] == PIECES
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
