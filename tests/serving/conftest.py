"""Servers with a tiny random model, and the text they are asked about."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from rankkv.serving.settings import PACKAGES, is_tested

# The server refuses other versions, and a test of the settings says so.
if not is_tested(version("transformers")) or any(importlib.util.find_spec(name) is None for name in PACKAGES):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def tiny(embedded: Any, tiny_llama: Any) -> tuple[Any, Any]:
    """A random Llama that reads the embedded model's tokens and chat template, and its tokenizer."""
    return tiny_llama(vocab_size=len(embedded[1])), embedded[1]


@pytest.fixture(scope="session")
def document(python_docs: str) -> str:
    """A text of about 500 tokens."""
    return python_docs[:2000].strip()


@pytest.fixture
def live(tiny: Any, tmp_path: Path) -> Any:
    """A server without keys."""
    from live import run_live

    with run_live(*tiny, tmp_path / "contexts") as server:
        yield server


@pytest.fixture(scope="module")
def shared_live(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with limits, for tests that leave nothing behind."""
    from live import run_live

    folder = tmp_path_factory.mktemp("shared")
    with run_live(*tiny, folder, max_body=20_000, max_answer_tokens=64, max_context_tokens=2048) as server:
        yield server
