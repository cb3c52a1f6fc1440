"""Fixtures shared by every test: the embedded model, tiny random models and the embedded text."""

from __future__ import annotations

import os

# Tokenizers warn about forks; and no test asks the hub, unless it says so in a process of its own.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

# Workers of pytest-xdist share the cores, and what they start does too.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1)
if _workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(4, os.cpu_count() or 1)))

# Shared machines stall for seconds, so an example has no deadline; the same examples are drawn in every run.
settings.register_profile("rankkv", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("rankkv")

# Helpers whose asserts should say what differed.
pytest.register_assert_rewrite("oracles", "peers")

TINY_VOCAB_SIZE = 128

#: One selector for each way scores go on, are shared by heads, ask for past queries, or wrap another's.
CORE_SELECTORS = {"snapkv", "h2o", "streaming_llm", "expected_attention", "criticalkv"}


#: Folders whose files ask the same of several models and backends, and those of them that ask all in `make test` too.
MANY_MODELS, ALL_MODELS = {"cache", "analysis", "budget"}, {"test_cache.py"}
#: Ways to run a family that `make test` leaves to `make test-all`, where the family is run in other ways already.
LATER_WAYS = {"chunked", "second turn"}


def is_long_tail(item: pytest.Item) -> bool:
    """Tell whether a test repeats a law for one more selector, model, backend or way."""
    folder, name = item.path.parent.name, item.path.name
    callspec = getattr(item, "callspec", None)
    if callspec is None or folder in ("selection", "parity"):
        return False
    selector = callspec.params.get("selector")
    if isinstance(selector, str) and selector not in CORE_SELECTORS:
        return True
    parts = callspec.id.split("-")
    if folder in MANY_MODELS and "eager" in parts:
        return True
    if folder in MANY_MODELS and name not in ALL_MODELS and "neox" in parts:
        return True
    return name == "test_families.py" and bool(LATER_WAYS & set(parts))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the long tail to `make test-all`; every law is asked of one model, and of all core selectors."""
    for item in items:
        if is_long_tail(item):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, Any]:
    """``(model, tokenizer)`` of SmolLM2-135M-Instruct, float32; shared: restore what you change."""
    from rankkv.models.loading import load_model

    return load_model("embedded")


@pytest.fixture(scope="session")
def python_docs() -> str:
    """The language reference that every Python carries, as one string."""
    from rankkv.models.texts import python_docs_text

    return python_docs_text()


def _build_tiny(config: Any, seed: int, attn_implementation: str) -> Any:
    from transformers import AutoModelForCausalLM

    config._attn_implementation = attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Factory of random Llama models: 4 query heads share 2 kv heads, hidden size 64, vocabulary 128."""
    from transformers import LlamaConfig

    def build(
        num_layers: int = 3, *, attn_implementation: str = "sdpa", seed: int = 0, **overrides: Any
    ) -> Any:
        options: dict[str, Any] = {
            "vocab_size": TINY_VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            # Ten times the usual spread: otherwise a random model attends so evenly that any token will do.
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return _build_tiny(LlamaConfig(**(options | overrides)), seed, attn_implementation)

    return build


@pytest.fixture(scope="session")
def tiny_neox() -> Callable[..., Any]:
    """Factory of random GPT-NeoX models: fused QKV, a quarter of each head rotated, hidden size 64."""
    from transformers import GPTNeoXConfig

    def build(
        num_layers: int = 3, *, attn_implementation: str = "sdpa", seed: int = 0, **overrides: Any
    ) -> Any:
        options: dict[str, Any] = {
            "vocab_size": TINY_VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return _build_tiny(GPTNeoXConfig(**(options | overrides)), seed, attn_implementation)

    return build


@pytest.fixture(scope="session")
def small(embedded: Any, tiny_llama: Callable[..., Any], tmp_path_factory: Any) -> Any:
    """A folder with a random Llama of three layers that reads the embedded model's tokens."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_llama(vocab_size=len(embedded[1])).save_pretrained(folder)
    embedded[1].save_pretrained(folder)
    return folder
