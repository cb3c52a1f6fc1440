"""The page at ``/``, and the tokens of a context with the number of layers that keep each of them."""

from __future__ import annotations

import secrets
from importlib import resources
from typing import Any

import torch
from starlette.responses import HTMLResponse
from tokenizers.decoders import DecodeStream

from ..cache.cache import RankKVCache

# The page's own style and program, and requests to this server: nothing else runs, loads or embeds it.
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build_page(compression_ratio: float, max_loss: float | None = None) -> HTMLResponse:
    """Build the page; it holds no data, and asks the API as any other client does.

    Parameters
    ----------
    compression_ratio : float
        Fraction of a new context's cache that is kept, as long as the user chooses no other.
    max_loss : float, optional
        Loss that a new context stays below instead, as long as the user chooses no fraction.
    """
    nonce = secrets.token_urlsafe(16)
    text = (resources.files(__package__) / "templates" / "page.html").read_text(encoding="utf-8")
    text = text.replace("@NONCE@", nonce).replace("@RATIO@", f"{float(compression_ratio):g}")
    text = text.replace("@LOSS@", "" if max_loss is None else f"{max_loss:g}")
    headers = {
        "Content-Security-Policy": _POLICY.format(nonce=nonce),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(text, headers=headers)


def count_layers(cache: RankKVCache) -> list[int]:
    """Count for each token of a cache of one row the layers of which at least one head keeps it."""
    counts = torch.zeros(cache.seen_tokens, dtype=torch.int64)
    for index in cache.layer_indices:
        layer = cache.layers[index]
        positions, valid = layer.compute_positions()[0], layer.compute_slot_valid()
        if valid is not None:
            held = valid[0].expand(max(len(positions), valid[0].reshape(-1, valid.shape[-1]).shape[0]), -1)
            positions = positions.expand_as(held)[held]
        counts[positions.flatten().unique().cpu()] += 1
    return counts.tolist()


def list_pieces(tokenizer: Any, ids: list[int], counts: list[int]) -> list[tuple[str, int]]:
    """Return the text of tokens in order, each with its count.

    Tokens that are a character only together are one piece, with the largest of their counts.
    """
    stream, pieces = DecodeStream([], skip_special_tokens=False), []
    waiting: list[int] = []
    most = 0
    for token, count in zip(ids, counts, strict=True):
        waiting.append(token)
        most = max(most, count)
        text = stream.step(tokenizer._tokenizer, token)
        if text is not None:
            pieces.append((text, most))
            waiting, most = [], 0
    if waiting:
        pieces.append((tokenizer.decode(waiting), most))
    return pieces
