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
settings.register_profile("rankkv, few", settings.get_profile("rankkv"), max_examples=40)
settings.load_profile("rankkv")

# Helpers whose asserts should say what differed.
pytest.register_assert_rewrite("oracles", "peers")

TINY_VOCAB_SIZE = 128

#: One selector for each way scores go on, are shared by heads, ask for past queries, or wrap another's.
CORE_SELECTORS = {"snapkv", "h2o", "streaming_llm", "expected_attention", "criticalkv"}


#: Folders whose files ask the same of several models and backends, and those of them that ask all in `make test` too.
MANY_MODELS = {"cache", "analysis", "budget", "rank", "observe", "selection"}
ALL_MODELS = {"test_cache.py", "test_formulas.py", "test_hook.py"}
#: Families that stand for one kind each: plain, sliding, fused, hybrid, partly rotated, not rotated, latent, linear.
FEW_FAMILIES = {
    "Llama", "Mistral", "Phi-3", "Gemma 3", "Gemma 4", "GPT-NeoX", "GPT-2", "gpt-oss", "Llama 4", "DeepSeek-V3",
    "Jamba", "Qwen3-Next", "Qwen2-VL", "BioGPT",
}  # fmt: skip
#: Tests of all families beside their conformance, which `make test` asks of one family of a kind.
FEW_FAMILIES_TESTS = {
    "test_the_analyzer_finds_the_ranks_that_the_cache_goes_by", "test_packed_positions_change_nothing_or_are_refused",
    "test_a_compressed_family_does_not_warn", "test_what_is_found_gets_the_attention_output", "test_families",
}  # fmt: skip
#: Files whose laws `make test` asks of two selectors; those of `test_cache.py` and `test_decoding.py` of all core ones.
FEW_SELECTORS = {"snapkv", "h2o"}
FEW_SELECTORS_FILES = {
    "test_head_profile.py", "test_head_budgets.py", "test_generation_ways.py", "test_positions.py", "test_cascade.py",
}  # fmt: skip
#: Files of which `make test` runs nothing: other files ask the same of the same kind of program.
LATER_FILES = {"test_experiment.py", "test_needle_grid.py", "test_forced_needle.py", "test_benchmarks.py"}
#: Ways to run a family that `make test` leaves to `make test-all`, where the family is run in other ways already.
LATER_WAYS = {"chunked", "second turn"}
#: Tests of five seconds and more, of which `make test` keeps one of a kind: programs of `experiments/`, the embedded
#: model in further ways, and whatever starts other processes.
LATER_TESTS = {
    "test_ablation.py": {
        "test_a_row_is_what_compress_and_the_model_say", "test_other_options_in_the_same_folder_are_refused",
        "test_budgets_by_rank_lose_less_than_uniform_ones_at_a_tenth", "test_every_cell_is_there_once",
        "test_what_a_killed_run_left_is_kept", "test_tables_and_figure_are_written",
    },
    "test_decode_drift.py": {"test_nothing_evicted_drifts_nowhere_and_less_kept_drifts_more"},
    "test_replay.py": {"test_the_pipeline_answers_as_compress_does"},
    "test_method_quality.py": {
        "test_every_cell_is_there_once_and_one_row_is_what_compress_says", "test_a_killed_run_goes_on",
    },
    "test_generation_ways.py": {"test_compiled_forward"},
    "test_loading.py": {
        "test_embedded_logits_equal_those_of_its_gguf", "test_second_process_waits_for_the_first",
        "test_two_processes_convert_at_the_same_time",
    },
    "test_processes.py": {
        "test_launched_processes_measure_the_same_profile", "test_launched_processes_find_the_same_numbers",
        "test_every_prompt_is_analyzed_by_itself", "test_results_that_fit_no_split_are_refused_everywhere",
    },
    "test_ray.py": {"test_what_a_killed_worker_had_is_measured_by_another"},
    "test_embedded_ways.py": {
        "test_rows_of_a_batch_equal_the_rows_alone", "test_beams", "test_assisted_by_itself",
        "test_a_chat_of_three_turns",
    },
    "test_embedded.py": {"test_rows_of_a_padded_batch", "test_decoding_equals_the_masked_full_cache"},
    "test_tensor_parallel.py": {"test_two_processes_decide_as_one"},
    "test_sweep.py": {
        "test_a_sweep_that_is_killed_goes_on_where_it_was", "test_a_job_of_a_cluster_runs_the_sweep",
        "test_shares_make_the_whole",
    },
    "test_tasks_on_caches.py": {
        "test_full_cache_finds_what_a_blank_haystack_does_not_hold", "test_everything_kept_is_the_full_cache",
    },
    "test_tasks.py": {"test_continuations_share_no_token_and_are_not_in_the_blank_context"},
    "test_demo.py": {"test_three_caches_spend_what_they_say", "test_figures_are_written"},
    "test_benchmark_files.py": {"test_the_score_is_that_of_plain_generate"},
    "test_quantized.py": {"test_eviction_and_int8_take_the_bytes_of_eviction_alone"},
    "test_cli.py": {"test_unreachable_hub_names_the_embedded_model_in_a_real_process"},
    "test_store.py": {"test_kill_9_loses_no_acknowledged_context_and_a_stop_is_clean"},
    "test_explain.py": {"test_a_terminal_gets_colours"},
}  # fmt: skip


