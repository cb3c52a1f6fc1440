"""CalibrationSettings: the settings of a calibration, and the text chunks cut by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._version import __version__
from ..errors import ConfigError, InputError, UnknownNameError

#: Fractions kept at which each layer is compressed alone.
RATIOS = (0.03, 0.05, 0.1, 0.2, 0.4)
#: Fraction kept of all layers while one of them gets its full cache back.
BASE_RATIO = 0.1
#: Ways to measure a text chunk: one continuation per layer, ratio and head, or first-order estimates from one gradient.
METHODS = ("measured", "gradient")


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of a calibration, checked.

    Parameters
    ----------
    context_tokens, continuation_tokens : int
        Compressed and scored tokens of each text chunk.
    max_texts : int
        Most text chunks measured.
    ratios : tuple of float
        Fractions kept at which each layer is compressed alone, ascending.
    base_ratio : float
        Fraction kept of all layers while one gets its full cache back.
    selector : str or Selector
        Token selection method.
    heads : bool
        Measure each key/value head too.
    method : {"measured", "gradient"}
        One continuation per layer, ratio and head, or first-order estimates from one gradient.

    Raises
    ------
    ConfigError
        If a number is out of range.
    UnknownNameError
        If ``method`` is not one of these.

    Examples
    --------
    >>> CalibrationSettings(context_tokens=64, continuation_tokens=2).cut(None, [list(range(140))])[1][:3]
    [66, 67, 68]
    """

    context_tokens: int = 1024
    continuation_tokens: int = 256
    max_texts: int = 12
    ratios: tuple[float, ...] = RATIOS
    base_ratio: float = BASE_RATIO
    selector: Any = "snapkv"
    heads: bool = True
    method: str = "measured"

    def __post_init__(self) -> None:
        for name, least in (("context_tokens", 64), ("continuation_tokens", 2), ("max_texts", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} must be an integer of at least {least}.")
        if self.method not in METHODS:
            raise UnknownNameError.of("method", self.method, METHODS)
        ratios = self.ratios
        if not ratios or list(ratios) != sorted({*ratios}) or not 0 < ratios[0] <= ratios[-1] < 1:
            raise ConfigError(f"ratios={list(ratios)} must be ascending fractions kept, above 0 and below 1.")
        if not 0 < self.base_ratio < 1:
            raise ConfigError(
                f"base_ratio={self.base_ratio!r} must be above 0 and below 1: give the fraction kept."
            )

    def cut(self, tokenizer: Any, texts: Any) -> list[list[int]]:
        """Cut texts into chunks of token ids that do not overlap.

        Of more than ``max_texts`` chunks, evenly spread ones are returned. The rest of a text that fills no chunk is
        dropped.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase or None
            Needed for texts that are strings.
        texts : sequence of str or Tensor
            Strings, or token ids ``[token]`` or ``[1, token]``.

        Raises
        ------
        InputError
            If no text is long enough, or strings come without a tokenizer.
        """
        import torch

        tokens = self.context_tokens + self.continuation_tokens
        if texts is None or isinstance(texts, str):
            texts = [] if texts is None else [texts]
        chunks = []
        for text in texts:
            if isinstance(text, str):
                if tokenizer is None:
                    raise InputError(
                        "texts are strings, so a tokenizer is needed: give it, or give token ids."
                    )
                text = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)[
                    "input_ids"
                ]
            ids = torch.as_tensor(text).reshape(-1)
            chunks += [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
        if not chunks:
            raise InputError(
                f"no text has {tokens} tokens, the length of a context with its continuation: give longer texts, or "
                "fewer context_tokens and continuation_tokens."
            )
        count = min(self.max_texts, len(chunks))
        return [chunks[int((place + 0.5) * len(chunks) / count)].tolist() for place in range(count)]

    def count_steps(self, subject: Mapping[str, Any]) -> int:
        """Count the steps of progress of one text chunk.

        A step is one continuation, or the continuations of all heads of a layer, or one gradient.
        """
        if self.method == "gradient":
            return 1
        return (len(self.ratios) + 1 + self._measures_heads(subject)) * len(subject["layers"])

    def _measures_heads(self, subject: Mapping[str, Any]) -> bool:
        return bool(self.heads and subject["heads"])

    def make_key(self, ids: Sequence[int]) -> str:
        """Make the key of one text chunk's measurements within a calibration."""
        return _digest(list(ids))

    def describe(self, subject: Mapping[str, Any]) -> dict[str, Any]:
        """Describe everything that the measurements of all text chunks depend on, JSON-ready."""
        return {
            "model": _digest(subject["shape"]),
            "weights": _digest(subject["sample"]),
            "dtype": subject["dtype"],
            "context_tokens": self.context_tokens,
            "continuation_tokens": self.continuation_tokens,
            "ratios": list(self.ratios),
            "base_ratio": self.base_ratio,
            "selector": str(self.selector),
            "method": self.method,
            "heads": self._measures_heads(subject),
            "rankkv": __version__,
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
