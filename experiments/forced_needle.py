"""Score a hidden code by teacher forcing: is it still in the compressed cache, by depth and length?

Two experiments use it, `needle_grid.py` and `method_quality.py`.  The library's own task is `needle`, which asks a
question and decodes the answer; the counts of the two do not compare.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankkv.errors import ConfigError, InputError
from rankkv.evaluation.perplexity import predict_tokens
from rankkv.evaluation.prefill_record import PrefillRecord, record_prefill
from rankkv.models.placement import find_input_device

NEEDLE = " The access code for the {place} is {code}."
QUESTION = "\nThe access code for the {place} is"
PLACES = ("archive room", "north gate", "boiler house", "reading hall", "server cellar", "green house")


@dataclass(frozen=True)
class NeedleScore:
    """What one cache made of one needle.

    Attributes
    ----------
    setting : str
        ``"full"``, ``"blank"`` (the full cache of a haystack without the needle: what guessing gives), or a setting's
        name.
    length : int
        Tokens of the context.
    depth : float
        Where the needle stands, 0 for the beginning and 1 for the end.
    seed : int
        Of place and code.
    exact : bool
        Whether greedy decoding gives the code.
    answer_loss : float
        Mean negative log-likelihood of the code's tokens, nats a token.
    """

    setting: str
    length: int
    depth: float
    seed: int
    exact: bool
    answer_loss: float


def evaluate_needle(
    model: Any,
    tokenizer: Any,
    haystack: str,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    lengths: Sequence[int] = (512, 1024),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    seeds: Sequence[int] = (0,),
    question_aware: bool = False,
    digits: int = 5,
) -> Iterator[NeedleScore]:
    """Hide a code in a text, compress, ask for it; one prefill serves all settings of a (length, depth, seed).

    Question-agnostic (the default), the context alone is compressed and the question comes after; question-aware, the
    question is the end of the prompt that is compressed, so it stands in the observation window, and the code's first
    token is predicted before any cache is read: it counts for neither number.  Teacher-forced argmax at every token of
    the code is what greedy decoding of the whole code takes, so one forward gives both numbers.

    Parameters
    ----------
    model, tokenizer
        A causal language model and its tokenizer.
    haystack : str
        Any text of at least ``max(lengths)`` tokens.
    settings : mapping
        Name of each setting, and its options of :class:`~rankkv.RankKVCache`.
    lengths : sequence of int
        Tokens of a context.
    depths : sequence of float
        In [0, 1].
    seeds : sequence of int
        One needle each.
    question_aware : bool, default False
        Whether the question is compressed with the context.
    digits : int, default 5
        Of the code.

    Yields
    ------
    NeedleScore
        ``"full"``, ``"blank"``, then the settings, for each length, depth and seed.

    Raises
    ------
    ConfigError
        If a depth is outside [0, 1] or ``digits`` below 2.
    InputError
        If the haystack is too short for a length, or a length for the needle.
    """
    if not all(0.0 <= depth <= 1.0 for depth in depths):
        raise ConfigError(f"depths {list(depths)} must lie in [0, 1], from the beginning to the end.")
    if digits < 2:
        raise ConfigError(f"digits={digits} must be at least 2: one digit is guessed too often.")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    hay = encode(haystack)
    for length in lengths:
        for depth in depths:
            for seed in seeds:
                draw = random.Random(f"{seed}-{depth}-{length}")
                place, code = draw.choice(PLACES), "".join(draw.choices("123456789", k=digits))
                needle = encode(NEEDLE.format(place=place, code=code))
                question = encode(QUESTION.format(place=place))
                answer = encode(QUESTION.format(place=place) + f" {code}")[len(question) :]
                room = length - len(needle)
                if room < 1 or len(hay) < length:
                    raise InputError(
                        f"a context of {length} tokens needs more than {len(needle)} for the needle and a haystack of "
                        f"at least {length} tokens; this one has {len(hay)}."
                    )
                at = round(depth * room)
                contexts = {"full": hay[:at] + needle + hay[at:room], "blank": hay[:length]}
                for name, context in contexts.items():
                    ids = context + question if question_aware else context
                    record = record_prefill(model, torch.tensor(ids)[None])
                    follow = answer if question_aware else question + answer
                    tries: dict[str, Mapping[str, Any] | None] = {name: None}
                    if name == "full":
                        tries.update(settings)
                    for setting, options in tries.items():
                        exact, loss = _ask(record, follow, len(answer), options)
                        yield NeedleScore(setting, length, depth, seed, exact, loss)


def _ask(
    record: PrefillRecord, follow: list[int], answered: int, options: Mapping[str, Any] | None
) -> tuple[bool, float]:
    cache = record.build_full_cache() if options is None else record.build_cache(**options)
    ids = torch.tensor(follow, device=find_input_device(record.model))[None]
    first = max(len(follow) - answered, 1)
    predicted, wanted = predict_tokens(record.model, cache, ids)[first - 1 : -1], ids[0, first:]
    loss = -predicted.gather(-1, wanted[:, None])[:, 0]
    return bool((predicted.argmax(dim=-1) == wanted).all()), float(loss.mean())
