"""Echo: keep the keys that the prompt's own queries look up when they are turned to positions behind the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedModelError
from ..observe.observation import Observation
from .expected_attention import compute_expected_attention
from .scoring import check_integer_option, compute_output_norms, without_padding

#: Ways to join the query heads of a group.
GROUPS = ("sum", "max")


@without_padding
def score_echo(
    observation: Observation,
    chunk_size: int = 256,
    gap: int = 8,
    group: str = "sum",
    value_norms: bool = True,
    own_keys: bool = True,
    expected: float = 10.0,
) -> Tensor:
    """Score each key by the most that a query of its chunk pays it, once turned to a position behind the prompt.

    A method that replays the context sends each token through the model again, at a position behind the prompt.  Its
    query there is nearly its query of the first pass, turned on by ``D`` positions.  Rotary embeddings add up, so
    ``q_i . R(D)`` needs no second pass.  With ``n`` tokens in the row, ``D = n + gap``.  For the chunk ``a <= i < b``
    and the query head ``g``:

    ``p^g_i = softmax over [k_j for a <= j < b | R(D) k_j for a <= j <= i | the sinks if a > 0] of s (R(D) q^g_i) k``

    ``score_j = sum over the heads g of the group of (max over i of p^g_ij + expected * e^g_j) ||W^g v_j||_2``

    The first part is not causal: a replayed token sees the whole chunk.  The second part stands for the keys that a
    replay would add itself.  ``e^g_j`` is the expected attention of future queries, as in ``expected_attention``.
    Lookups keep single facts; expected attention keeps what any text that goes on attends to.  ``W^g`` holds the rows
    of the output projection that belong to head g.

    Queries that come after the first forward also score all other keys, by their plain attention.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys, values and rotary embedding.
    chunk_size : int, default 256
        Tokens of a chunk.  A remainder shorter than half a chunk joins the chunk before.
    gap : int, default 8
        Positions between the prompt and the turned queries, for the instruction of a replay.
    group : {"sum", "max"}, default "sum"
        Way to join the query heads of a group.
    value_norms : bool, default True
        Multiply by ``||W^g v_j||_2``; by ``||v_j||_2`` if no output projection is found.
    own_keys : bool, default True
        Use the second part of the softmax.
    expected : float, default 10
        Number of expected queries that weigh as much as one lookup; 0 leaves expected attention out.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.

    Raises
    ------
    ConfigError
        If an option is outside its range.
    UnsupportedModelError
        If the layer adds a position bias to its attention, which says nothing about later positions.

    Notes
    -----
    Differs from a replay in three points: hidden states are those of the first pass, no instruction precedes the
    chunk, and chunks may be short, since what a token would look up lies close behind it.

    References
    ----------
    This project.  Nearest relatives: Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context
    Reconstruction", 2025, arXiv:2505.23416, which replays the context; "DapQ", 2026, arXiv:2603.11564, which puts
    queries at later positions; Chari and Van Durme, "Compactor", 2025, arXiv:2507.08143, which attends without a
    causal mask inside chunks.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> str(get_selector("echo", chunk_size=128))
    'echo(chunk_size=128)'
    """
    _check(chunk_size, gap, group, value_norms, own_keys, expected)
    if observation.position_bias is not None:
        raise UnsupportedModelError(
            f"layer {observation.layer_idx} adds a position bias to its attention, so its queries cannot be turned to "
            "later positions: use selector='snapkv' or 'h2o' with this model."
        )
    lookups = _compute_lookups(observation, chunk_size, gap, own_keys)
    if observation.query_start > min(observation.row_start):
        for weights in observation.attention_blocks():
            most = weights.amax(dim=-2)
            torch.maximum(lookups[..., : most.shape[-1]], most, out=lookups[..., : most.shape[-1]])
    if expected:
        lookups.add_(compute_expected_attention(observation), alpha=expected)
    if value_norms:
        lookups = lookups * compute_output_norms(observation)
    batch, heads, keys = lookups.shape
    grouped = lookups.view(batch, observation.kv_heads, heads // observation.kv_heads, keys)
    return grouped.sum(dim=2) if group == "sum" else grouped.amax(dim=2)


def _compute_lookups(observation: Observation, chunk_size: int, gap: int, own_keys: bool) -> Tensor:
    """Compute the largest probability that a turned query of its chunk gives each key, ``[batch, head, key]``."""
    batch, heads, queries, dim = observation.query.shape
    first = observation.key_length - queries
    keys = observation.keys[:, :, first:]
    back = _turn_back(observation, keys, gap)
    sinks = _turn_back(
        observation, observation.keys[:, :, : min(observation.sink_size, first or queries)], gap
    )
    key_heads = keys.shape[1]
    lookups = observation.keys.new_zeros(batch, heads, observation.key_length, dtype=torch.float32)
    for start, stop in split_chunks(queries, chunk_size):
        count = stop - start
        columns = [back[:, :, start:stop]]
        if start + first > 0:
            columns.append(sinks)
        if own_keys:
            columns.append(keys[:, :, start:stop])
        table = torch.cat(columns, dim=-2)
        most = lookups[:, :, first + start : first + stop].view(batch, key_heads, -1, count)
        step = observation.count_block_rows(table.shape[-2])
        for row in range(start, stop, step):
            rows = slice(row, min(row + step, stop))
            query = observation.query[:, :, rows].reshape(batch, key_heads, -1, dim)
            logits = torch.matmul(query, table.mT).mul_(observation.scaling).float()
            if observation.softcap is not None:
                logits.div_(observation.softcap).tanh_().mul_(observation.softcap)
            logits = logits.view(batch, heads, rows.stop - row, -1)
            if own_keys:
                later = torch.ones(rows.stop - row, count, dtype=torch.bool, device=logits.device)
                logits[..., -count:].masked_fill_(later.triu_(row - start + 1), float("-inf"))
            found = observation.softmax(logits)[..., :count].amax(dim=-2)
            torch.maximum(most, found.view_as(most), out=most)
    return lookups


def split_chunks(tokens: int, chunk_size: int) -> list[tuple[int, int]]:
    """Split tokens into chunks; a remainder shorter than half a chunk joins the chunk before.

    Examples
    --------
    >>> split_chunks(10, 4), split_chunks(9, 4), split_chunks(1, 4)
    ([(0, 4), (4, 8), (8, 10)], [(0, 4), (4, 9)], [(0, 1)])
    """
    starts = list(range(0, tokens, chunk_size))
    if len(starts) > 1 and 2 * (tokens - starts[-1]) < chunk_size:
        starts.pop()
    return list(zip(starts, [*starts[1:], tokens], strict=True))


def _turn_back(observation: Observation, keys: Tensor, gap: int) -> Tensor:
    """Turn keys back by the number of positions that the queries would be turned on: fewer heads, same products."""
    if observation.rotation is None:
        return keys
    frequencies = observation.rotation.frequencies.to(keys.device)
    shift = torch.tensor(observation.lengths, device=keys.device, dtype=torch.float32) + gap
    return observation.rotation.turn(keys, -shift.view(-1, 1, 1, 1) * frequencies)


def _check(
    chunk_size: object, gap: object, group: object, value_norms: object, own_keys: object, expected: object
) -> None:
    check_integer_option("echo", "chunk_size", chunk_size, 1)
    check_integer_option("echo", "gap", gap, 0)
    if group not in GROUPS:
        raise ConfigError(f"group={group!r} of selector 'echo' must be one of: {', '.join(GROUPS)}.")
    for name, value in (("value_norms", value_norms), ("own_keys", own_keys)):
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} of selector 'echo' must be True or False.")
    if isinstance(expected, bool) or not isinstance(expected, int | float) or not 0 <= expected <= 1e6:
        raise ConfigError(f"expected={expected!r} of selector 'echo' must be a number in [0, 1e6].")
