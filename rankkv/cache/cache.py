"""RankKVCache: goes into ``model.generate()`` and keeps of each layer what its rank and its budget allow."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..budget.plan import BudgetPlan
from ..config import RankKVConfig
from ..errors import CacheStateError, ConfigError, InputError
from ..models.placement import find_layer_devices
from ..observe import hook as attention
from ..observed_cache import ObservedCache
from . import saving as cache_files
from .report import compute_cache_bytes, compute_full_cache_bytes, count_slots, summarize


class RankKVCache(ObservedCache):
    """A KV cache that is compressed once, at the end of the prefill, layer by layer.

    Pass it to the ordinary ``model.generate(..., cache=RankKVCache(model))`` (``past_key_values=`` before transformers
    5.24).  The first forward on the empty cache is the prefill: after each layer's own attention its effective rank is
    computed, budgets follow from the ranks of the layers so far, and the tokens the selector scores lowest are
    released; later tokens are kept whole.  Positions continue from the tokens *seen*, so the first generated token
    always equals the one of the uncompressed model.  The parameters that are not listed here are those of
    :class:`~rankkv.RankKVConfig`.

    Parameters
    ----------
    model : PreTrainedModel
        The model the cache is for; only its config and attention backend are read, nothing is stored on it.
    compression_ratio : float, default 0.3
        Fraction of the KV cache kept, in (0, 1].  kvpress gives this name to the fraction *removed*.
    budget : int, optional
        Average number of tokens a layer keeps; overrides ``compression_ratio``.
    selector : str or Selector, default "snapkv"
        Token selection method (:data:`rankkv.selection.SELECTORS`).
    strategy : str, optional
        Budget strategy; None is the measured default (``"distortion"``; with a known profile ``"blend"``).
    scope : {"evictable", "window", "full"}, default "evictable"
        Part of the attention whose effective rank is taken.
    aggregation : str, default "concat"
        How the heads of a layer are joined for its rank.
    strategy_options : mapping, optional
        Options of the strategy.
    window_size : int, default 32
        Number of last queries observed.
    sink_size : int, default 4
        Number of first tokens protected as attention sinks.
    profile : {"auto"}, RankProfile, path or None, default "auto"
        Measured sensitivity of the model's layers: the known one of this model unless ``strategy`` is given, one of
        yours, or None for no calibration.
    min_budget : int, optional
        Fewest tokens a layer keeps; None means ``max(16, average budget // 2)``.
    config : RankKVConfig, optional
        All options in one frozen object, instead of the single ones.

    Raises
    ------
    ConfigError, UnknownNameError
        If an option lies outside its range or is not registered.
    UnsupportedModelError
        If the model's attention cannot be observed, or it has no KV cache.
    ProfileError
        If ``profile`` belongs to another model, or the strategy needs one and none is known.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> cache = RankKVCache(model, compression_ratio=0.5)
    >>> with torch.no_grad():
    ...     output = model(torch.arange(60)[None], past_key_values=cache)
    >>> sum(cache.kept_lengths), cache.seen_tokens
    (60, 60)
    """

    def __init__(
        self,
        model: Any,
        compression_ratio: float = 0.3,
        *,
        budget: int | None = None,
        selector: Any = "snapkv",
        strategy: str | None = None,
        scope: str = "evictable",
        aggregation: str = "concat",
        strategy_options: Mapping[str, Any] | None = None,
        window_size: int = 32,
        sink_size: int = 4,
        decode: str = "grow",
        decode_interval: int = 128,
        positions: str = "original",
        prefill: str = "single",
        recompress_turns: bool = False,
        storage: str = "full",
        merging: str | None = None,
        profile: Any = "auto",
        min_budget: int | None = None,
        head_budgets: str | None = "auto",
        head_floor: float = 0.2,
        protect: Any = None,
        config: RankKVConfig | None = None,
    ) -> None:
        given = RankKVConfig(
            compression_ratio=compression_ratio,
            budget=budget,
            selector=selector,
            strategy=strategy,
            scope=scope,
            aggregation=aggregation,
            strategy_options=strategy_options,
            window_size=window_size,
            sink_size=sink_size,
            decode=decode,
            decode_interval=decode_interval,
            positions=positions,
            prefill=prefill,
            recompress_turns=recompress_turns,
            storage=storage,
            merging=merging,
            profile=profile,
            min_budget=min_budget,
            head_budgets=head_budgets,
            head_floor=head_floor,
            protect=protect,
        )
        if config is not None and given != RankKVConfig():
            raise ConfigError(
                "give either config=RankKVConfig(...) or single options, not both: one would be ignored."
            )
        super().__init__(model, config or given)

    @property
    def seen_tokens(self) -> int:
        """Tokens seen so far, evicted ones included (a padded batch: its padded width)."""
        return self.get_seq_length()

    @property
    def kept_lengths(self) -> list[int]:
        """Slots each model layer holds, one entry a layer (a layer without keys: 0; head budgets: a head's average)."""
        return [count_slots(layer) for layer in self.layers]

    @property
    def kept_per_head(self) -> list[list[list[int]]]:
        """Tokens that every kv head keeps, ``[compressible layer][row][kv_head]``."""
        return [self.layers[index].kept_per_head for index in self.layer_indices]

    @property
    def plans(self) -> list[BudgetPlan]:
        """How the last compression came to its budgets, one plan a row; empty before the prefill."""
        return self._flow.compressor.plans

    @property
    def row_start(self) -> list[int]:
        """Padding before the first real token of each row; empty before the prefill."""
        return list(self._flow.row_start or [])

    @property
    def budgets_per_row(self) -> list[list[int]]:
        """Tokens kept of the prompt, ``[row][compressible layer]``; empty before the prefill."""
        return [list(plan.budgets) for plan in self.plans]

    @property
    def layer_ranks_per_row(self) -> list[list[float]]:
        """Effective ranks, ``[row][compressible layer]``; empty lists where the strategy needs none."""
        return [plan.layer_ranks for plan in self.plans]

    @property
    def layer_measures_per_row(self) -> list[list[float]]:
        """What the strategy measured, ``[row][compressible layer]``; empty lists where it measures nothing.

        For most strategies that is the effective rank; for ``"cake"`` the layer's preference, and so on
        (:attr:`rankkv.budget_allocation.Strategy.measure`).  Where a layer is measured by several numbers it is the
        weight they gave it.
        """
        return [list(plan.layer_measures) for plan in self.plans]

    @property
    def budgets(self) -> list[int]:
        """Tokens kept of the prompt by each compressible layer (row 0)."""
        rows = self.budgets_per_row
        return rows[0] if rows else []

    @property
    def layer_ranks(self) -> list[float]:
        """Effective rank of each compressible layer (row 0); empty where the strategy measures no rank."""
        rows = self.layer_ranks_per_row
        return rows[0] if rows else []

    @property
    def layer_measures(self) -> list[float]:
        """What the strategy measured of each compressible layer (row 0); see :attr:`layer_measures_per_row`."""
        rows = self.layer_measures_per_row
        return rows[0] if rows else []

    def cache_bytes(self) -> int:
        """Return the bytes of all keys and values held, each distinct storage counted once."""
        return compute_cache_bytes(self)

    def full_cache_bytes(self) -> int:
        """Return the bytes the model's plain cache would hold after the same tokens."""
        return compute_full_cache_bytes(self)

    def _fingerprint(self) -> str:
        model = self._model()
        if model is None:
            raise CacheStateError(
                "the model of this cache is gone: keep a reference to it while the cache is in use."
            )
        return cache_files.compute_model_fingerprint(model)

    def copy(self) -> RankKVCache:
        """Return an independent copy: what is generated on one does not reach the other."""
        attention.check_not_pending(self)
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers)
        twin._flow = self._flow.copy()
        twin._attended, twin._step_masks = {}, {}
        twin._packers = {index: packer.copy() for index, packer in self._packers.items()}
        twin._watch(self._model())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> RankKVCache:
        return self.copy()

    def rewind(self, seen_tokens: int) -> RankKVCache:
        """Drop the newest tokens until ``seen_tokens`` have been seen, and return the cache.

        Raises
        ------
        CacheStateError
            If that would need tokens that were evicted, or more tokens than were seen.
        """
        if not 0 < seen_tokens <= self.seen_tokens:
            raise CacheStateError(
                f"cannot rewind to {seen_tokens} tokens: the cache has seen {self.seen_tokens}; give 1 to that many."
            )
        if seen_tokens < self.seen_tokens:
            self.crop(seen_tokens - self.seen_tokens)
        return self

    def finish(self) -> RankKVCache:
        """Compress a prompt that came in chunks, check that the prefill is complete, and return the cache."""
        attention.check_not_pending(self)
        self._check_complete()
        self._flow.finish(self.layers)
        return self

    def save(self, path: str | Path) -> Path:
        """Write the compressed cache to one safetensors file and return its path.

        Raises
        ------
        CacheStateError
            If the prefill is not complete, or a layer's state is no keys and values.
        """
        return cache_files.save_cache(self, path, self._fingerprint())

    @classmethod
    def load(cls, path: str | Path, model: Any) -> RankKVCache:
        """Read a cache that :meth:`save` wrote, for the same model.

        Raises
        ------
        InputError
            If the file is missing, no saved cache, or one of another model.
        """
        header = cache_files.read_cache_header(path)
        if cache_files.compute_model_fingerprint(model) != header.get("fingerprint"):
            raise InputError(
                f"{path} was saved from another model (or the same in another dtype): keys and values of one model "
                "mean nothing to another. Load it with the model it came from."
            )
        try:
            cache = cls(model, config=cache_files.restore_config(header))
            cache_files.restore_state(cache, path, header, find_layer_devices(model))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} describes a cache that this version of RankKV cannot build ({error}): write it again with "
                "save()."
            ) from error
        return cache

    def summary(self) -> str:
        """Return a short account: tokens and bytes kept, and rank and budget of each layer (row 0)."""
        return summarize(self)
