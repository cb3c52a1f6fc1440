"""Record of one prefill, from which compressed caches of any option are cut without running the model again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..cache.cache import RankKVCache
from ..cache.prefill import build_cache, check_input_ids, run_prefill
from ..cache.replay import ReplayPlan, ReplayPrompt, replay_prompt
from ..cache.resolve import choose_for_questions
from ..config import join_options
from ..errors import ConfigError
from ..models.placement import find_input_device
from ..observe import hook
from ..observe.call import AttentionCall, observe
from ..observe.hook import AttentionObserver
from ..observe.observation import Observation
from ..selection import Selector


class _RecordingCache(AttentionObserver, DynamicCache):
    """Extend the model's plain cache by an observation of each full-attention layer."""

    layers: list[Any]

    def __init__(self, model: Any) -> None:
        super().__init__(config=model.config.get_text_config(decoder=True))
        self.observed = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        self.observations: dict[int, Observation] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.observed:
            hook.hand_off(self, layer_idx, states[0].shape[-2])
        return states

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        output = call.run()
        # The sizes are placeholders: `PrefillRecord.observe` sets those of each cache.
        with torch.no_grad():
            self.observations[layer_idx] = observe(
                layer_idx,
                *call.arguments,
                kv_heads=self.layers[layer_idx].keys.shape[1],
                window_size=1,
                sink_size=0,
            )
        return output


class _MemoizedSelector:
    """Wrap a selector so that each score is computed once and looked up afterwards."""

    def __init__(self, selector: Selector, scores: dict[tuple[Any, ...], Tensor]) -> None:
        self._selector = selector
        self._scores = scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._selector, name)

    def compute_lasting_scores(self, observation: Observation) -> Tensor:
        return self._look_up("lasting", observation, self._selector.compute_lasting_scores, observation)

    def refine(self, scores: Tensor, observation: Observation) -> Tensor:
        return self._look_up("refined", observation, self._selector.refine, scores, observation)

    def _look_up(
        self, stage: str, observation: Observation, compute: Callable[..., Tensor], *arguments: Any
    ) -> Tensor:
        key = (
            stage,
            str(self._selector),
            observation.layer_idx,
            observation.window_size,
            observation.sink_size,
        )
        if key not in self._scores:
            self._scores[key] = compute(*arguments)
        return self._scores[key]


class PrefillRecord:
    """Hold a context that was prefilled once, and build compressed caches from it.

    :func:`record_prefill` returns one.  Selector scores and window attention are computed once and shared by all
    caches.

    Attributes
    ----------
    model : PreTrainedModel
        The model that prefilled the context.
    input_ids, attention_mask : Tensor
        The context, ``[batch, token]``.
    last_logits : Tensor
        Logits after the context's last token, ``[batch, vocabulary]`` float32.  They predict the next token before
        any cache is read.
    tokenizer : PreTrainedTokenizerBase, ReplayPrompt or None
        What selectors that replay the context need, see :func:`rankkv.compress`.
    """

    def __init__(
        self,
        model: Any,
        cache: _RecordingCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        last_logits: Tensor,
        tokenizer: Any = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.last_logits = last_logits
        self._observations = cache.observations
        self._plain = cache
        self._windows: dict[tuple[int, int], dict[int, Observation]] = {}
        self._scores: dict[tuple[Any, ...], Tensor] = {}
        self._replays: dict[tuple[str, int], dict[int, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens of the context, padding included."""
        return self.input_ids.shape[1]

    def observe(self, window_size: int, sink_size: int) -> dict[int, Observation]:
        """Return the observation of each compressible layer for these sizes in tokens, by layer index."""
        size = (window_size, sink_size)
        if size not in self._windows:
            self._windows[size] = {
                index: replace(observation, window_size=window_size, sink_size=sink_size, memory={})
                for index, observation in self._observations.items()
            }
        return self._windows[size]

    def build_full_cache(self) -> DynamicCache:
        """Build the model's plain cache after the context: the reference of all comparisons."""
        full = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        full.layers = copy.deepcopy(self._plain.layers)
        return full

    def build_cache(self, **options: Any) -> RankKVCache:
        """Build the cache that ``rankkv.compress(model, input_ids, **options)`` would return.

        Parameters
        ----------
        **options
            Options of :class:`~rankkv.RankKVCache`.

        Returns
        -------
        RankKVCache
            Compressed, and independent of the record and of other caches.

        Raises
        ------
        ConfigError
            If ``prefill`` is not "single": a record holds one whole prefill.
        """
        config, remarks = choose_for_questions(join_options(options), self.model)
        cache = build_cache(self.model, self.input_ids, self.tokenizer, config=config)
        cache.remarks += remarks
        config = cache.config
        if config.prefill != "single":
            raise ConfigError(
                f"prefill={config.prefill!r} must be 'single', because a recorded prefill ran in one forward: use "
                "prefill='single'."
            )
        observations = self.observe(config.window_size, config.sink_size)
        if cache.selector.replays:
            observations = self._replay(cache.selector, observations, config.sink_size)
        selector = cast(Selector, _MemoizedSelector(cache.selector, self._scores))
        return cache.take_prefill(observations, self._plain.layers, selector)

    def _replay(
        self, selector: Selector, observations: dict[int, Observation], sink_size: int
    ) -> dict[int, Observation]:
        """Return the observations with the scores of a replay; a selector replays once for each number of sinks."""
        key = (str(selector), sink_size)
        if key not in self._replays and observations:
            plan = ReplayPlan(self.input_ids.cpu(), ReplayPrompt.of(self.tokenizer))
            first = next(iter(observations.values()))
            self._replays[key] = replay_prompt(
                self.model, self._plain.layers, list(observations), plan, first.row_start, selector, sink_size
            )
        scores = self._replays.get(key, {})
        return {index: replace(one, replayed=scores[index]) for index, one in observations.items()}


def record_prefill(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, tokenizer: Any = None
) -> PrefillRecord:
    """Prefill a context with the model's plain cache and record the inputs of every layer's attention.

    Memory: the queries, keys and values of all layers stay, about three times a plain cache.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids, attention_mask : Tensor
        ``[batch, token]``, padding on the left.
    tokenizer : PreTrainedTokenizerBase or ReplayPrompt, optional
        Needed by selectors that replay the context, see :func:`rankkv.compress`.

    Returns
    -------
    PrefillRecord
        Builds caches of any option.

    Raises
    ------
    InputError
        If the ids are empty, have a wrong shape, or do not match the mask.
    UnsupportedModelError
        If the model's attention cannot be observed.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> record = record_prefill(model, torch.arange(60)[None])
    >>> [sum(record.build_cache(compression_ratio=ratio).budgets) for ratio in (0.5, 0.8)]
    [60, 96]
    """
    input_ids = check_input_ids(input_ids, attention_mask).to(find_input_device(model))
    hook.check_observable(model)
    cache = _RecordingCache(model)
    hook.watch_for(cache, model)
    last_logits = run_prefill(model, cache, input_ids, attention_mask).float()
    hook.check_not_pending(cache)
    return PrefillRecord(model, cache, input_ids, attention_mask, last_logits, tokenizer)
