"""Echo: keep the keys that the prompt's own queries look up when they are turned to positions behind the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedModelError
from ..observe.observation import Observation
from ..utils.devices import send_numbers, send_tensor
from .expected_attention import compute_expected_attention
from .scoring import check_integer_option, compute_output_norms, without_padding

# Queries that the moments of expected attention are taken from: more change nothing that counts.
_MOMENT_QUERIES = 512

#: Ways to join the query heads of a group.
GROUPS = ("sum", "max")


@without_padding
def score_echo(
    observation: Observation,
    chunk_size: int = 64,
    far_keys: int = 64,
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

    ``p^g_i = softmax of s (R(D) q^g_i) k over k in [k_a .. k_b-1 | sinks if a > 0 | far keys | R(D) k_a .. R(D) k_i]``

    ``score_j = sum over the heads g of the group of (max over i of p^g_ij + expected * e^g_j) ||W^g v_j||_2``

    The first part is not causal: a replayed token sees the whole chunk.  The far keys are spread evenly over the other
    chunks.  Each of the ``m`` far keys counts for ``(n - b + a) / m`` keys, which is its factor in the softmax.  So a
    head that attends to all of the text gives no key of its chunk a large share, however short the chunk.  The last
    part stands for the keys that a replay would add itself.  ``e^g_j`` is the expected attention of future queries, as
    in ``expected_attention``.  Lookups keep single facts; expected attention keeps what any text that goes on attends
    to.  ``W^g`` holds the rows of the output projection that belong to head g.

    Queries that come after the first forward also score all other keys, by their plain attention.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys, values and rotary embedding.
    chunk_size : int, default 64
        Tokens of a chunk.  A remainder shorter than half a chunk joins the chunk before.
    far_keys : int, default 64
        Keys that stand for all other chunks in the softmax; 0 leaves the other chunks out.
    gap : int, default 8
        Positions between the prompt and the turned queries, for the instruction of a replay.
    group : {"sum", "max"}, default "sum"
        Way to join the query heads of a group.
    value_norms : bool, default True
        Multiply by ``||W^g v_j||_2``; by ``||v_j||_2`` if no output projection is found.
    own_keys : bool, default True
        Use the last part of the softmax.
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
    Echo differs from a replay in three points.  Hidden states are those of the first pass.  No instruction precedes the
    chunk.  Chunks may be short, since what a token would look up lies close behind it.

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
    _check(chunk_size, far_keys, gap, group, value_norms, own_keys, expected)
    if observation.position_bias is not None:
        raise UnsupportedModelError(
            f"layer {observation.layer_idx} adds a position bias to its attention, so its queries cannot be turned to "
            "later positions: use selector='snapkv' or 'h2o' with this model."
        )
    lookups = _compute_lookups(observation, chunk_size, far_keys, gap, own_keys)
    if observation.query_start > min(observation.row_start):
        for weights in observation.attention_blocks():
            most = weights.amax(dim=-2)
            torch.maximum(lookups[..., : most.shape[-1]], most, out=lookups[..., : most.shape[-1]])
    if expected:
        stride = max(1, observation.query_length // _MOMENT_QUERIES)
        lookups.add_(compute_expected_attention(observation, stride=stride), alpha=expected)
    if value_norms:
        lookups = lookups * compute_output_norms(observation)
    batch, heads, keys = lookups.shape
    grouped = lookups.view(batch, observation.kv_heads, heads // observation.kv_heads, keys)
    return grouped.sum(dim=2) if group == "sum" else grouped.amax(dim=2)


def _compute_lookups(
    observation: Observation, chunk_size: int, far_keys: int, gap: int, own_keys: bool
) -> Tensor:
    """Compute the largest probability that a turned query of its chunk gives each key, ``[batch, head, key]``."""
    batch, heads, queries = observation.query.shape[:3]
    first = observation.key_length - queries
    keys = observation.keys[:, :, first:]
    back = _turn_back(observation, keys, gap)
    sink_size = min(observation.sink_size, first or queries)
    sinks = back[:, :, :sink_size]
    if first:
        sinks = _turn_back(observation, observation.keys[:, :, :sink_size], gap)
    # The sinks have columns of their own.
    places = spread_places(0 if first else sinks.shape[2], queries, far_keys)
    far = back[:, :, send_tensor(places, keys.device)]
    lookups = observation.keys.new_zeros(batch, heads, observation.key_length, dtype=torch.float32)
    # Chunks of one size go together: few large products, whatever the number of chunks.
    for start, count, size in group_chunks(split_chunks(queries, chunk_size)):
        columns = size + sinks.shape[2] + len(places) + (size if own_keys else 0)
        together = max(1, observation.count_block_rows(columns) // size)
        for chunk in range(0, count, together):
            begin, number = start + chunk * size, min(together, count - chunk)
            rows = slice(begin, begin + number * size)
            table = [part[:, :, rows].unflatten(2, (number, size)) for part in (back, keys)[: 1 + own_keys]]
            table[1:1] = [part[:, :, None].expand(-1, -1, number, -1, -1) for part in (sinks, far)]
            found = _look_up(
                observation,
                rows,
                torch.cat(table, dim=-2),
                sinks.shape[2],
                begin + first == 0,
                send_tensor(weigh_far_keys(places, begin, number, size, queries), keys.device),
            )
            lookups[:, :, first + begin : first + rows.stop] = found
    return lookups


def spread_places(first: int, stop: int, count: int) -> Tensor:
    """Return at most ``count`` evenly spread numbers from ``first`` to ``stop - 1``, ascending.

    Examples
    --------
    >>> spread_places(4, 16, 3).tolist(), spread_places(4, 6, 3).tolist()
    ([6, 10, 14], [4, 5])
    """
    count = max(0, min(count, stop - first))
    return first + ((torch.arange(count) + 0.5) * (stop - first) / max(1, count)).long()


def weigh_far_keys(places: Tensor, begin: int, number: int, size: int, tokens: int) -> Tensor:
    """Return the logarithm of the keys that each far key stands for, ``[chunk, far_key]`` float32.

    A far key inside a chunk is none of it: its logarithm is minus infinity.  The others share the tokens outside.

    Examples
    --------
    >>> weigh_far_keys(torch.tensor([1, 5, 9]), 0, 2, 4, 12).exp().tolist()
    [[0.0, 4.0, 4.0], [4.0, 0.0, 4.0]]
    """
    starts = begin + size * torch.arange(number, device=places.device)[:, None]
    outside = (places < starts) | (places >= starts + size)
    shared = (tokens - size) / outside.sum(dim=1, keepdim=True).clamp(min=1)
    return shared.log().expand(-1, len(places)).masked_fill(~outside, float("-inf"))


def _look_up(
    observation: Observation, rows: slice, table: Tensor, sinks: int, is_first: bool, far_weights: Tensor
) -> Tensor:
    """Compute the largest probability of each key of some chunks, ``[batch, head, key]``.

    ``table`` is ``[batch, kv_head, chunk, column, head_dim]``: the chunk's keys, the ``sinks`` first keys of the text,
    the far keys with their weights, and the keys that a replay would add.
    """
    batch, key_heads, number, columns, dim = table.shape
    size = (rows.stop - rows.start) // number
    far, own = size + sinks, size + sinks + far_weights.shape[1]
    query = observation.query[:, :, rows].view(batch, key_heads, -1, number, size, dim).transpose(2, 3)
    # A long chunk of many heads is taken in parts, so that a block of logits stays small.
    step = max(16, min(size, observation.count_block_rows(columns) // number))
    most: Tensor | None = None
    index = torch.arange(size, device=table.device)
    for row in range(0, size, step):
        part = query[..., row : row + step, :]
        logits = torch.matmul(part.flatten(3, 4), table.mT).mul_(observation.scaling).float()
        if observation.softcap is not None:
            logits.div_(observation.softcap).tanh_().mul_(observation.softcap)
        logits = logits.view(*part.shape[:-1], columns)
        if own > far:
            logits[..., far:own].add_(far_weights[:, None, None])
        if own < columns:
            logits[..., own:].masked_fill_(index > index[row : row + step, None], float("-inf"))
        if is_first:
            # The first chunk holds the sinks itself.
            logits[:, :, 0, ..., size:far] = float("-inf")
        logits = logits.permute(0, 1, 3, 2, 4, 5) if observation.sink_logits is not None else logits
        found = _normalize(observation, logits, size)
        most = found if most is None else torch.maximum(most, found)
    found = table.new_zeros(0) if most is None else most
    return found.permute(0, 1, 3, 2, 4).reshape(batch, -1, number * size)


def _normalize(observation: Observation, logits: Tensor, size: int) -> Tensor:
    """Return the largest probability over the rows of ``[batch, kv_head, chunk, group, row, column]``."""
    if observation.sink_logits is None:
        return torch.softmax(logits, dim=-1, out=logits)[..., :size].amax(dim=-2)
    batch, key_heads, groups, number, rows, columns = logits.shape
    joined = logits.reshape(batch, key_heads * groups, number * rows, columns)
    weights = observation.softmax(joined).view(batch, key_heads, groups, number, rows, columns)
    return weights[..., :size].amax(dim=-2).transpose(2, 3)


def group_chunks(chunks: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Join neighbouring chunks of one size: the first token, the number of chunks, and their size.

    Examples
    --------
    >>> group_chunks([(0, 4), (4, 8), (8, 14)])
    [(0, 2, 4), (8, 1, 6)]
    """
    groups: list[tuple[int, int, int]] = []
    for start, stop in chunks:
        if groups and groups[-1][2] == stop - start:
            groups[-1] = (groups[-1][0], groups[-1][1] + 1, stop - start)
        else:
            groups.append((start, 1, stop - start))
    return groups


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
    shift = send_numbers([length + gap for length in observation.lengths], keys.device, torch.float32)
    return observation.rotation.turn(keys, -shift.view(-1, 1, 1, 1) * frequencies)


def _check(
    chunk_size: object,
    far_keys: object,
    gap: object,
    group: object,
    value_norms: object,
    own_keys: object,
    expected: object,
) -> None:
    check_integer_option("echo", "chunk_size", chunk_size, 1)
    check_integer_option("echo", "far_keys", far_keys, 0)
    check_integer_option("echo", "gap", gap, 0)
    if group not in GROUPS:
        raise ConfigError(f"group={group!r} of selector 'echo' must be one of: {', '.join(GROUPS)}.")
    for name, value in (("value_norms", value_norms), ("own_keys", own_keys)):
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} of selector 'echo' must be True or False.")
    if isinstance(expected, bool) or not isinstance(expected, int | float) or not 0 <= expected <= 1e6:
        raise ConfigError(f"expected={expected!r} of selector 'echo' must be a number in [0, 1e6].")
