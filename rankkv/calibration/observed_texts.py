"""Prefills of calibration texts, of which every layer is observed and nothing is evicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..cache.cache import RankKVCache
from ..cache.prefill import check_input_ids, run_prefill
from ..errors import ConfigError, InputError
from ..models.placement import find_input_device
from ..observe.observation import Observation
from ..selection import Selector


def observe_texts(
    model: Any,
    texts: Iterable[str | Tensor],
    tokenizer: Any,
    max_tokens: int,
    collect: Callable[[Observation], None],
    turns: bool = False,
) -> None:
    """Prefill each text and give every layer's observation to ``collect``; nothing is evicted.

    ``turns`` is True if it needs the layers' rotary embedding.

    Raises
    ------
    ConfigError
        If a text is a string and no tokenizer is given, or ``max_tokens`` is not an integer of at least 1.
    InputError
        If there is no text, or a text is empty.
    """
    check_max_tokens(max_tokens)

    # A selector sees the queries of every layer.
    def score(observation: Observation) -> Tensor:
        collect(observation)
        return observation.real_index.float()

    collector = Selector("collector", score, "queries", "control", turns=turns)
    seen = False
    for text in texts:
        seen = True
        ids = read_ids(text, tokenizer)[:, :max_tokens].to(find_input_device(model))
        run_prefill(model, RankKVCache(model, 1.0, selector=collector, strategy="uniform"), ids)
    if not seen:
        raise InputError("there is no text to observe queries in: give at least one.")


def check_max_tokens(max_tokens: object) -> None:
    """Raise ConfigError unless ``max_tokens`` is an integer of at least 1."""
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens!r} must be an integer of at least 1.")


def read_ids(text: str | Tensor, tokenizer: Any) -> Tensor:
    """Return the token ids of one text, ``[1, token]``."""
    if isinstance(text, str):
        if tokenizer is None:
            raise ConfigError("texts that are strings need tokenizer=: give it, or give token ids.")
        text = tokenizer(text, return_tensors="pt").input_ids
    ids = check_input_ids(text)
    if ids.shape[0] != 1:
        raise InputError(f"token ids of one text must be [token] or [1, token], got {tuple(ids.shape)}.")
    return ids