def is_long_tail(item: pytest.Item) -> bool:
    """Tell whether a test repeats a law for one more selector, model, backend or way."""
    folder, name = item.path.parent.name, item.path.name
    if name in LATER_FILES or getattr(item, "originalname", None) in LATER_TESTS.get(name, ()):
        return True
    if name == "test_readme.py" and item.name.endswith("[README.zh-CN.md]"):
        # The same programs as in README.md.
        return "test_snippets" in item.name
    callspec = getattr(item, "callspec", None)
    if callspec is None or folder == "parity":
        return False
    selector = callspec.params.get("selector")
    # Echo's scores while decoding come from one head's part of the output projection.
    core = CORE_SELECTORS | {"echo"} if name == "test_decoding.py" else CORE_SELECTORS
    if name == "test_embedded.py":
        core = FEW_SELECTORS
    if name in FEW_SELECTORS_FILES:
        core = FEW_SELECTORS
    if isinstance(selector, str) and selector not in core and folder != "selection":
        return True
    if getattr(item, "originalname", None) in FEW_FAMILIES_TESTS:
        return not FEW_FAMILIES & set(callspec.params.values())
    parts = callspec.id.split("-")
    if name == "test_lm_eval.py" and {"local_generation", "local_letter", "agnostic"} & set(parts):
        return True
    if name == "test_processes.py" and "accelerate" in parts:
        return True
    if name == "test_tasks_on_caches.py" and "aware" in parts:
        return True
    if name == "test_batch.py" and "drawn" in parts:
        return True
    if name == "test_head_profile.py" and "packed" in parts:
        return True
    if name == "test_docs.py" and "transformers.md" in parts:
        return True
    if getattr(item, "originalname", None) == "test_bounded_rows_equal_the_rows_alone" and "20" in parts:
        return True
    if folder in MANY_MODELS and "eager" in parts:
        return True
    if folder in MANY_MODELS and name not in ALL_MODELS and "neox" in parts:
        return True
    if name != "test_families.py":
        return False
    # One family of a kind; the weekly run asks all of them.
    family = callspec.params.get("name")
    return bool(LATER_WAYS & set(parts)) or (family is not None and family not in FEW_FAMILIES)


def pytest_configure(config: pytest.Config) -> None:
    """Draw fewer examples of each law in `make test`; `make test-all` draws them all."""
    if config.option.markexpr == "not slow":
        settings.load_profile("rankkv, few")


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
