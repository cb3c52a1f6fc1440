"""Calibration method "measured": one continuation per layer, ratio and head of a text, all from one prefill."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.cache import RankKVCache
from ..cache.masks import can_mask_heads
from ..cache.prefill import run_prefill
from ..errors import UnsupportedModelError
from ..models.compat import cache_argument, find_decoder_layers
from ..models.tensor_parallel import find_head_shards
from .settings import BASE_RATIO, RATIOS

#: Scope and aggregation of the ranks that a profile records.
RANKS = (
    ("evictable", "concat"),
    ("evictable", "mean"),
    ("evictable", "mass_normalized"),
    ("window", "concat"),
)


@dataclass(frozen=True)
class Reference:
    """Predictions of the uncompressed model, the reference of all distances."""

    targets: Tensor
    log_probabilities: Tensor
    probabilities: Tensor
    nll: float

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Reference:
        """Build the reference from logits ``[token, vocabulary]`` and the next tokens ``[token]``."""
        log_probabilities = logits.float().log_softmax(-1)
        nll = -log_probabilities.gather(-1, targets[:, None]).mean()
        return cls(targets, log_probabilities, log_probabilities.exp(), float(nll))

    def compute_distances(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the excess loss and KL(full || compressed), nats per token, one number each."""
        other = logits.float().log_softmax(-1)
        nll = -other.gather(-1, self.targets[:, None]).mean()
        # Subtract before summing: the difference of two long sums carries float32 noise of a millinat.
        divergence = (self.probabilities * (self.log_probabilities - other)).sum(-1)
        return nll - self.nll, divergence.mean()

    def compare(self, logits: Tensor) -> tuple[float, float]:
        """Compute the same distances as plain floats."""
        loss, divergence = self.compute_distances(logits)
        return float(loss), float(divergence)


