"""Split a benchmark's prompt into its context and its question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError, InputError


class PromptSplit:
    """Tells context from question in the prompts of lm-evaluation-harness.

    Parameters
    ----------
    question_aware : bool
        Whether there is nothing to split: the whole prompt is compressed.
    separator : str
        The question begins with the last one in the prompt.
    context_field : str, optional
        Field of the task's documents; the context ends where its text does.

    Raises
    ------
    ConfigError
        If ``question_aware`` is not a bool.
    """

    def __init__(self, question_aware: bool, separator: str, context_field: str | None) -> None:
        if not isinstance(question_aware, bool):
            raise ConfigError(f"question_aware={question_aware!r} must be True or False.")
        self.question_aware = question_aware
        # A command line cannot give the end of a line itself.
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
        """Find where the context of each request's prompt ends.

        Raises
        ------
        InputError
            If a prompt has no separator, or does not contain its document's field.
        """
        if not self.question_aware:
            self._ends = {
                request.args[0]: self._find_end(request.args[0], request.doc) for request in requests
            }

    def _find_end(self, prompt: str, document: Any) -> int:
        """Return how many characters of a prompt are its context."""
        if self._field is not None and isinstance(document, Mapping):
            context = document.get(self._field)
            if not isinstance(context, str):
                raise InputError(
                    f"the task's documents have no text under {self._field!r} (they have "
                    f"{', '.join(map(str, document))}): name another context_field."
                )
            # A task's template may strip what stands in the document.
            for text in (context, context.strip()):
                start = prompt.rfind(text)
                if text and start >= 0:
                    return start + len(text)
            raise InputError(
                f"the prompt does not contain the text of the field {self._field!r}: name another context_field, or "
                "leave it out and give question_separator."
            )
        end = prompt.rstrip().rfind(self._separator)
        if end < 1:
            raise InputError(
                f"a prompt has no {self._separator!r} to tell the question from the context: give question_separator "
                f"or context_field, or question_aware=True. It begins: {prompt[:80]!r}"
            )
        return end

    def count(self, prompt: str, ids: Sequence[int], encode: Callable[[str], list[int]]) -> int:
        """Return how many of a noted prompt's ids are its context; all of them if the question is compressed too."""
        if self.question_aware:
            return len(ids)
        context = encode(prompt[: self._ends[prompt]])
        # Cut inside a word, the context's last token may differ from the prompt's there: then it is the question's.
        pairs = enumerate(zip(context, ids, strict=False))
        return next((at for at, (a, b) in pairs if a != b), min(len(context), len(ids)))
