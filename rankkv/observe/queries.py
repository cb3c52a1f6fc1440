"""Past queries of a layer: the newest ones as they are, and the moments of all of them.

The newest queries are kept while compression has to wait: chunked prefill, drafts, periodic compression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CacheStateError, UnsupportedModelError
from .observation import Observation, count_real

#: Kinds of moments that a method may need of past queries: as attention saw them, or turned back to position 0.
PAST_QUERIES = ("turned", "unturned")


class QueryBuffer:
    """Keep the last ``capacity`` queries of one layer, to compute their attention later.

    Parameters
    ----------
    capacity : int
        Number of queries held.
    spare : int, optional
        Number of held queries beyond the needed ones; as many can be dropped.  None allows to drop any number.
    """

    def __init__(self, capacity: int, spare: int | None = None) -> None:
        self.capacity = capacity
        self.spare = spare
        self._held: Observation | None = None
        self._overflowed = False

    def push(self, observation: Observation) -> Observation | None:
        """Add the queries of one forward, and return those that no longer fit, or None.

        Raises
        ------
        UnsupportedModelError
            If the attention depends on more than positions and padding, so that it cannot be computed later.
        """
        if observation.position_bias is not None:
            raise UnsupportedModelError(
                f"layer {observation.layer_idx} adds a position bias to its attention, which is not known after the "
                "forward; use prefill='single' and decode='grow' with this model."
            )
        # Drop references to parts of the model: a copy of the cache would copy them.
        joined = replace(observation, attention_mask=None, rotation=None, past_moments=None)
        if self._held is not None:
            joined = replace(
                joined,
                query=torch.cat([self._held.query, observation.query], dim=-2),
                query_valid=torch.cat([self._held.query_valid, observation.query_valid], dim=-1),
                query_start=observation.query_start - self._held.query_length,
            )
        split = max(0, joined.query_length - self.capacity)
        self._overflowed |= split > 0
        nothing = observation.keys.new_empty(0)
        self._held = replace(
            _take_queries(joined, slice(split, None)),
            keys=nothing,
            values=nothing,
            positions=nothing,
            valid=joined.valid.clone(),
        )
        # A copy: a view would keep the whole prompt's queries in memory.
        self._held.query = self._held.query.clone()
        return _take_queries(joined, slice(0, split)) if split else None

    def drop(self, count: int) -> None:
        """Forget the newest ``count`` queries.

        Raises
        ------
        CacheStateError
            If earlier queries, which are gone, would be needed instead.
        """
        if self.spare is not None and self._overflowed and count > self.spare:
            raise CacheStateError(
                f"cannot take back {count} tokens before the prompt is compressed, at most {self.spare}: draft fewer "
                "at a time (num_assistant_tokens or prompt_lookup_num_tokens), or call finish() before crop()."
            )
        if self._held is not None and count:
            self._held = _take_queries(self._held, slice(0, max(0, self._held.query_length - count)))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch rows (reorder, select, repeat)."""
        if self._held is not None:
            self._held = replace(
                self._held,
                query=change(self._held.query),
                query_valid=change(self._held.query_valid),
                valid=change(self._held.valid),
                row_start=change(torch.tensor(self._held.row_start)).tolist(),
            )

    def held(self) -> dict[str, Tensor]:
        """Return the tensors for :meth:`fill`; an empty dict if no query is held."""
        held = self._held
        return (
            {}
            if held is None
            else {"query": held.query.contiguous(), "query_valid": held.query_valid.contiguous()}
        )

    def fill(self, query: Tensor, query_valid: Tensor, row_start: list[int]) -> None:
        """Hold saved queries again.

        The next observation brings the other fields.
        """
        nothing = query.new_empty(0)
        self._held = Observation(
            layer_idx=-1,
            query=query,
            keys=nothing,
            values=nothing,
            positions=nothing,
            query_start=0,
            valid=torch.ones(query.shape[0], 0, dtype=torch.bool, device=query.device),
            query_valid=query_valid,
            row_start=list(row_start),
            lengths=[],
            available=[],
            kv_heads=0,
            scaling=1.0,
        )

    def build_observation(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        slot_valid: Tensor | None,
        available: list[int] | None = None,
        slots: list[int] | None = None,
    ) -> Observation:
        """Build an observation of the held queries and the layer's present keys.

        Parameters
        ----------
        keys, values : Tensor
            Kept keys and values of the layer, ``[batch, kv_head, slot, head_dim]``.
        positions : Tensor
            ``[batch, kv_head or 1, slot]``.
        slot_valid : Tensor, optional
            ``[batch, slot]`` or ``[batch, kv_head, slot]``; None if every slot holds a token.
        available : list of int, optional
            Tokens of each row, an average over its heads, if the host knows them.
        slots : list of int, optional
            See :class:`rankkv.observe.observation.Observation`.

        Raises
        ------
        UnsupportedModelError
            If no query is held.
        """
        held = self._held
        if held is None or held.query_length == 0:
            raise UnsupportedModelError(
                "no query of this layer was observed, so its tokens cannot be scored."
            )
        width = keys.shape[-2]
        # A layer that never evicted still holds its padding.  A layer that evicted holds none.
        whole = held.valid.shape[-1] >= width and slot_valid is None and positions.shape[1] == 1
        valid = held.valid[:, :width] if whole else torch.ones_like(positions[:, 0], dtype=torch.bool)
        if slot_valid is not None:
            valid = (valid if slot_valid.dim() == 2 else valid[:, None]) & slot_valid
        seen = held.query_start + held.query_length
        return replace(
            held,
            keys=keys,
            values=values,
            positions=positions,
            valid=valid,
            lengths=[seen - start for start in held.row_start],
            available=count_real(valid) if available is None else available,
            slots=slots,
        )


