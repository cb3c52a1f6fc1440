"""Splitter of a benchmark's prompt into context and question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError, InputError


class PromptSplit:
    """Find the end of the context in the prompts of lm-evaluation-harness.

    Parameters
    ----------
    question_aware : bool
        If True, nothing is split: the whole prompt is compressed.
    separator : str
        The question begins with the last separator of the prompt.
    context_field : str, optional
        Field of the task's documents.  If given, the context ends with the text of that field instead.

    Raises
    ------
    ConfigError
        If ``question_aware`` is not a bool.
    """

    def __init__(self, question_aware: bool, separator: str, context_field: str | None) -> None:
        if not isinstance(question_aware, bool):
            raise ConfigError(f"question_aware={question_aware!r} must be True or False.")
        self.question_aware = question_aware
        # A shell cannot easily pass a newline, so "\n" may be given as two characters.
        self._separator = str(separator).replace("\\n", "\n")
        self._field = context_field
        self._ends: dict[str, int] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return the options, JSON-ready."""
        return {
            "question_aware": self.question_aware,
            "question_separator": None if self.question_aware else self._separator,
            "context_field": None if self.question_aware else self._field,
        }

    def note(self, requests: Iterable[Any]) -> None:
        """Find and remember the end of the context in each request's prompt.

        Raises
        ------
        InputError
            If a prompt has no separator, or does not contain the text of ``context_field``.
        """
        if not self.question_aware:
            self._ends = {
                request.args[0]: self._find_end(request.args[0], request.doc) for request in requests
            }

    def _find_end(self, prompt: str, document: Any) -> int:
        """Return the number of characters of a prompt's context."""
        if self._field is not None and isinstance(document, Mapping):
            context = document.get(self._field)
            if not isinstance(context, str):
                raise InputError(
                    f"the task's documents have no text under {self._field!r} (their fields: "
                    f"{', '.join(map(str, document))}): name another context_field."
                )
            # A task's template may strip the field's text.
            for text in (context, context.strip()):
                start = prompt.rfind(text)
                if text and start >= 0:
                    return start + len(text)
            raise InputError(
                f"the prompt does not contain the text of the field {self._field!r}: name another context_field, or "
                "give question_separator instead."
            )
        end = prompt.rstrip().rfind(self._separator)
        if end < 1:
            raise InputError(
                f"a prompt contains no question_separator {self._separator!r} (it begins with {prompt[:80]!r}): give "
                "another question_separator, context_field, or question_aware=True."
            )
        return end

    def count(self, prompt: str, ids: Sequence[int], encode: Callable[[str], list[int]]) -> int:
        """Return the number of context tokens of a noted prompt; all of its ids if question-aware."""
        if self.question_aware:
            return len(ids)
        context = encode(prompt[: self._ends[prompt]])
        # The last token of the context alone may differ from the prompt's, if one token spans context and question.
        # Such a token belongs to the question.
        pairs = enumerate(zip(context, ids, strict=False))
        return next((at for at, (a, b) in pairs if a != b), min(len(context), len(ids)))
