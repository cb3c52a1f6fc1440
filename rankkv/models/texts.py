"""Texts to measure on: Python's language reference, WikiText-2 from the hub, or a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, InputError, SourceUnavailableError, UnknownNameError
from ..utils.hub import is_hub_reachable, require
from ..utils.records import list_data_files, read_records

PYTHON_DOCS = "python-docs"
WIKITEXT = "wikitext"

_WIKITEXT_HUB_ID = "Salesforce/wikitext"
_WIKITEXT_CONFIG = "wikitext-2-raw-v1"
_SPLITS = ("train", "validation", "test")

# One "=" on each side: " = = Section = = " is a heading inside a document.
_TITLE = re.compile(r"\s*= (?!=)(?:.*[^=\s])? ?=\s*")
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")


def load_texts(
    name: str | os.PathLike[str], *, split: str = "validation", limit: int | None = None
) -> list[str]:
    """Load the documents of a data set, always in the same order.

    Parameters
    ----------
    name : str or path
        "python-docs" (the language reference in `pydoc_data`, one text per topic; no network), "wikitext"
        (WikiText-2 raw from the hub, lines joined into articles), or the path of a ``.txt``, ``.jsonl``,
        ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, also with ``.gz``, or of a folder of such files. Entries
        hold their text under "text". A text file in WikiText's form is split at its titles (``= Title =`` between
        blank lines); any other is one text.
    split : {"validation", "train", "test"}, default="validation"
        Part of WikiText-2; the other sources have only one.
    limit : int, optional
        Return at most this many texts, the first ones.

    Returns
    -------
    list of str
        At least one text, none blank.

    Raises
    ------
    ConfigError
        If ``limit`` is below 1.
    InputError
        If a file is empty, not UTF-8 or of another kind, or a JSON line has no text (the message numbers it).
    MissingDependencyError
        If ``name`` is "wikitext" and the package `datasets` is not installed.
    SourceUnavailableError
        If the file does not exist, or the hub cannot be reached.
    UnknownNameError
        If ``split`` is not one of the three.

    Examples
    --------
    >>> texts = load_texts("python-docs", limit=2)
    >>> len(texts), texts[0].startswith('The "assert" statement')
    (2, True)
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit} but must be at least 1, or None for all texts.")
    text = os.fspath(name)
    if text == PYTHON_DOCS:
        texts = _python_docs_topics()
    elif text == WIKITEXT:
        if split not in _SPLITS:
            raise UnknownNameError.of("split", split, _SPLITS)
        texts = _load_wikitext(split)
    else:
        texts = _load_file(Path(text).expanduser())
    return texts[:limit]


def python_docs_text() -> str:
    """Return the whole language reference of this Python as one text.

    Returns
    -------
    str
        About 465,000 characters: topics in alphabetical order, a blank line between them. The wording differs
        a little between Python versions.

    Examples
    --------
    >>> len(python_docs_text()) > 300_000
    True
    """
    return "\n\n".join(topic.strip() for topic in _python_docs_topics())


def insert_fact(text: str, fact: str, depth: float = 0.5) -> str:
    """Insert a fact into a document, at the sentence or paragraph boundary nearest to a relative depth.

    Parameters
    ----------
    text : str
        The document; all of it is kept.
    fact : str
        One or more whole sentences.
    depth : float, default=0.5
        0 puts the fact first, 1 last, 0.5 in the middle, measured in characters.

    Returns
    -------
    str
        The document with the fact in it; at a paragraph boundary the fact is a paragraph of its own.

    Raises
    ------
    ConfigError
        If ``depth`` is outside [0, 1].
    InputError
        If ``text`` or ``fact`` is blank.

    Examples
    --------
    >>> insert_fact("One. Two. Three. Four.", "The code is 7.", depth=0.5)
    'One. Two. The code is 7. Three. Four.'
    """
    if not 0.0 <= depth <= 1.0:
        raise ConfigError(
            f"depth is {depth} but must be in [0, 1]: 0 is the start of the document, 1 its end."
        )
    fact = fact.strip()
    if not text.strip() or not fact:
        raise InputError(f"the {'document' if fact else 'fact'} is blank; give some text.")

    target = depth * len(text)
    ends = {match.end(): "\n\n" for match in _PARAGRAPH_END.finditer(text)}
    breaks = (
        {match.end(): " " for match in _SENTENCE_END.finditer(text)} | ends | {0: "\n\n", len(text): "\n\n"}
    )
    if not ends:
        breaks |= {0: " ", len(text): " "}
    position = min(breaks, key=lambda end: (abs(end - target), end))
    glue = breaks[position]
    before = "" if position == 0 or text[:position].endswith(glue) else glue
    after = "" if position == len(text) else glue
    return f"{text[:position]}{before}{fact}{after}{text[position:]}"


