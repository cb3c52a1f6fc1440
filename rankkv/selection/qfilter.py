"""Q-Filters: keep the keys that lie in the principal direction of their head's queries."""

from __future__ import annotations

import json
from functools import lru_cache
from os import PathLike, fspath, stat

import torch
from torch import Tensor

from ..errors import InputError
from ..observe.observation import Observation
from ..observe.queries import compute_query_moments, split_moments
from .scoring import without_padding

FORMAT = "rankkv.calibration.query_filters/1"


@without_padding
def score_qfilter(observation: Observation, filters: str | PathLike[str] | None = None) -> Tensor:
    """Score each key by its projection on its head's filter, the principal direction of calibration queries.

    ``score_j = k_j . f`` with ``f = mean over the heads of the group of u_h``, where ``u_h`` is the first right
    singular vector of the matrix of a head's queries, rotary embedding included, pointing to where the queries lie.

    Parameters
    ----------
    observation : Observation
        The layer's keys; without ``filters``, its queries too.
    filters : str or path, optional
        File that :func:`rankkv.save_query_filters` wrote from :func:`rankkv.compute_query_filters`, or another JSON
        file that holds the same record under ``"query_filters"``.  None takes the directions of the prompt's own
        queries, and those generated since, instead of calibrated ones; ``summary()`` says so.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32; where attention sees more key heads than the cache has, their mean.

    Raises
    ------
    InputError
        If ``filters`` is no such file, or one of a model of other layers, heads or head_dim.

    Notes
    -----
    kvpress loads filters that the authors published, which point the other way and are multiplied by -1 in the score.
    The newest token is always kept, in kvpress only if its score says so.

    References
    ----------
    Godey et al., "Q-Filters: Leveraging Query-Key Geometry for Efficient Key-Value Cache Compression", 2025,
    arXiv:2503.02812.
    """
    keys = observation.keys.float()
    if filters is None:
        directions = compute_filter(compute_query_moments(observation, "turned"), keys.shape[1])
    else:
        directions = _find_filter(filters, observation).to(keys.device)[None]
    return observation.compute_group_mean((keys * directions[:, :, None]).sum(dim=-1))


def compute_filter(moments: Tensor, key_heads: int) -> Tensor:
    """Compute the filters of one layer from the moments of its queries.

    Parameters
    ----------
    moments : Tensor
        ``[batch, head, key_dim + 1, key_dim + 1]``, see :func:`rankkv.observe.queries.compute_query_moments`.
    key_heads : int
        Number of key heads; each group of query heads is averaged.

    Returns
    -------
    Tensor
        ``[batch, key_head, key_dim]`` float32.
    """
    spread, mean, count = split_moments(moments)
    # The right singular vectors of the queries are the eigenvectors of their second moment, about 0.
    second = spread / count.clamp(min=1) + mean.mT @ mean
    first = torch.linalg.eigh(second).eigenvectors[..., -1]
    # The sum of the left singular vector, by which the paper chooses the sign, is that of the queries' projections.
    towards = (first * mean[..., 0, :]).sum(dim=-1, keepdim=True)
    return torch.where(towards < 0, -first, first).unflatten(1, (key_heads, -1)).mean(dim=2)


def load_query_filters(path: str | PathLike[str]) -> dict[int, Tensor]:
    """Load filters, ``{layer: [key_head, key_dim]}`` float32.

    Raises
    ------
    InputError
        If there is no such file, or it holds no filters.
    """
    if not isinstance(path, str | PathLike):
        raise InputError(
            f"filters={path!r} of selector 'qfilter' must be the path of a file of query filters."
        )
    try:
        found = stat(path)
    except OSError as error:
        raise InputError(
            f"no query filters at {fspath(path)!r}: {error.strerror}. compute_query_filters() computes them and "
            "save_query_filters() writes them."
        ) from error
    return _read(fspath(path), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int) -> dict[int, Tensor]:
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        record = record.get("query_filters", record)
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}")
        return {
            int(layer): torch.tensor(rows, dtype=torch.float32) for layer, rows in record["layers"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path!r} holds no query filters of format {FORMAT!r} ({error}).") from error


def _find_filter(path: str | PathLike[str], observation: Observation) -> Tensor:
    filters, layer_idx = load_query_filters(path), observation.layer_idx
    if layer_idx not in filters:
        raise InputError(
            f"{fspath(path)!r} has no filter for layer {layer_idx}: it was computed for another model."
        )
    found = tuple(filters[layer_idx].shape)
    shards = observation.shards
    heads = observation.keys.shape[1] * (1 if shards is None else shards.size)
    expected = (heads, observation.keys.shape[-1])
    if found != expected:
        raise InputError(
            f"the filter for layer {layer_idx} in {fspath(path)!r} is {found}, but the layer's keys "
            f"are {expected} (heads, head_dim): it was computed for another model."
        )
    return filters[layer_idx] if shards is None else shards.take_own(filters[layer_idx], dim=0)
