"""Rotary positions: how each layer turns its keys, and kept keys turned to consecutive (packed) positions.

Nothing is assumed about the model's code.  Two short forwards, the second a few positions later, show how each layer's
keys turn with position.  The model's own frequencies must explain the difference, or the layer is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..errors import UnsupportedModelError
from ..models.compat import accepts_argument, cache_argument, find_decoder_layers
from ..models.placement import find_input_device

# The two forwards: their length, and how many positions the second is later.
_TOKENS = 6
_SHIFT = 5


@dataclass(frozen=True)
class LayerRotation:
    """Rotary embedding of one layer: the frequencies by which it turns keys with position.

    Parameters
    ----------
    module, name : nn.Module, str
        The buffer of frequencies, in the model's own rotary module; it may change with length.
    interleaved : bool
        True if pairs are neighbours (2i, 2i + 1), False if they are halves (i, i + n / 2).
    from_end : bool
        True if the last dimensions of the head are turned, False if the first are.
    """

    module: nn.Module
    name: str
    interleaved: bool
    from_end: bool

    @property
    def frequencies(self) -> Tensor:
        """Angles per position, ``[pair]`` float32."""
        return getattr(self.module, self.name).detach().float()

    def turn(self, states: Tensor, angles: Tensor) -> Tensor:
        """Turn ``states [..., slot, head_dim]`` by ``angles [..., slot, pair]``; keeps the states' dtype."""
        return self.combine(states, angles.cos(), angles.sin())

    def combine(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply ``[[cos, -sin], [sin, cos]]`` to each pair of ``states``.

        ``cos`` and ``sin`` may also be those of a mean of rotations.
        """
        size = 2 * cos.shape[-1]
        width = states.shape[-1]
        start = width - size if self.from_end else 0
        part = states[..., start : start + size].float()
        if self.interleaved:
            first, second = part[..., 0::2], part[..., 1::2]
        else:
            first, second = part[..., : size // 2], part[..., size // 2 :]
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
        if size == width:
            return joined.to(states.dtype)
        out = states.clone()
        out[..., start : start + size] = joined.to(states.dtype)
        return out


# Rotations found so far, by model; weak, so that a model is not kept alive.
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], dict[int, LayerRotation | None]]]
_known = weakref.WeakKeyDictionary()


def find_rotations(model: Any, layer_indices: list[int]) -> dict[int, LayerRotation | None]:
    """Find how each of these layers turns its keys with position.

    The answer is remembered as long as the model lives with the same rotary modules.

    Parameters
    ----------
    model : PreTrainedModel
        Runs two forwards of six tokens, once.
    layer_indices : list of int
        The layers to examine.

    Returns
    -------
    dict
        The rotation of each layer by index; None for a layer without rotary positions (NoPE).

    Raises
    ------
    UnsupportedModelError
        If a layer's keys change with position in another way, such as by learned positions.
    """
    if not accepts_argument(model, "position_ids"):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no position_ids, which positions='packed' needs; use positions='original'."
        )
    text_config = model.config.get_text_config(decoder=True)
    if "mrope_section" in (getattr(text_config, "rope_parameters", None) or {}):
        raise UnsupportedModelError(
            f"{type(model).__name__} gives each image token several positions, so positions='packed' cannot work; use "
            "positions='original'."
        )
    known = _known.setdefault(model, {})
    found = known.get(tuple(layer_indices))
    modules = set(map(id, model.modules()))
    if found is not None and all(one is None or id(one.module) in modules for one in found.values()):
        return dict(found)
    inputs = _LayerInputs(model)
    with inputs:
        (here, values), (there, other_values) = _run_at(model, 0), _run_at(model, _SHIFT)
    buffers = [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]
    rotations = {
        index: _fit_rotation(here[index], there[index], buffers, model, index) for index in layer_indices
    }
    for index in layer_indices:
        if _relative_error(values[index], other_values[index]) > _get_tolerance(model):
            raise UnsupportedModelError(
                f"the values of layer {index} of {type(model).__name__} depend on position, so positions='packed' "
                "cannot work; use positions='original'."
            )
    known[tuple(layer_indices)] = rotations
    return dict(rotations)


class _LayerInputs:
    """Gives each decoder layer the same input in the second forward as in the first, where they differ by rounding.

    In half precision the rounding of a turned key changes the layer's output a little, and the next layers more.
    After thirty layers the hidden states differ by more than a rotation explains, though every layer turns its keys
    exactly.  Inputs that differ by more than rounding stay: there the positions come in before the layer.

    Parameters
    ----------
    model : PreTrainedModel
        Its two forwards run inside a ``with`` block.
    """

    def __init__(self, model: Any) -> None:
        self._layers = find_decoder_layers(model)
        self._tolerance = _get_tolerance(model)
        self._first: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> None:
        self._handles = [
            layer.register_forward_pre_hook(self._exchange, with_kwargs=True) for layer in self._layers
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _exchange(
        self, layer: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        states = given.get("hidden_states", args[0] if args else None)
        if not isinstance(states, Tensor):
            return None
        first = self._first.setdefault(layer, states)
        if first is states or first.shape != states.shape:
            return None
        if _relative_error(first, states) > self._tolerance:
            return None
        if "hidden_states" in given:
            return args, {**given, "hidden_states": first}
        return (first, *args[1:]), given


def _run_at(model: Any, start: int) -> tuple[list[Any], list[Any]]:
    """Run a short forward at positions from ``start`` on, and return each layer's keys and values."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    device = find_input_device(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    input_ids = (torch.arange(_TOKENS, device=device) * 7 + 3)[None] % vocabulary
    position_ids = torch.arange(start, start + _TOKENS, device=device)[None]
    with torch.no_grad():
        model(input_ids=input_ids, position_ids=position_ids, use_cache=True, **cache_argument(cache))
    states = ([getattr(layer, name, None) for layer in cache.layers] for name in ("keys", "values"))
    return next(states), next(states)


def _relative_error(guess: Tensor, truth: Tensor) -> float:
    """Return the error of a guess relative to the true states, by norm."""
    guess, truth = guess.to(truth.device).float(), truth.float()
    return float((guess - truth).norm() / truth.norm().clamp(min=1e-12))


def _get_tolerance(model: Any) -> float:
    """Return the largest relative error of a rotation, by the model's dtype."""
    return 2e-2 if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-3


def _fit_rotation(
    here: Tensor, there: Tensor, buffers: list[tuple[nn.Module, str]], model: Any, layer_idx: int
) -> LayerRotation | None:
    """Find the rotation that turns the keys ``here`` into those ``there``; None if they are equal."""
    here, there = here.float(), there.float()
    best: tuple[float, LayerRotation | None] = (_relative_error(here, there), None)
    for module, name in buffers:
        for interleaved in (False, True):
            for from_end in (False, True):
                rotation = LayerRotation(module, name, interleaved, from_end)
                angles = rotation.frequencies.to(here.device) * _SHIFT
                if 2 * len(angles) > here.shape[-1]:
                    continue
                found = _relative_error(rotation.turn(here, angles.expand(*here.shape[:-1], -1)), there)
                if found < best[0]:
                    best = (found, rotation)
    if best[0] > _get_tolerance(model):
        raise UnsupportedModelError(
            f"layer {layer_idx} of {type(model).__name__} does not turn its keys by rotary positions (relative error "
            f"of the best fit: {best[0]:.2g}), so positions='packed' cannot work; use positions='original'."
        )
    return best[1]


class PackedPositions:
    """Turn one layer's kept keys to consecutive positions for its attention.

    Stored keys keep the rotation that the model gave them, so no error adds up over evictions.  The turned keys exist
    for one attention call only.

    Parameters
    ----------
    rotation : LayerRotation
        How the layer turns its keys.
    """

    def __init__(self, rotation: LayerRotation) -> None:
        self.rotation = rotation
        # (first position, frequencies): dynamic scaling and longrope change the frequencies with length.
        self.epochs: list[tuple[int, Tensor]] = []

    def copy(self) -> PackedPositions:
        """Return an independent copy."""
        copied = PackedPositions(self.rotation)
        copied.epochs = list(self.epochs)
        return copied

    def reset(self) -> None:
        """Forget the frequencies of earlier tokens."""
        self.epochs = []

    def note_frequencies(self, position: int) -> None:
        """Remember the frequencies that turned the tokens from ``position`` on."""
        now = self.rotation.frequencies
        if not self.epochs or not torch.equal(self.epochs[-1][1].to(now.device), now):
            self.epochs = [epoch for epoch in self.epochs if epoch[0] < position]
            self.epochs.append((position, now.clone()))

    def pack(
        self, query: Tensor, keys: Tensor, positions: Tensor, slot_valid: Tensor | None, row_start: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Turn queries and keys from their original positions to consecutive ones.

        Parameters
        ----------
        query : Tensor
            ``[batch, head, query, head_dim]``; the queries' own keys are the last ones.
        keys : Tensor
            ``[batch, kv_head, slot, head_dim]``.
        positions : Tensor
            Logical position of each slot, ``[batch, kv_head or 1, slot]``.
        slot_valid : Tensor, optional
            ``[batch, slot]`` or ``[batch, kv_head, slot]``, False for the empty slots at the start of a row or head.
        row_start : list of int
            Padding before each row's first real token.

        Returns
        -------
        query, keys : Tensor
            The turned states, in the shapes of the input.
        """
        slots, steps = keys.shape[-2], query.shape[-2]
        packed = torch.arange(slots, device=keys.device).expand(positions.shape[0], 1, -1)
        if slot_valid is not None:
            slot_valid = slot_valid if slot_valid.dim() == 3 else slot_valid[:, None]
            packed = packed - (~slot_valid).sum(-1, keepdim=True)
        original = positions - torch.tensor(row_start, device=positions.device).view(-1, 1, 1)
        now = self.epochs[-1][1].to(keys.device)
        old_angles = original[..., None] * self._frequencies_at(positions)
        angles = packed[..., None] * now - old_angles
        newest = angles[..., -steps:, :]
        if newest.shape[1] > 1:
            # A query has the position of its own key, which differs between heads.
            newest = newest.repeat_interleave(query.shape[1] // newest.shape[1], dim=1)
        return self.rotation.turn(query, newest), self.rotation.turn(keys, angles)

    def _frequencies_at(self, positions: Tensor) -> Tensor:
        """Return the frequencies that turned the token at each position, ``[batch, head, slot, pair]``."""
        starts = torch.tensor([start for start, _ in self.epochs], device=positions.device)
        table = torch.stack([frequencies.to(positions.device) for _, frequencies in self.epochs])
        if len(starts) == 1:
            return table[0].expand(*positions.shape, -1)
        # There may be many epochs: dynamic scaling starts one at every step.
        return table[(torch.searchsorted(starts, positions.contiguous(), right=True) - 1).clamp(min=0)]


def build_packers(rotations: Mapping[int, LayerRotation | None]) -> dict[int, PackedPositions]:
    """Build the :class:`PackedPositions` of each rotary layer, by index."""
    return {index: PackedPositions(found) for index, found in rotations.items() if found is not None}
