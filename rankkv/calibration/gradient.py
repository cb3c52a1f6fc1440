"""Calibration method "gradient": first-order estimates for all layers, ratios and heads of a text from one gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..cache.cache import RankKVCache
from ..cache.masks import project_mask
from ..errors import UnsupportedModelError
from ..models.compat import cache_argument
from ..observe import hook
from ..observe.call import AttentionCall
from ..observe.hook import AttentionObserver
from .settings import BASE_RATIO, RATIOS
from .single_runs import Continuation, Reference, TextPrefill, can_measure_heads, mark_kept

# The gradient of a mean over many tokens is too small for half precision. Scaling by a power of two is exact.
_SCALE = 1024.0


class GatedCache(AttentionObserver, DynamicCache):
    """Full cache in which each head attends to a set of tokens, with gates towards alternative sets.

    ``output = o(seen) + sum_a gate[a, kv_head] * (o(alternative_a) - o(seen))``

    Each layer's attention is run with the seen tokens and with each alternative. All gates are zero, so the model
    computes the output of the seen tokens. The gradient at a gate is the change that its alternative makes, to first
    order.

    Parameters
    ----------
    model : PreTrainedModel
        Model that will run with the cache.
    full : RankKVCache
        Cache with all tokens of a prompt; its layers are used, not copied.
    seen : mapping
        For each compressible layer, the seen tokens of the prompt as ``[1, kv_head, token]`` bool.
    alternatives : sequence of mapping
        The same, for each alternative.
    """

    layers: list[Any]

    def __init__(
        self,
        model: Any,
        full: RankKVCache,
        seen: Mapping[int, Tensor],
        alternatives: Sequence[Mapping[int, Tensor]],
    ) -> None:
        text_config = model.config.get_text_config(decoder=True)
        super().__init__(config=text_config)
        self._backend_of = text_config
        self.layers = full.layers
        self._seen, self._alternatives = seen, alternatives
        #: ``[alternative, kv_head]`` zeros of each compressible layer.
        self.gates = {
            index: torch.zeros(len(alternatives), tokens.shape[1], device=tokens.device, requires_grad=True)
            for index, tokens in seen.items()
        }
        self._attended: dict[int, Tensor] = {}
        hook.watch_for(self, model)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and claim this layer's next attention call."""
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.gates:
            hook.hand_off(self, layer_idx, states[0].shape[-2])
        return states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """Leave the state of a linear layer as it is, since an update in place breaks the gradient."""
        return recurrent_states

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the layer's attention with its seen tokens, plus each alternative's gated difference."""
        self._attended[layer_idx] = call.key
        return self.attend_shared(layer_idx, call)

    def attend_shared(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the attention of a layer that shares the keys of ``layer_idx``, with the same gates."""
        output, *rest = self._run(call, self._seen[layer_idx])
        gates = self.gates[layer_idx]
        with torch.no_grad():
            others = [self._run(call, tokens[layer_idx])[0] for tokens in self._alternatives]
            # ``[alternative, batch, query, kv_head, group, head_dim]``: one gate for all query heads of a group.
            changes = (torch.stack(others) - output).unflatten(-2, (gates.shape[1], -1)).to(gates.dtype)
        gated = torch.einsum("ak,abqkgd->bqkgd", gates, changes).flatten(-3, -2)
        return output + gated.to(output.dtype), *rest

    def find_attended(self, key: Tensor) -> int | None:
        """Return the layer whose last attention call used this key tensor, or None."""
        return next((index for index, attended in self._attended.items() if attended is key), None)

    def _run(self, call: AttentionCall, tokens: Tensor) -> Any:
        # Tokens after the prompt belong to the continuation and are always seen.
        later = call.key.shape[-2] - tokens.shape[-1]
        valid = torch.cat([tokens, tokens.new_ones((*tokens.shape[:2], later))], dim=-1)
        positions = torch.arange(valid.shape[-1], device=valid.device)[None, None]
        backend, heads = self._backend_of._attn_implementation, call.query.shape[1]
        mask = project_mask(call.mask, positions, valid, call.steps, heads, backend, call.query.dtype)
        return replace(call, mask=mask).run()


