"""The text that each token of a prompt stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a tokenizer decodes an unfinished character of several bytes to.
_UNFINISHED = "\ufffd"
# A character has at most four bytes; a token that still is none then never will be.
_MOST_PARTS = 4


def split_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the piece of text that every token adds, special tokens included.

    A character that several tokens make up stands at the last of them; the others get an empty string.  A space that a
    tokenizer writes only between tokens belongs to the token after it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Decodes.
    token_ids : sequence of int
        Of one prompt.

    Returns
    -------
    list of str
        One piece a token; joined they are the prompt.

    Examples
    --------
    >>> split_pieces(tokenizer, tokenizer("Two words")["input_ids"])  # doctest: +SKIP
    ['Two', ' words']
    """

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    pieces: list[str] = []
    before: list[int] = []
    part: list[int] = []
    for token_id in token_ids:
        part.append(int(token_id))
        # After what stands before it, since some tokenizers drop the space at the start of a text.
        lead = decode(before)
        text = decode(before + part)[len(lead) :]
        if text.endswith(_UNFINISHED) and len(part) < _MOST_PARTS:
            pieces.append("")
            continue
        pieces.append(text)
        before, part = part, []
    if part:
        pieces[-1] = decode(before + part)[len(decode(before)) :]
    return pieces