class Continuation:
    """Runs a continuation on many caches, and layers below the first one that differs only once."""

    def __init__(self, model: Any, input_ids: Tensor) -> None:
        self._model = model
        self._input_ids = input_ids
        self._layers = find_decoder_layers(model)
        self._outputs: list[Any] = []

    @torch.no_grad()
    def run(self, cache: Any, first: int = 0) -> Tensor:
        """Return logits ``[token, vocabulary]``; layers below ``first`` return their outputs of `remember`."""
        with self._replay(first if self._layers else 0):
            return self._model(self._input_ids, **cache_argument(cache)).logits[0, :-1]

    def remember(self, cache: Any) -> Tensor:
        """Run the whole model and keep the output of every layer."""
        outputs: list[Any] = []
        hooks = [
            layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
            for layer in self._layers
        ]
        try:
            logits = self.run(cache)
        finally:
            for hook in hooks:
                hook.remove()
        self._outputs = outputs
        return logits

    def check_replay(self, cache: Any, logits: Tensor) -> None:
        """Replay half of the layers once, and turn replay off if the logits differ from ``logits``."""
        if not self._layers or len(self._outputs) != len(self._layers):
            self._layers = []
            return
        try:
            replayed = self.run(cache, len(self._layers) // 2)
        except Exception:
            # Replay fails if a later layer reuses a skipped layer's keys. Run the whole model then: real errors show
            # there.
            self._layers = []
            return
        if not torch.allclose(replayed, logits, rtol=1e-3, atol=1e-3):
            self._layers = []

    @contextmanager
    def _replay(self, first: int) -> Iterator[None]:
        replaced = list(zip(self._layers[:first], self._outputs, strict=False))
        # A layer may have a `forward` of its own already: accelerate sets one that moves arguments and weights.
        own = [vars(layer).get("forward") for layer, _ in replaced]
        try:
            for layer, output in replaced:
                layer.forward = lambda *_args, _output=output, **_options: _output
            yield
        finally:
            for (layer, _), forward in zip(replaced, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


class TextPrefill:
    """One prefill, the source of caches with any options."""

    def __init__(self, model: Any, input_ids: Tensor, selector: Any) -> None:
        self._model, self._input_ids, self._selector = model, input_ids, selector
        self._record: RankKVCache | None = None
        try:
            record = RankKVCache(model, 1.0, selector=selector, prefill="chunked", strategy="uniform")
            run_prefill(model, record, input_ids, None)
            self._record = record
        except UnsupportedModelError:
            # These models attend to other keys than they cache, so each cache needs a prefill of its own.
            pass

    def build(self, **options: Any) -> RankKVCache:
        """Build a compressed cache of the text with these options."""
        if self._record is None:
            cache = RankKVCache(self._model, selector=self._selector, **options)
            run_prefill(self._model, cache, self._input_ids, None)
            return cache.finish()
        return self._record.copy_with(**options).finish()

    def measure_ranks(self) -> dict[str, list[float]]:
        """Measure the rank of each layer, by ``"scope/aggregation"``."""
        found = {}
        for scope, aggregation in RANKS:
            cache = self.build(
                compression_ratio=1.0, strategy="proportional", scope=scope, aggregation=aggregation
            )
            found[f"{scope}/{aggregation}"] = cache.layer_ranks
        return found

    def build_uniform(self, budget: int) -> RankKVCache:
        """Build a cache in which every layer and head keeps ``budget`` tokens."""
        return self.build(budget=budget, min_budget=1, strategy="uniform")


def _replace_layer(cache: RankKVCache, layer_idx: int, layer: Any) -> RankKVCache:
    """Return a copy of ``cache`` with one layer replaced."""
    copied = cache.copy()
    copied.layers[layer_idx] = copy.deepcopy(layer)
    return copied


def can_measure_heads(model: Any) -> bool:
    """Return True if this process has all heads and the attention can mask each head alone."""
    backend = model.config.get_text_config(decoder=True)._attn_implementation
    return find_head_shards(model) is None and can_mask_heads(backend)


def mark_kept(layer: Any, kept: Any) -> Tensor:
    """Mark the tokens of a full layer that a compressed layer kept, ``[1, kv_head, token]`` bool."""
    heads = layer.keys.shape[1]
    tokens = torch.zeros(1, heads, layer.seen, dtype=torch.bool, device=layer.keys.device)
    return tokens.scatter_(-1, kept.compute_positions().expand(-1, heads, -1), True)


def _give_head_back(layer: Any, kept: Any, head: int) -> Any:
    """Return a copy of a full layer in which all other heads see only the tokens that ``kept`` holds."""
    copied = copy.deepcopy(layer)
    seen = mark_kept(layer, kept)
    seen[:, head] = True
    copied.kept_positions = torch.arange(copied.seen, device=copied.keys.device)[None, None]
    copied.kept_valid, copied.compressed_at = seen, copied.seen
    return copied


@torch.no_grad()
def measure_text(
    model: Any,
    input_ids: Tensor,
    context_tokens: int,
    ratios: Sequence[float] = RATIOS,
    base_ratio: float = BASE_RATIO,
    selector: Any = "snapkv",
    heads: bool = True,
    on_step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Measure every compressible layer of a model on one text, all from one prefill.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : Tensor
        ``[1, token]``: context and continuation.
    context_tokens : int
        Tokens of the context, which is compressed. The rest is the continuation, which is scored.
    ratios : sequence of float
        Fractions kept at which each layer is compressed alone.
    base_ratio : float, default 0.1
        Fraction kept of all layers while one gets its full cache back.
    selector : str or Selector, default "snapkv"
        Token selection method.
    heads : bool, default True
        Measure each key/value head too: it alone gets its full cache back.
    on_step : callable, optional
        Called after each of ``(len(ratios) + 1) * layers`` continuations, and with ``heads`` once more per layer.

    Returns
    -------
    dict
        ``nll``, ``excess_loss`` and ``divergence`` (``[layer][ratio]``), ``gain_loss`` and ``gain_divergence``
        (``[layer]``), ``head_gain_divergence`` (``[layer][kv_head]``, empty without ``heads``), ``base_excess_loss``,
        ``base_divergence``, ``ranks``, ``layer_indices``. All distances are in nats per token.
    """
    context, rest = input_ids[:, :context_tokens], input_ids[:, context_tokens:]
    prefill, continuation = TextPrefill(model, context, selector), Continuation(model, rest)
    full = prefill.build_uniform(context_tokens)
    logits = continuation.remember(full.copy())
    reference = Reference.of(logits, rest[0, 1:])
    continuation.check_replay(full.copy(), logits)
    compressed = {
        ratio: prefill.build_uniform(max(1, round(ratio * context_tokens)))
        for ratio in sorted({*ratios, base_ratio})
    }

    def compare(cache: RankKVCache, layer_idx: int, layer: Any) -> tuple[float, float]:
        return reference.compare(continuation.run(_replace_layer(cache, layer_idx, layer), layer_idx))

    def score(cache: RankKVCache, layer_idx: int, other: RankKVCache) -> tuple[float, float]:
        distances = compare(cache, layer_idx, other.layers[layer_idx])
        if on_step is not None:
            on_step()
        return distances

    alone = [[score(full, layer, compressed[ratio]) for ratio in ratios] for layer in full.layer_indices]
    base = compressed[base_ratio]
    # From here on the layers below the changed one are compressed, so their outputs must be recorded again.
    base_loss, base_divergence = reference.compare(continuation.remember(base.copy()))
    back = [score(base, layer, full) for layer in full.layer_indices]

    def score_heads(layer_idx: int) -> list[float]:
        whole, kept = full.layers[layer_idx], base.layers[layer_idx]
        count = whole.keys.shape[1]
        restored = [_give_head_back(whole, kept, head) for head in range(count)] if count > 1 else [whole]
        gains = [base_divergence - compare(base, layer_idx, layer)[1] for layer in restored]
        if on_step is not None:
            on_step()
        return gains

    return {
        "layer_indices": list(full.layer_indices),
        "nll": reference.nll,
        "base_excess_loss": base_loss,
        "base_divergence": base_divergence,
        "excess_loss": [[loss for loss, _ in row] for row in alone],
        "divergence": [[divergence for _, divergence in row] for row in alone],
        "gain_loss": [base_loss - loss for loss, _ in back],
        "gain_divergence": [base_divergence - divergence for _, divergence in back],
        "head_gain_divergence": [score_heads(layer) for layer in full.layer_indices] if heads else [],
        "ranks": prefill.measure_ranks(),
    }