def compute_query_moments(observation: Observation, kind: str, stride: int = 1) -> Tensor:
    """Compute the moments of all queries of a layer so far: those observed and those before.

    One symmetric matrix per head, ``[[S, m], [m^T, n]]``, with the number ``n`` of queries, their mean ``m`` and
    ``S = sum of (q - m)(q - m)^T``.

    Parameters
    ----------
    observation : Observation
        Its queries, ``past_moments``, and ``rotation`` to turn them back.
    kind : {"turned", "unturned"}
        ``"turned"``: all queries, as attention saw them.  ``"unturned"``: turned back to position 0, without the
        queries of the sinks, which differ from all others.
    stride : int, default 1
        Use every so many queries only, the newest among them.

    Returns
    -------
    Tensor
        ``[batch, head, key_dim + 1, key_dim + 1]`` float32; additive over queries by :func:`merge_moments`.
    """
    taken = slice((observation.query_length - 1) % stride, None, stride)
    queries, used = observation.query[:, :, taken].float(), observation.query_valid[:, taken]
    if kind == "unturned":
        used = used & (observation.query_index[:, taken] >= observation.sink_size)
        if observation.rotation is not None:
            frequencies = observation.rotation.frequencies.to(queries.device)
            angles = observation.query_rotary_positions[..., taken, None] * frequencies
            queries = observation.rotation.turn(queries, -angles)
    weights = used[:, None, :, None]
    # Padding may hold NaN, and 0 * NaN is not 0.
    queries = queries.masked_fill(~weights, 0.0)
    count = weights.sum(dim=-2, keepdim=True).float().expand(-1, queries.shape[1], -1, -1)
    mean = queries.sum(dim=-2, keepdim=True) / count.clamp(min=1)
    centred = (queries - mean).masked_fill(~weights, 0.0)
    spread = centred.mT @ centred
    moments = torch.cat([torch.cat([spread, mean], dim=-2), torch.cat([mean.mT, count], dim=-2)], dim=-1)
    return moments if observation.past_moments is None else merge_moments(observation.past_moments, moments)


def merge_moments(one: Tensor, other: Tensor) -> Tensor:
    """Merge the moments of two sets of queries, without loss by cancellation.

    ``n = n_1 + n_2``, ``m = (n_1 m_1 + n_2 m_2) / n``, ``S = S_1 + S_2 + n_1 n_2 / n (m_1 - m_2)(m_1 - m_2)^T``.

    Examples
    --------
    >>> one, other = torch.tensor([[0.0, 2.0], [2.0, 1.0]]), torch.tensor([[0.0, 4.0], [4.0, 1.0]])
    >>> merge_moments(one, other).tolist()
    [[2.0, 3.0], [3.0, 2.0]]
    """
    (spread, mean, count), (spread_2, mean_2, count_2) = split_moments(one), split_moments(other)
    total = count + count_2
    safe = total.clamp(min=1)
    apart = mean_2 - mean
    joined = (count * mean + count_2 * mean_2) / safe
    spread = spread + spread_2 + (count * count_2 / safe) * apart.mT @ apart
    return torch.cat([torch.cat([spread, joined], dim=-2), torch.cat([joined.mT, total], dim=-2)], dim=-1)


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split moments into ``S [..., dim, dim]``, the mean ``[..., 1, dim]`` and the number ``[..., 1, 1]``."""
    return moments[..., :-1, :-1], moments[..., -1:, :-1], moments[..., -1:, -1:]


def _take_queries(observation: Observation, rows: slice) -> Observation:
    """Return an observation with a slice of its queries."""
    start = rows.start or 0
    return replace(
        observation,
        query=observation.query[:, :, rows],
        query_valid=observation.query_valid[:, rows],
        query_start=observation.query_start + start,
    )
