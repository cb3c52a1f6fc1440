"""Analysis of one generation: its tokens, latency and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..cache.cache import RankKVCache
from ..cache.prefill import check_input_ids
from ..cache.report import compute_kept_bytes, count_slots
from ..errors import InputError
from ..models.compat import cache_argument


def analyze_generation(
    model: Any,
    input_ids: Tensor,
    cache: Any,
    max_new_tokens: int = 64,
    on_token: Callable[[int], None] | None = None,
    **generate_options: Any,
) -> GenerationRecord:
    """Generate greedily with the ordinary ``generate()``, and measure time and memory.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : Tensor
        ``[1, token]`` or ``[token]``.
    cache : Cache
        An empty cache: a :class:`~rankkv.RankKVCache`, or transformers' ``DynamicCache`` for the uncompressed model.
    max_new_tokens : int, default 64
        Largest number of tokens to generate.
    on_token : callable, optional
        Called with each token id as it arrives.
    **generate_options
        More options of ``model.generate``.

    Returns
    -------
    GenerationRecord
        Tokens, times and bytes.

    Raises
    ------
    InputError
        If the prompt is empty or has several rows.
    """
    input_ids = check_input_ids(input_ids)
    if input_ids.shape[0] != 1:
        raise InputError(
            f"analyze_generation takes one prompt, got a batch of {input_ids.shape[0]}: call it once per row."
        )
    clock = _Clock(on_token)
    options: dict[str, Any] = {
        "do_sample": False,
        "attention_mask": torch.ones_like(input_ids),
        **generate_options,
    }
    start = time.perf_counter()
    output = model.generate(
        input_ids, max_new_tokens=max_new_tokens, streamer=clock, **cache_argument(cache), **options
    )
    steps = len(clock.arrivals) - 1
    ours = isinstance(cache, RankKVCache)
    if ours:
        # An answer of one token leaves a prompt that waits for its replay uncompressed.
        cache.finish()
    return GenerationRecord(
        token_ids=output[0, input_ids.shape[1] :].tolist(),
        prompt_tokens=input_ids.shape[1],
        ttft_seconds=clock.arrivals[0] - start,
        tpot_seconds=(clock.arrivals[-1] - clock.arrivals[0]) / steps if steps else 0.0,
        cache_bytes=compute_kept_bytes(cache),
        full_cache_bytes=cache.full_cache_bytes() if ours else compute_kept_bytes(cache),
        kept_lengths=[count_slots(layer) for layer in cache.layers],
        budgets=cache.budgets if ours else [],
        layer_ranks=cache.layer_ranks if ours else [],
    )


@dataclass(frozen=True)
class GenerationRecord:
    """Hold the result of one measured generation.

    Attributes
    ----------
    token_ids : list of int
        Generated tokens of row 0.
    prompt_tokens : int
        Length of the prompt.
    ttft_seconds : float
        Time to first token: the prefill, including compression.
    tpot_seconds : float
        Time per output token after the first; 0.0 if only one token was generated.  A selector that replays the
        prompt does so after the first token, and its seconds count here.
    cache_bytes, full_cache_bytes : int
        Bytes of keys and values at the end, and the bytes of an uncompressed cache after the same tokens.
    kept_lengths : list of int
        Number of slots of each layer at the end.
    budgets : list of int
        Prompt tokens kept, one entry per compressible layer; empty without RankKV.
    layer_ranks : list of float
        Effective ranks, one entry per compressible layer; empty if the strategy needs none.
    """

    token_ids: list[int]
    prompt_tokens: int
    ttft_seconds: float
    tpot_seconds: float
    cache_bytes: int
    full_cache_bytes: int
    kept_lengths: list[int]
    budgets: list[int]
    layer_ranks: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return asdict(self)


class _Clock(BaseStreamer):
    """Record the arrival time of each token; transformers passes the prompt first."""

    def __init__(self, on_token: Callable[[int], None] | None) -> None:
        self.arrivals: list[float] = []
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.arrivals.append(time.perf_counter())
        if self._on_token is not None:
            self._on_token(int(value.reshape(-1)[0]))

    def end(self) -> None:
        """Do nothing: no token is buffered."""
