"""TriAttention: keep the keys that the model's typical queries will attend to, known before any query is seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike, fspath

import torch
from torch import Tensor

from ..errors import InputError
from ..observe.observation import Observation
from ..observe.rotary import LayerRotation
from .layer_file import load_layer_tables, name_format
from .scoring import check_integer_option

FORMAT = name_format("query_centres")


def score_triattention(
    observation: Observation, centres: str | PathLike[str] | None = None, longest: int = 65536
) -> Tensor:
    """Score each key by the mean logit of the head's central query at distances of 1, 2, 4, ... tokens from now.

    ``z_j = sum over pairs f of (|c_f| |k_f| cos(w_f D + arg(c_f conj k_f)) + (m_f - |c_f|) |k_f|)``, a mean over the
    distances ``D = now - j + (1, 2, 4, ..., longest)``. ``c_f`` is the mean over calibration texts of the head's
    queries before rotary embedding, as complex numbers of the pair f, and ``m_f`` the mean of their absolute values.
    The score is the largest ``z`` of the group, each standardized over the tokens of its head.

    Parameters
    ----------
    observation : Observation
        The layer's keys and rotary embedding, and the position of its newest query.
    centres : str or path
        Profile that ``rankkv calibrate --queries`` wrote, or a file of
        :func:`rankkv.calibration.save_query_centres`.
    longest : int, default 65536
        Largest distance from now; powers of two below it are averaged too.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.

    Raises
    ------
    ConfigError
        If ``longest`` is not an integer of at least 1.
    InputError
        If ``centres`` is missing, is not such a file, or belongs to a model with other layers, heads or head_dim.

    Notes
    -----
    Made for ``decode="periodic"`` (the authors compress every 128 tokens) and ``"bounded"``. No attention is computed.
    The authors keep the prompt and the 128 newest tokens on top; here both count inside the budget. They also offer
    the maximum over distances, and one choice for all heads. Dimensions that the model does not turn are pairs of
    frequency 0.

    References
    ----------
    "TriAttention", ICML 2026, arXiv:2604.04921.
    """
    check_integer_option("triattention", "longest", longest, 1)
    keys = observation.keys.float()
    is_real = observation.real_index >= 0
    is_real = is_real.repeat_interleave(keys.shape[1] // is_real.shape[1], dim=1)
    # Padding may hold NaN, and 0 * NaN is not 0.
    keys = keys.masked_fill(~is_real[..., None], 0.0)
    table = _find_centres(centres, observation).to(keys.device)
    first, second = split_pairs(observation.rotation, keys)
    sizes = (first.square() + second.square()).sqrt()
    cos, sin = _average_turn(observation, table.shape[-1], longest)
    real, imaginary, mean_size = table.unbind(dim=1)
    turned = (real * cos - imaginary * sin, imaginary * cos + real * sin)
    extra = mean_size - (real.square() + imaginary.square()).sqrt()
    group = (keys.shape[1], -1)
    logits = sum(
        weights.unflatten(-2, group) @ part.mT
        for weights, part in zip((*turned, extra), (first, second, sizes), strict=True)
    )
    count = is_real.sum(dim=-1)[:, :, None, None].clamp(min=1)
    mask = is_real[:, :, None]
    mean = logits.masked_fill(~mask, 0.0).sum(dim=-1, keepdim=True) / count
    centred = (logits - mean).masked_fill(~mask, 0.0)
    deviation = (centred.square().sum(dim=-1, keepdim=True) / count).sqrt()
    # Where all logits are equal but for rounding, all keys score 0.
    least = (1e-5 * mean.abs()).clamp(min=1e-6)
    return observation.compute_group_mean((centred / torch.maximum(deviation, least)).amax(dim=2))


def split_pairs(rotation: LayerRotation | None, states: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``states [..., head_dim]`` into the two parts of its pairs: turned ones first, then the others.

    Examples
    --------
    >>> one, other = split_pairs(None, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    >>> one.tolist(), other.tolist()
    ([1.0, 2.0], [3.0, 4.0])
    """
    size = 0 if rotation is None else 2 * len(rotation.frequencies)
    start = states.shape[-1] - size if rotation is not None and rotation.from_end else 0
    part = states[..., start : start + size]
    rest = torch.cat([states[..., :start], states[..., start + size :]], dim=-1)
    if rest.shape[-1] % 2:
        rest = torch.nn.functional.pad(rest, (0, 1))
    if rotation is not None and rotation.interleaved:
        first, second = part[..., 0::2], part[..., 1::2]
    else:
        first, second = part.chunk(2, dim=-1) if size else (part, part)
    half = rest.shape[-1] // 2
    return torch.cat([first, rest[..., :half]], dim=-1), torch.cat([second, rest[..., half:]], dim=-1)


def load_query_centres(path: str | PathLike[str]) -> Mapping[int, Tensor]:
    """Load centres from a file, ``{layer: [head, 3, pair]}`` float32: real part, imaginary part, mean size.

    Raises
    ------
    InputError
        If the file does not exist, or holds no centres.
    """
    return load_layer_tables(
        path,
        "query centres",
        "query_centres",
        "[head, 3, pair]",
        "run rankkv calibrate --queries and give get_selector('triattention', centres=path) the profile that it wrote",
    )


def _find_centres(path: str | PathLike[str] | None, observation: Observation) -> Tensor:
    if path is None:
        raise InputError(
            "selector 'triattention' needs the centres of the model's queries, and none are given: run rankkv "
            "calibrate --queries and give get_selector('triattention', centres=path)."
        )
    centres, layer_idx = load_query_centres(path), observation.layer_idx
    shards = observation.shards
    heads = observation.query.shape[1] * (1 if shards is None else shards.size)
    expected = (heads, 3, (observation.keys.shape[-1] + 1) // 2)
    found = tuple(centres[layer_idx].shape) if layer_idx in centres else None
    if found != expected:
        raise InputError(
            f"the query centres of layer {layer_idx} in {fspath(path)!r} are {found}, but the layer needs {expected} "
            "(heads, 3, pairs): they were computed for another model, so calibrate this one with --queries."
        )
    return centres[layer_idx] if shards is None else shards.take_own(centres[layer_idx], dim=0)


def _average_turn(observation: Observation, pairs: int, longest: int) -> tuple[Tensor, Tensor]:
    """Average cosine and sine of the turns to the later positions, ``[batch, 1 or head, pair]``."""
    newest = observation.query_rotary_positions[:, :, -1]
    frequencies = newest.new_zeros(pairs, dtype=torch.float32)
    if observation.rotation is not None:
        known = observation.rotation.frequencies.to(newest.device)
        frequencies[: len(known)] = known
    steps = 2 ** torch.arange(int(math.log2(longest)) + 1, device=newest.device)
    angles = (newest[..., None] + steps)[..., None] * frequencies
    return angles.cos().mean(dim=-2), angles.sin().mean(dim=-2)
