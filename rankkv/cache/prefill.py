"""The prefill: check a prompt, run it through the model into a cache, and compress a context once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..config import AUTO_SELECTOR, RankKVConfig, join_options
from ..errors import ConfigError, InputError, UnknownNameError
from ..models.compat import accepts_argument, cache_argument
from ..models.placement import find_input_device
from ..selection import get_selector
from .cache import RankKVCache
from .replay import ReplayPlan, ReplayPrompt
from .resolve import choose_for_questions

#: Inputs of a model's forward that say nothing beyond the ids.
_TEXT_INPUTS = {"position_ids", "token_type_ids", "logits_to_keep", "use_cache"}


def compress(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> RankKVCache:
    """Prefill a context once and return its compressed cache, ready for many questions.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : Tensor
        ``[batch, token]`` or ``[token]``: the context.
    attention_mask : Tensor, optional
        ``[batch, token]``, 0 at padding (on the left).
    **options
        ``config=``, or options of :class:`~rankkv.RankKVConfig`.
        ``tokenizer=``: the model's tokenizer.  Selectors that replay the context (``"kvzip"``, ``"kvgrad"``) need
        it for their instruction to the model; a :class:`~rankkv.cache.ReplayPrompt` gives that instruction as ids.
        Also further inputs of the model, such as ``pixel_values`` from a processor.  Questions come later here, so
        ``selector="auto"`` is ``"echo"`` where the model allows it; ``summary()`` says where it does not.

    Returns
    -------
    RankKVCache
        A cache that has seen every token of ``input_ids``.  ``model(input_ids=continuation, cache=cache.copy())``
        scores a continuation; ``model.generate`` of the full ids answers a question after the context.

    Raises
    ------
    InputError
        If the context is empty, or holds images and the selector replays it.
    ConfigError
        If the selector replays the context and no tokenizer is given.
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
    tokenizer = options.pop("tokenizer", None)
    names = {option.name for option in fields(RankKVConfig)} | {"config"}
    model_inputs = {name: options.pop(name) for name in list(options) if name not in names}
    for name in model_inputs:
        if not accepts_argument(model, name):
            raise UnknownNameError.of("option", name, names)
    config, remarks = choose_for_questions(join_options(options), model)
    cache = build_cache(model, input_ids, tokenizer, model_inputs, config=config)
    cache.remarks += remarks
    run_prefill(model, cache, input_ids, attention_mask, model_inputs)
    cache.prompt_ids = input_ids.cpu()
    return cache.finish()


def build_cache(
    model: Any,
    input_ids: Tensor,
    tokenizer: Any = None,
    model_inputs: Iterable[str] = (),
    **options: Any,
) -> RankKVCache:
    """Build the empty cache for a prompt that is known before its prefill, as a replay needs it.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : Tensor
        ``[batch, token]``: the prompt.
    tokenizer : PreTrainedTokenizerBase or ReplayPrompt, optional
        See :func:`compress`.
    model_inputs : iterable of str
        Names of the model's inputs beside the ids.
    **options
        As for :class:`~rankkv.RankKVCache`.

    Raises
    ------
    ConfigError
        If the selector replays the prompt and no tokenizer is given.
    InputError
        If it does, and the prompt is not in the ids alone.
    """
    config = options.get("config")
    selector = get_selector(options.get("selector", AUTO_SELECTOR) if config is None else config.selector)
    if not selector.replays:
        return RankKVCache(model, **options)
    if tokenizer is None:
        raise ConfigError(
            f"selector {selector.name!r} asks the model to repeat the prompt, and needs the tokenizer for that: give "
            "tokenizer=tokenizer, or a rankkv.cache.ReplayPrompt with the ids of the instruction."
        )
    others = sorted(name for name in model_inputs if name not in _TEXT_INPUTS)
    if others:
        raise InputError(
            f"selector {selector.name!r} repeats token ids, and {others[0]} is not made of them: use another selector "
            "for this prompt."
        )
    return RankKVCache.for_prompt(model, ReplayPlan(input_ids.cpu(), ReplayPrompt.of(tokenizer)), **options)


def check_same_prompt(cache: Any, input_ids: Tensor, *over_all: Tensor | None) -> None:
    """Raise if ids given with a compressed cache do not begin with the prompt that it holds, where that is known.

    Parameters
    ----------
    cache : Cache
        Any cache; only a RankKVCache whose prompt is known is checked.
    input_ids : Tensor
        ``[batch, token]``: all ids, the prompt's included; or new ids alone, with a longer mask.
    *over_all : Tensor, optional
        Mask and positions, ``[batch, all tokens]``: longer ones show that the ids are new ones alone.

    Raises
    ------
    InputError
        If they are shorter than the prompt, or differ from it.
    """
    known = getattr(cache, "prompt_ids", None)
    new_alone = any(given is not None and given.shape[-1] > input_ids.shape[-1] for given in over_all)
    if known is None or new_alone or input_ids.shape[0] % len(known):
        return
    known = known.repeat_interleave(input_ids.shape[0] // len(known), dim=0)
    given = input_ids[:, : known.shape[1]].cpu()
    if given.shape != known.shape or not bool((given == known).all()):
        raise InputError(
            f"input_ids ({input_ids.shape[1]} tokens) do not begin with the {known.shape[1]} tokens that this cache "
            "was compressed from: give the same prompt and what follows it, or build a new cache for another prompt."
        )


def check_input_ids(input_ids: Any, attention_mask: Any = None) -> Tensor:
    """Return ``input_ids`` as ``[batch, token]`` if they are a valid prompt.

    Raises
    ------
    InputError
        If they are not integers, not 1-D or 2-D, or empty, or if the mask has another shape.
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
                f"attention_mask must be a tensor of the shape of input_ids {tuple(input_ids.shape)}, got {given}."
            )
    return input_ids if input_ids.dim() == 2 else input_ids[None]


def run_prefill(
    model: Any,
    cache: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    model_inputs: Mapping[str, Any] = MappingProxyType({}),
) -> Tensor:
    """Run one forward over ``input_ids`` that fills ``cache``, without gradients.

    Parameters
    ----------
    model : PreTrainedModel
        The language model.
    cache : Cache
        An empty cache.
    input_ids, attention_mask : Tensor
        ``[batch, token]``, on any device, padded on the left.
    model_inputs : mapping
        More arguments of the model's forward, such as ``pixel_values``.

    Returns
    -------
    Tensor
        Logits after the last token, ``[batch, vocabulary]``.
    """
    input_ids = input_ids.to(find_input_device(model))
    options: dict[str, Any] = {"use_cache": True, **model_inputs, **cache_argument(cache)}
    if accepts_argument(model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    if attention_mask is not None:
        attention_mask = attention_mask.view(input_ids.shape).to(input_ids.device)
        options["attention_mask"] = attention_mask
        # With images the model computes positions of several axes itself.
        if not model_inputs and accepts_argument(model, "position_ids"):
            # Positions count the real tokens of a row, as in generate().
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=input_ids, **options).logits[:, -1]
