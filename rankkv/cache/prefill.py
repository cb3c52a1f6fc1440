"""The whole line in use: compress a context once, and generate while measuring time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..errors import InputError
from ..models.compat import accepts_argument, cache_argument
from ..models.placement import find_input_device
from .cache import RankKVCache
from .report import compute_cache_bytes, count_slots


def check_input_ids(input_ids: Any, attention_mask: Any = None) -> Tensor:
    """Return ``input_ids`` as ``[batch, token]`` if they are usable as a prompt.

    Raises
    ------
    InputError
        If they are not integers, not 1-D or 2-D, empty, or the mask has another shape.
    """
    if not isinstance(input_ids, Tensor):
        raise InputError(
            f"input_ids must be a tensor of token ids [batch, token], got {type(input_ids).__name__}."
        )
    if input_ids.is_floating_point() or input_ids.dim() not in (1, 2):
        raise InputError(
            f"input_ids must be integers of shape [batch, token], got {input_ids.dtype} {tuple(input_ids.shape)}."
        )
    if input_ids.numel() == 0:
        raise InputError("the prompt is empty: give at least one token.")
    if attention_mask is not None:
        given = (
            tuple(attention_mask.shape)
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        if given != tuple(input_ids.shape):
            raise InputError(
                f"attention_mask {given} must be a tensor of the shape of input_ids {tuple(input_ids.shape)}."
            )
    return input_ids if input_ids.dim() == 2 else input_ids[None]


def run_prefill(model: Any, cache: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Run one forward over ``input_ids`` that fills ``cache``, without gradients.

    Parameters
    ----------
    model : PreTrainedModel
        The language model.
    cache : Cache
        An empty cache.
    input_ids, attention_mask : Tensor
        ``[batch, token]``, on any device; padding stands on the left.

    Returns
    -------
    Tensor
        Logits after the last token, ``[batch, vocabulary]``.
    """
    input_ids = input_ids.to(find_input_device(model))
    options: dict[str, Any] = {"use_cache": True, **cache_argument(cache)}
    if accepts_argument(model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    if attention_mask is not None:
        attention_mask = attention_mask.view(input_ids.shape).to(input_ids.device)
        options["attention_mask"] = attention_mask
        if accepts_argument(model, "position_ids"):
            # As generate() does: a row's positions count its real tokens.
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=input_ids, **options).logits[:, -1]


def compress(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> RankKVCache:
    """Prefill a context once and return its compressed cache, to ask many questions of.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : Tensor
        ``[batch, token]`` or ``[token]``: the context.
    attention_mask : Tensor, optional
        ``[batch, token]``, 0 where the (left) padding is.
    **options
        Options of :class:`~rankkv.RankKVCache`.

    Returns
    -------
    RankKVCache
        Holds every token of ``input_ids``: ``model(input_ids=continuation, cache=cache.copy())`` scores a
        continuation, and ``model.generate`` of the full ids answers a question that follows.

    Raises
    ------
    InputError
        If the context is empty.
    RankKVError
        As :class:`~rankkv.RankKVCache`.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> cache = compress(model, torch.arange(60), compression_ratio=0.5)
    >>> cache.seen_tokens, sum(cache.budgets)
    (60, 60)
    """
    input_ids = check_input_ids(input_ids, attention_mask)
    cache = RankKVCache(model, **options)
    run_prefill(model, cache, input_ids, attention_mask)
    return cache.finish()


@dataclass(frozen=True)
class GenerationRecord:
    """What one measured generation gave.

    Attributes
    ----------
    token_ids : list of int
        Generated tokens of row 0.
    prompt_tokens : int
        Length of the prompt.
    ttft_seconds : float
        Time to first token: prefill, compression included.
    tpot_seconds : float
        Time per output token after the first; 0.0 if there is only one.
    cache_bytes, full_cache_bytes : int
        Bytes of keys and values held at the end, and those of an uncompressed cache after the same tokens.
    kept_lengths : list of int
        Slots each layer holds at the end.
    budgets : list of int
        Tokens kept of the prompt, one entry a compressible layer; empty without RankKV.
    layer_ranks : list of float
        Effective ranks, one entry a compressible layer; empty where none was needed.
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
    """Notes when each token arrives; transformers hands over the prompt first."""

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
        """Nothing is held back."""


def analyze_generation(
    model: Any,
    input_ids: Tensor,
    cache: Any,
    max_new_tokens: int = 64,
    on_token: Callable[[int], None] | None = None,
    **generate_options: Any,
) -> GenerationRecord:
    """Generate greedily with the ordinary ``generate()`` and measure time and memory.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : Tensor
        ``[1, token]`` or ``[token]``.
    cache : Cache
        A fresh cache: a :class:`~rankkv.RankKVCache`, or transformers' ``DynamicCache`` for the uncompressed model.
    max_new_tokens : int, default 64
        Most tokens to generate.
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
        raise InputError(f"a measured generation takes one prompt, got a batch of {input_ids.shape[0]}.")
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
    return GenerationRecord(
        token_ids=output[0, input_ids.shape[1] :].tolist(),
        prompt_tokens=input_ids.shape[1],
        ttft_seconds=clock.arrivals[0] - start,
        tpot_seconds=(clock.arrivals[-1] - clock.arrivals[0]) / steps if steps else 0.0,
        cache_bytes=compute_cache_bytes(cache),
        full_cache_bytes=cache.full_cache_bytes()
        if isinstance(cache, RankKVCache)
        else compute_cache_bytes(cache),
        kept_lengths=[count_slots(layer) for layer in cache.layers],
        budgets=cache.budgets if isinstance(cache, RankKVCache) else [],
        layer_ranks=cache.layer_ranks if isinstance(cache, RankKVCache) else [],
    )
