"""Self-check of an installation: what every cache promises, on a tiny random model."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .._version import __version__
from ..cache.cache import RankKVCache
from ..models.compat import OLDEST_TRANSFORMERS, cache_argument

_PROMPT_TOKENS, _NEW_TOKENS, _RATIO = 96, 8, 0.3


def run_selfcheck() -> dict[str, Any]:
    """Compress a tiny random Llama and check what every cache promises.

    It downloads and prints nothing.  The checks:

    - identity: with everything kept, the generated text equals the plain model's;
    - budgets: they sum to the total;
    - first token: it equals the plain model's;
    - bytes: they equal the bytes of the kept tokens.

    Returns
    -------
    dict
        ``ok`` (bool), ``checks`` (a list of ``name``, ``passed`` and ``detail``) and ``versions`` (rankkv, torch,
        transformers, the oldest transformers that works, python, platform and attention backend), JSON-ready.

    Examples
    --------
    >>> run_selfcheck()["ok"]
    True
    """
    model, prompt = _build_model()
    checks = []
    for name, check in (
        ("identity", _check_identity),
        ("budgets", _check_budgets),
        ("first token", _check_first_token),
        ("bytes", _check_bytes),
    ):
        passed, detail = _run(check, model, prompt)
        checks.append({"name": name, "passed": passed, "detail": detail})
    versions = {
        "rankkv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "oldest_transformers": OLDEST_TRANSFORMERS,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": model.config._attn_implementation,
    }
    return {"ok": all(check["passed"] for check in checks), "checks": checks, "versions": versions}


def _build_model() -> tuple[Any, Tensor]:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Large weights, so that a random model attends unevenly.
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    # The caller's random state must not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), torch.randint(3, 128, (1, _PROMPT_TOKENS))


def _run(check: Callable[[Any, Tensor], tuple[bool, str]], model: Any, prompt: Tensor) -> tuple[bool, str]:
    try:
        return check(model, prompt)
    except Exception as error:  # Any error is a finding to report.
        return False, f"{type(error).__name__}: {error}"


def _generate(model: Any, prompt: Tensor, cache: RankKVCache | None) -> list[int]:
    options = {} if cache is None else cache_argument(cache)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        **options,
    )
    return output[0, prompt.shape[1] :].tolist()


def _prefill(model: Any, prompt: Tensor) -> RankKVCache:
    cache = RankKVCache(model, compression_ratio=_RATIO)
    with torch.no_grad():
        model(input_ids=prompt, use_cache=True, **cache_argument(cache))
    return cache.finish()


def _check_identity(model: Any, prompt: Tensor) -> tuple[bool, str]:
    plain = _generate(model, prompt, None)
    ours = _generate(model, prompt, RankKVCache(model, compression_ratio=1.0))
    if ours == plain:
        return True, f"with everything kept, {len(plain)} tokens as without RankKV"
    return False, f"with everything kept, {ours} instead of {plain}"


def _check_budgets(model: Any, prompt: Tensor) -> tuple[bool, str]:
    cache = _prefill(model, prompt)
    total = round(_RATIO * prompt.shape[1] * len(cache.layers))
    passed = sum(cache.budgets) == sum(cache.kept_lengths) == total
    return (
        passed,
        f"layers keep {cache.kept_lengths} of {prompt.shape[1]}: {sum(cache.kept_lengths)} of {total} tokens",
    )


def _check_first_token(model: Any, prompt: Tensor) -> tuple[bool, str]:
    plain = _generate(model, prompt, None)[0]
    ours = _generate(model, prompt, RankKVCache(model, compression_ratio=_RATIO))[0]
    return ours == plain, f"{ours}, and {plain} without RankKV"


def _check_bytes(model: Any, prompt: Tensor) -> tuple[bool, str]:
    cache = _prefill(model, prompt)
    keys = cache.layers[0].keys
    slot_bytes = 2 * keys.shape[1] * keys.shape[-1] * keys.element_size()
    expected, full = sum(cache.budgets) * slot_bytes, len(cache.layers) * prompt.shape[1] * slot_bytes
    held = cache.cache_bytes()
    passed = held == expected and cache.full_cache_bytes() == full
    return passed, f"{held:,} bytes held, {expected:,} by the budgets, {full:,} without RankKV"
