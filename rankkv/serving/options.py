"""Checks of the bodies of requests: known fields, ranges, and generation options that change nothing else."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable
from typing import Any

from ..utils.files import shorten
from .errors import RequestError

#: Options of transformers' ``generation_config`` that a client may set.
GENERATION_OPTIONS = {
    "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "max_new_tokens", "min_new_tokens", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id",
    "transformers_version", "_from_model_config",
}  # fmt: skip
#: Fields of each route that give the largest number of new tokens, the first one wins.
LIMITS = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
}

#: Fields that transformers reads, by route.
READ = {
    "chat": {
        "chat_template_kwargs", "frequency_penalty", "generation_config", "logit_bias", "max_completion_tokens",
        "max_tokens", "messages", "model", "seed", "stop", "stream", "temperature", "tools", "top_p",
    },
    "completions": {
        "frequency_penalty", "generation_config", "max_tokens", "model", "prompt", "seed", "stop", "stream", "suffix",
        "temperature", "top_p",
    },
    "responses": {
        "generation_config", "input", "instructions", "max_output_tokens", "model", "seed", "stream", "temperature",
        "tools", "top_p",
    },
}  # fmt: skip
#: Fields that are left unread, and change no answer.
HARMLESS = {
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "stream_options", "user",
}  # fmt: skip

# Values that change no answer, of the other fields that are left unread; null is one for all.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "include": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto",),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    # transformers turns it into a repetition penalty of 1 more.
    "frequency_penalty": (-0.9, 2.0),
}
# transformers refuses 0 in the middle of an answer; sampling is switched off by do_sample there.
_CONFIG_RANGES = {
    "temperature": (0.01, 2.0),
    "top_p": (0.01, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.01, 1.0),
    "repetition_penalty": (0.1, 10.0),
}
_MOST_STOPS, _LONGEST_STOP = 16, 200
_MOST_BIASES = 300
_LARGEST_SEED = 2**63 - 1


def check_fields(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a RequestError if a body has a field that the route does not know."""
    names = sorted(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "leave it out."
            raise RequestError(
                f"unknown field {shorten(name)}: {hint}", code="unknown_field", param=str(name)[:80]
            )


def check_options(kind: str, body: dict[str, Any], vocabulary: int, most_tokens: int) -> int | None:
    """Check the generation options of a body, and return the largest number of new tokens it asks for.

    Parameters
    ----------
    kind : {"chat", "completions", "responses"}
        Route.
    body : dict
        The body.
    vocabulary : int
        Number of tokens that the model knows.
    most_tokens : int
        Most tokens of an answer.

    Raises
    ------
    RequestError
        If an option has a value outside its range, or would be ignored although it changes the answer.
    """
    for name in sorted(body.keys() - READ[kind] - HARMLESS):
        allowed = _WITHOUT_EFFECT.get(name, ())
        if body[name] is not None and body[name] not in allowed:
            remedy = f"give {json.dumps(allowed[0])}, or leave it out" if allowed else "leave it out"
            raise RequestError(
                f"{name} {shorten(body[name])} is not supported by this server: {remedy}.",
                code="unsupported_option",
                param=name,
            )
    for name, (low, high) in _RANGES.items():
        if body.get(name) is not None:
            _check_number(name, body[name], low, high)
    if body.get("top_p") == 0:
        raise RequestError("top_p 0 keeps no token: give a number above 0, up to 1.", param="top_p")
    if body.get("seed") is not None:
        _check_whole("seed", body["seed"], 0, _LARGEST_SEED)
    if body.get("stream") not in (None, True, False):
        raise RequestError(f"stream {shorten(body['stream'])} must be true or false.", param="stream")
    _check_stop(body.get("stop"))
    _check_bias(body.get("logit_bias"), vocabulary)
    if "logit_bias" in body:
        # transformers takes floats alone, and refuses an empty object.
        biases = {token: float(value) for token, value in (body["logit_bias"] or {}).items()}
        body["logit_bias"] = biases or None
    for name in ("tools",):
        if not isinstance(body.get(name), list | None) or not all(
            isinstance(item, dict) for item in body.get(name) or []
        ):
            raise RequestError(f"{name} must be a list of objects.", param=name)
    _check_template_options(body.get("chat_template_kwargs"))
    given = _check_generation_config(body.get("generation_config"), vocabulary)
    limits = [(name, body[name]) for name in LIMITS[kind] if body.get(name) is not None]
    if given.get("max_new_tokens") is not None:
        limits.append(("generation_config.max_new_tokens", given["max_new_tokens"]))
    for name, value in limits:
        _check_whole(name, value, 1, most_tokens)
    return int(limits[0][1]) if limits else None


def _check_template_options(options: object) -> None:
    """Refuse what is not a variable of the template, such as another template or a cut prompt."""
    from transformers import PreTrainedTokenizerBase

    name = "chat_template_kwargs"
    if not isinstance(options, dict | None):
        raise RequestError(f"{name} must be an object with variables of the chat template.", param=name)
    closed = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    for option in options or ():
        if option in closed:
            raise RequestError(
                f"{name}.{option} is not open to clients: give variables of the chat template alone.",
                code="forbidden_option",
                param=f"{name}.{option}",
            )


def _check_generation_config(text: object, vocabulary: int) -> dict[str, Any]:
    """Return the options in a ``generation_config``; refuse those that cost more, or change what is returned."""
    if text is None:
        return {}
    name = "generation_config"
    try:
        given = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise RequestError(f"{name} must be a JSON object, written as a string.", param=name)
    from transformers import GenerationConfig

    plain = GenerationConfig().to_dict()
    for option, value in given.items():
        if option in GENERATION_OPTIONS or value is None or (option in plain and value == plain[option]):
            continue
        # One beam, one answer, with a cache: what the server does.
        if option in ("num_beams", "num_return_sequences", "use_cache") and value == 1:
            continue
        raise RequestError(
            f"{name}.{str(option)[:40]} is not open to clients: leave it out; open are "
            f"{', '.join(sorted(o for o in GENERATION_OPTIONS if not o.startswith(('_', 'tr'))))}.",
            code="forbidden_option",
            param=f"{name}.{str(option)[:40]}",
        )
    for option, (low, high) in _CONFIG_RANGES.items():
        if given.get(option) is not None:
            _check_number(f"{name}.{option}", given[option], low, high)
    if not isinstance(given.get("do_sample"), bool | None):
        raise RequestError(f"{name}.do_sample must be true or false.", param=f"{name}.do_sample")
    for option in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = given.get(option)
        for token in value if isinstance(value, list) else [value] if value is not None else []:
            _check_whole(f"{name}.{option}", token, 0, vocabulary - 1)
    for option in ("top_k", "no_repeat_ngram_size", "min_new_tokens"):
        if given.get(option) is not None:
            _check_whole(f"{name}.{option}", given[option], 0, 10**6)
    _check_stop(given.get("stop_strings"))
    try:
        GenerationConfig(**given)
    except (ValueError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{name} is refused by transformers: {shorten(str(error))}.", param=name
        ) from error
    return given


def _check_number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} {shorten(value)} must be a number from {low:g} to {high:g}.", param=name)


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(
            f"{name} {shorten(value)} must be a whole number from {low} to {high}.", param=name
        )


def _check_stop(stop: object) -> None:
    texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if (
        not isinstance(texts, list)
        or len(texts) > _MOST_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in texts)
    ):
        raise RequestError(
            f"stop must be a text or at most {_MOST_STOPS} texts, each of 1 to {_LONGEST_STOP} characters.",
            param="stop",
        )


def _check_bias(bias: object, vocabulary: int) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict) or len(bias) > _MOST_BIASES:
        raise RequestError(
            f"logit_bias must be an object with at most {_MOST_BIASES} token ids.", param="logit_bias"
        )
    for token, value in bias.items():
        if not token.isdecimal() or int(token) >= vocabulary:
            raise RequestError(
                f"logit_bias has the token {shorten(token)}: give ids from 0 to {vocabulary - 1}.",
                param="logit_bias",
            )
        _check_number("logit_bias", value, -100.0, 100.0)
