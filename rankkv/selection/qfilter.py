"""Q-Filters: keep the keys that lie in the principal direction of their head's queries."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath

import torch
from torch import Tensor

from ..errors import InputError
from ..observe.observation import Observation
from ..observe.queries import compute_query_moments, split_moments
from .layer_file import load_layer_tables, name_format
from .scoring import without_padding

FORMAT = name_format("query_filters")


@without_padding
def score_qfilter(observation: Observation, filters: str | PathLike[str] | None = None) -> Tensor:
    """Score each key by its projection on its head's filter, the principal direction of calibration queries.

    ``score_j = k_j . f`` with ``f = mean over the heads of the group of u_h``. Here ``u_h`` is the first right singular
    vector of the matrix of a head's queries, rotary embedding included. Its sign makes it point towards the queries.

    Parameters
    ----------
    observation : Observation
        The layer's keys; without ``filters``, its queries too.
    filters : str or path, optional
        File that :func:`rankkv.save_query_filters` wrote from :func:`rankkv.compute_query_filters`, or another JSON
        file that holds the same record under ``"query_filters"``. None uses the queries of the prompt and of the
        generated tokens instead of calibration queries; ``summary()`` says so.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32; the mean if attention sees more key heads than the cache has.

    Raises
    ------
    InputError
        If ``filters`` is not such a file, or belongs to a model with other layers, heads or head_dim.

    Notes
    -----
    kvpress loads the filters that the authors published. They point the other way and are multiplied by -1 in the
    score. The newest token is always kept; kvpress keeps it only if it scores high enough.

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
        Number of key heads. The directions of a group of query heads are averaged.

    Returns
    -------
    Tensor
        ``[batch, key_head, key_dim]`` float32.
    """
    spread, mean, count = split_moments(moments)
    # The right singular vectors of the queries are the eigenvectors of their uncentred second moment.
    second = spread / count.clamp(min=1) + mean.mT @ mean
    first = torch.linalg.eigh(second).eigenvectors[..., -1]
    # The paper chooses the sign by the sum of the left singular vector, which has the sign of the mean projection.
    towards = (first * mean[..., 0, :]).sum(dim=-1, keepdim=True)
    return torch.where(towards < 0, -first, first).unflatten(1, (key_heads, -1)).mean(dim=2)


def load_query_filters(path: str | PathLike[str]) -> Mapping[int, Tensor]:
    """Load filters from a file, ``{layer: [key_head, key_dim]}`` float32.

    Raises
    ------
    InputError
        If the file does not exist, or holds no filters.
    """
    return load_layer_tables(
        path,
        "query filters",
        "query_filters",
        "[key_head, key_dim]",
        "compute them with compute_query_filters() and give filters= the path that save_query_filters() wrote",
    )


def _find_filter(path: str | PathLike[str], observation: Observation) -> Tensor:
    filters, layer_idx = load_query_filters(path), observation.layer_idx
    if layer_idx not in filters:
        raise InputError(
            f"{fspath(path)!r} has no filter for layer {layer_idx}: it was computed for another model, so compute "
            "filters for this one."
        )
    found = tuple(filters[layer_idx].shape)
    shards, own = observation.shards, observation.keys.shape[1]
    first, heads = 0, own * (1 if shards is None else shards.size)
    if observation.part_of is not None:
        # As many query heads for each key head as in the layer.
        first, heads = (count * own // observation.query.shape[1] for count in observation.part_of)
    expected = (heads, observation.keys.shape[-1])
    if found != expected:
        raise InputError(
            f"the filter for layer {layer_idx} in {fspath(path)!r} is {found}, but the layer's keys "
            f"are {expected} (heads, head_dim): it was computed for another model, so compute filters for this one."
        )
    if shards is not None:
        return shards.take_own(filters[layer_idx], dim=0)
    return filters[layer_idx][first : first + own]