def take_tokens(tokenizer: Any, text: str, tokens: int) -> str:
    """Cut a text after at most ``tokens`` tokens.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Counts the tokens, without special ones.
    text : str
        Must have at least ``tokens`` tokens.
    tokens : int
        Number of tokens, at least 1.

    Returns
    -------
    str
        A start of ``text`` that has at most ``tokens`` tokens when tokenized by itself. It may have a few less,
        since a word cut in two is tokenized differently.

    Raises
    ------
    ConfigError
        If ``tokens`` is below 1.
    InputError
        If ``text`` is too short (the message gives its number of tokens), or the tokenizer changes the text.

    Examples
    --------
    >>> take_tokens(tokenizer, python_docs_text(), 4096)  # doctest: +SKIP
    """
    if tokens < 1:
        raise ConfigError(f"tokens is {tokens} but must be at least 1.")
    ids = encode_plain(tokenizer, text)
    if len(ids) < tokens:
        raise InputError(f"{tokens} tokens were requested but the text has {len(ids)}; give a longer text.")
    for taken in range(tokens, 0, -1):
        # A token may end inside a character of several bytes; decoding shows the rest as U+FFFD.
        start = tokenizer.decode(ids[:taken], skip_special_tokens=False).rstrip("\ufffd")
        if start and text.startswith(start) and len(encode_plain(tokenizer, start)) <= tokens:
            return start
    raise InputError(
        "decoding the tokens does not give the text back, so the text cannot be cut at a token; "
        "cut the token ids instead."
    )


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _python_docs_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics) if topics[name].strip()]


def _load_wikitext(split: str) -> list[str]:
    require("datasets", 'pip install "rankkv[data]"', "the data set 'wikitext'")
    reachable = is_hub_reachable(_WIKITEXT_HUB_ID, "dataset")

    import datasets

    # Otherwise `datasets` retries an unreachable hub many times before it reads its local cache.
    was_offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = was_offline or not reachable
    try:
        rows = datasets.load_dataset(_WIKITEXT_HUB_ID, _WIKITEXT_CONFIG, split=split)
    except (OSError, ValueError) as error:
        raise SourceUnavailableError(
            "the hub cannot be reached to load 'wikitext' and its local cache lacks it; "
            "use 'python-docs' or the path of a file of texts, which need no network."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return _split_at_titles(rows["text"])


def _load_file(path: Path) -> list[str]:
    if not path.exists():
        raise SourceUnavailableError(
            f"no texts at {str(path)!r}; give {PYTHON_DOCS!r}, {WIKITEXT!r} or an existing file."
        )
    texts = []
    for file in list_data_files(path):
        for record in read_records(file):
            text = record.fields.get("text")
            if not isinstance(text, str):
                raise InputError(f'{record.where} is not an object with a string under "text".')
            if _is_plain(file):
                texts += _split_plain(text)
            elif text.strip():
                texts.append(text)
    if not texts:
        raise InputError(f"{str(path)!r} is empty; give a file with at least one document.")
    return texts


def _is_plain(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".txt")


def _split_plain(content: str) -> list[str]:
    texts = _split_at_titles(content.splitlines(keepends=True))
    # Text before the first title is a document of its own, so even one title makes two documents.
    return texts if len(texts) > 1 else [content] if content.strip() else []


def _split_at_titles(lines: Iterable[str]) -> list[str]:
    """Join lines into documents; each title between blank lines starts a new one."""
    rows = list(lines)
    documents: list[list[str]] = [[]]
    for index, line in enumerate(rows):
        alone = (index == 0 or not rows[index - 1].strip()) and (
            index + 1 == len(rows) or not rows[index + 1].strip()
        )
        if alone and _TITLE.fullmatch(line):
            documents.append([])
        documents[-1].append(line)
    return [joined for joined in map("".join, documents) if joined.strip()]