def check_differentiable(model: Any) -> None:
    """Check that each head can be masked alone and that attention has a gradient.

    Raises
    ------
    UnsupportedModelError
        Under tensor parallelism, on flash and flex attention, and with weights created in inference mode.
    """
    backend = model.config.get_text_config(decoder=True)._attn_implementation
    if not can_measure_heads(model) or backend == "flex_attention":
        raise UnsupportedModelError(
            f"method='gradient' needs all heads in one process, a mask for each, and gradients through {backend}: "
            "use attn_implementation='sdpa' or 'eager' without tensor parallelism, or method='measured'."
        )
    if any(tensor.is_inference() for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise UnsupportedModelError(
            "method='gradient' needs weights that were not created in torch.inference_mode(): load the model outside "
            "of it, or use method='measured'."
        )


@contextmanager
def _only_gates_differentiable(model: Any) -> Iterator[None]:
    """Give only the gates a gradient, and turn off dropout and gradient checkpointing."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


# The caller may be in inference mode, whose tensors have no gradient.
@torch.inference_mode(False)
def measure_gradients(
    model: Any,
    input_ids: Tensor,
    context_tokens: int,
    ratios: Sequence[float] = RATIOS,
    base_ratio: float = BASE_RATIO,
    selector: Any = "snapkv",
    heads: bool = True,
    on_step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Estimate the cost of compressing every layer and head on one text from one gradient.

    All layers keep ``base_ratio``. The estimate is the first-order change of the distance to the full cache when one
    head alone keeps another fraction: ``sum_q <d distance / d o_q, o_q' - o_q>``. Here o is the head's output, and o'
    its output with the other fraction. A layer's change is the sum over its heads.

    In these curves all other layers keep ``base_ratio``. In those of
    :func:`rankkv.calibration.single_runs.measure_text` all other layers are full.

    Parameters
    ----------
    model, input_ids, context_tokens, ratios, base_ratio, selector, heads
        See :func:`rankkv.calibration.single_runs.measure_text`. The weights are not changed and get no gradient.
    on_step : callable, optional
        Called once, at the end.

    Returns
    -------
    dict
        As :func:`rankkv.calibration.single_runs.measure_text`. ``excess_loss`` and ``divergence`` are differences from
        the layer with all tokens; as first-order estimates they may be negative.

    Raises
    ------
    UnsupportedModelError
        If heads cannot be masked one by one, or the model's attention has no gradient.
    """
    check_differentiable(model)
    context, rest = input_ids[:, :context_tokens].clone(), input_ids[:, context_tokens:].clone()
    with _only_gates_differentiable(model):
        prefill = TextPrefill(model, context, selector)
        full = prefill.build_uniform(context_tokens)
        reference = Reference.of(Continuation(model, rest).run(full.copy()), rest[0, 1:])
        seen = [
            _find_seen(full, prefill.build_uniform(max(1, round(ratio * context_tokens))))
            for ratio in (base_ratio, *ratios)
        ]
        everything = {index: torch.ones_like(tokens) for index, tokens in seen[0].items()}
        cache = GatedCache(model, full, seen[0], [*seen[1:], everything])
        gates = list(cache.gates.values())
        with torch.enable_grad():
            logits = model(rest, **cache_argument(cache)).logits[0, :-1]
            loss, divergence = reference.compute_distances(logits)
            # A model without a layer to compress has no gate and nothing to differentiate.
            by_loss = torch.autograd.grad(_SCALE * loss, gates, retain_graph=True) if gates else ()
            by_divergence = torch.autograd.grad(_SCALE * divergence, gates) if gates else ()
        ranks = prefill.measure_ranks()
    if on_step is not None:
        on_step()
    loss_curves, loss_gains, _ = _split_gradients(by_loss)
    curves, gains, head_gains = _split_gradients(by_divergence)
    return {
        "layer_indices": list(cache.gates),
        "nll": reference.nll,
        "base_excess_loss": float(loss.detach()),
        "base_divergence": float(divergence.detach()),
        "excess_loss": loss_curves,
        "divergence": curves,
        "gain_loss": loss_gains,
        "gain_divergence": gains,
        "head_gain_divergence": head_gains if heads else [],
        "ranks": ranks,
    }


def _find_seen(full: RankKVCache, compressed: RankKVCache) -> dict[int, Tensor]:
    """Mark the tokens that each head of a compressed cache holds, ``[1, kv_head, token]`` bool by layer."""
    return {index: mark_kept(full.layers[index], compressed.layers[index]) for index in full.layer_indices}


def _split_gradients(
    gradients: Sequence[Tensor],
) -> tuple[list[list[float]], list[float], list[list[float]]]:
    """Split gradients into curves ``[layer][ratio]``, gains ``[layer]`` and gains ``[layer][kv_head]``.

    The last alternative of each layer is the full cache.
    """
    curves, gains, head_gains = [], [], []
    for changes in gradients:
        *fewer, everything = changes.cpu().double() / _SCALE
        curves.append([float((change - everything).sum()) for change in fewer])
        gains.append(-float(everything.sum()))
        head_gains.append((-everything).tolist())
    return curves, gains, head_gains
