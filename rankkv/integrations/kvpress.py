"""RankKVPress: RankKV as a press in kvpress' own pipeline and evaluation programs.

``from rankkv.integrations.kvpress import RankKVPress`` imports kvpress.  kvpress then puts its own attention functions
before the ones registered with transformers, in every model of the process.  Importing this module alone does not.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..cache.cache import RankKVCache
from ..cache.layer import RankKVLayer
from ..cache.masks import project_mask
from ..config import RankKVConfig
from ..errors import ConfigError, InputError, UnsupportedModelError
from ..observe import hook
from ..observe.call import AttentionCall
from ..observe.hook import AttentionObserver
from ..utils.hub import require


class PressedAttention(AttentionObserver):
    """Give each attention call of one cache, or of its copies, its own mask.

    transformers builds one mask for all layers, as wide as its first layer; it is ignored.  All kept tokens precede all
    later ones, so a query sees every kept token and the later tokens up to its own.

    Parameters
    ----------
    model : PreTrainedModel
        The model that runs on the cache.
    """

    def __init__(self, model: Any) -> None:
        self._backend_of = model.config.get_text_config(decoder=True)
        self._attended: dict[int, weakref.ref[Tensor]] = {}
        hook.watch_for(self, model)

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the layer's attention with a mask of its own width."""
        self._attended[layer_idx] = weakref.ref(call.key)
        return self.attend_shared(layer_idx, call)

    def find_attended(self, key: Tensor) -> int | None:
        """Return the layer whose attention last used exactly this key tensor, or None."""
        return next((index for index, attended in self._attended.items() if attended() is key), None)

    def attend_shared(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the attention of a layer that attends to the keys of layer ``layer_idx``."""
        batch, slots = call.key.shape[0], call.key.shape[-2]
        positions = torch.arange(slots, device=call.key.device).expand(batch, 1, -1)
        backend = self._backend_of._attn_implementation
        mask = project_mask(None, positions, None, call.steps, call.query.shape[1], backend, call.query.dtype)
        return replace(call, mask=mask).run()

    def __deepcopy__(self, memo: dict[int, Any]) -> PressedAttention:
        # It holds no state of a conversation, and only this object is registered with the attention hook.
        return self


class PressedLayer(DynamicLayer):
    """A layer of transformers' own kind that starts with the kept tokens of a compressed layer.

    Parameters
    ----------
    shared : PressedAttention
        The observer that all layers of the cache share.
    layer_idx : int
        Index of the layer in the model.
    kept : RankKVLayer
        The compressed layer; its tensors are used without a copy.
    """

    def __init__(self, shared: PressedAttention, layer_idx: int, kept: RankKVLayer) -> None:
        super().__init__()
        self.keys, self.values = kept.keys, kept.values
        self.dtype, self.device, self.is_initialized = kept.dtype, kept.device, True
        self._shared = shared
        self._layer_idx = layer_idx

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and announce the next attention call of this layer to the hook."""
        states = super().update(key_states, value_states, *args, **kwargs)
        hook.hand_off(self._shared, self._layer_idx, states[0].shape[-2])
        return states


def build_pressed_layers(cache: RankKVCache, model: Any) -> list[PressedLayer]:
    """Build one layer for each layer of a compressed cache, with the same key and value tensors.

    Raises
    ------
    InputError
        If the rows of a batch keep different numbers of tokens: the layers cannot hold empty slots.
    """
    if any(layer.compute_slot_valid() is not None for layer in cache.layers):
        raise InputError(
            "the rows of this batch keep different numbers of tokens, and a press' cache cannot hold empty slots: "
            "give one prompt at a time, or use a RankKVCache."
        )
    shared = PressedAttention(model)
    return [PressedLayer(shared, index, layer) for index, layer in enumerate(cache.layers)]


INSTALL = 'pip install "kvpress==0.5.5"'


@dataclass
class _RankKVPress:
    """Compress a context with RankKV, as a kvpress press.

    The prefill of the context runs on a :class:`~rankkv.RankKVCache`.  Then every layer of the caller's own cache gets
    the kept keys and values and holds no others.  Layers differ in length, and each layer's attention gets a mask of
    its own length.  So any attention backend works, including new turns of several tokens.  A layer's
    ``get_seq_length()`` is the number of tokens it holds, as with every press: the caller has to pass positions, as
    kvpress' pipeline does.

    Parameters
    ----------
    compression_ratio : float, default 0.0
        Fraction of the cache **removed**, in [0, 1), as everywhere in kvpress.  RankKV's own ``compression_ratio`` is
        one minus this.  It is the mean over the layers; budgets differ.
    selector, strategy, strategy_options, scope, aggregation, window_size, sink_size, min_budget
        As in :class:`~rankkv.RankKVConfig`, with the same defaults.

    Attributes
    ----------
    budgets : list of int
        Tokens each layer kept of the last context.
    layer_ranks : list of float
        Effective ranks of these layers; empty if the strategy needs none.

    Raises
    ------
    MissingDependencyError
        If kvpress is not installed.
    ConfigError, UnknownNameError
        If an option is outside its range or not registered; when the press is built or next used.
    UnsupportedModelError
        When used: if the model's attention cannot be observed, or a layer is not a full-attention layer.  The pipeline
        removes an answer by cropping each layer to its earlier length, which sliding and linear layers do not support.
    InputError
        When used: if the prompt is padded, the rows of a batch keep different numbers of tokens, or the given cache is
        not transformers' ``DynamicCache``.

    Notes
    -----
    kvpress keeps ``int(tokens * (1 - compression_ratio))`` tokens in each layer; RankKV keeps
    ``round(tokens * layers * (1 - compression_ratio))`` in all layers together.

    A press that wraps others layer by layer (``ComposedPress``, ``PerLayerCompressionPress``) cannot wrap this one:
    budgets follow from all layers.

    Examples
    --------
    With kvpress installed::

        from transformers import pipeline
        from rankkv.integrations.kvpress import RankKVPress

        pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
        pipe(context, question=question, press=RankKVPress(compression_ratio=0.7))["answer"]
    """

    compression_ratio: float = 0.0
    selector: Any = "snapkv"
    strategy: str | None = None
    strategy_options: Mapping[str, Any] | None = None
    scope: str = "evictable"
    aggregation: str = "concat"
    window_size: int = 32
    sink_size: int = 4
    min_budget: int | None = None
    budgets: list[int] = field(default_factory=list, init=False, repr=False)
    layer_ranks: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self._build_config()

    def _build_config(self) -> RankKVConfig:
        removed = self.compression_ratio
        if isinstance(removed, bool) or not isinstance(removed, int | float) or not 0.0 <= removed < 1.0:
            raise ConfigError(
                f"compression_ratio={removed!r} is outside [0, 1): give the fraction of the cache that is removed, as "
                "for every press (0.7 keeps 30%)."
            )
        given = {item.name: getattr(self, item.name) for item in fields(_RankKVPress) if item.init}
        # kvpress' pipeline crops layers, which works only if all heads keep the same number of tokens.
        return RankKVConfig(**given | {"compression_ratio": 1.0 - removed, "head_budgets": None})

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Compress the prompt that ``model`` gets on an empty cache, within this context.

        Parameters
        ----------
        model : PreTrainedModel
            The causal language model, not its base model.
        """
        config = self._build_config()
        running: list[tuple[RankKVCache, DynamicCache]] = []

        # The caller's cache is swapped for ours before the prefill, and gets the kept tokens after it.
        def start(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            running.clear()
            given = kwargs.get("past_key_values")
            if given is None and kwargs.get("use_cache") is not False:
                given = DynamicCache()
            if given is None or given.get_seq_length():
                return None
            _check_prompt(given, kwargs.get("attention_mask"))
            running.append((_build_cache(model, config), given))
            return args, {**kwargs, "past_key_values": running[0][0]}

        def finish(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if not running:
                return output
            ours, given = running.pop()
            self.budgets, self.layer_ranks = ours.finish().budgets, ours.layer_ranks
            given.layers = build_pressed_layers(ours, model)
            return _hand_back(output, ours, given)

        decoder = _find_decoder(model)
        handles = [
            decoder.register_forward_pre_hook(start, with_kwargs=True),
            decoder.register_forward_hook(finish, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to compress one layer by itself.

        Raises
        ------
        ConfigError
            Always: budgets follow from all layers.
        """
        raise ConfigError(
            "RankKVPress budgets all layers together, so another press cannot run it layer by layer: pass it alone to "
            "the pipeline, or use `with press(model):`."
        )

    compress = forward_hook


def _find_decoder(model: Any) -> Any:
    base = model.base_model
    return getattr(base, "language_model", base)


def _build_cache(model: Any, config: RankKVConfig) -> RankKVCache:
    cache = RankKVCache(model, config=config)
    other = [index for index, layer in enumerate(cache.layers) if not isinstance(layer, RankKVLayer)]
    if other:
        raise UnsupportedModelError(
            f"layers {other} of {type(model).__name__} are not full-attention layers, so kvpress' pipeline cannot crop "
            "them after an answer: use rankkv.compress() and generate() with this model."
        )
    return cache


def _check_prompt(given: Any, attention_mask: Any) -> None:
    if type(given) is not DynamicCache or getattr(given, "offloading", False):
        raise InputError(
            f"this press needs transformers' DynamicCache without offloading, got {type(given).__name__}: omit the "
            "pipeline's `cache` (a RankKVCache compresses by itself and needs no press)."
        )
    if attention_mask is None:
        return
    is_plain = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
    if not is_plain or not bool(attention_mask.bool().all()):
        raise InputError(
            "this press takes prompts without padding: give one prompt at a time, or use a RankKVCache, which supports "
            "padded batches."
        )


def _hand_back(output: Any, ours: RankKVCache, given: DynamicCache) -> Any:
    if getattr(output, "past_key_values", None) is ours:
        output.past_key_values = given
    elif isinstance(output, tuple):
        output = tuple(given if item is ours else item for item in output)
    return output


@functools.cache
def _build_class() -> type:
    require("kvpress", INSTALL, "RankKVPress")
    from kvpress import BasePress

    return type(
        "RankKVPress", (_RankKVPress, BasePress), {"__module__": __name__, "__doc__": _RankKVPress.__doc__}
    )


def __getattr__(name: str) -> Any:
    """Build the class on first use, since it inherits from a class of kvpress."""
    if name != "RankKVPress":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _build_class()
