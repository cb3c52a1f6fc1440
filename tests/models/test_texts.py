"""Texts: sources and their order, unreadable files, a fact hidden at a depth, a start of so many tokens."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankkv.errors import (
    ConfigError,
    InputError,
    MissingDependencyError,
    SourceUnavailableError,
    UnknownNameError,
)
from rankkv.models.texts import insert_fact, load_texts, python_docs_text, take_tokens

# Two articles as the raw files have them: sections inside, a line that only looks like a title.
WIKITEXT = """
 = First Article =

 Some text of the first .
 = not a title , as no blank line follows =
 More text .

 = = Section = =

 Under the section .

 = Second Article =

 Its text .
"""


def test_python_docs_are_all_topics_in_one_order(python_docs: str) -> None:
    from pydoc_data.topics import topics

    texts = load_texts("python-docs")
    assert len(texts) == len(topics)
    assert sorted(texts) == sorted(topics.values())
    assert load_texts("python-docs", limit=3) == texts[:3]
    assert python_docs == python_docs_text()
    assert all(text.strip() in python_docs for text in texts)


def test_wikitext_file_is_split_at_titles(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(WIKITEXT, encoding="utf-8")
    first, second = load_texts(path)
    assert "".join((first, second)).strip() == WIKITEXT.strip()
    assert "= = Section = =" in first
    assert "not a title" in first
    assert second.startswith(" = Second Article =")
    assert load_texts(path, limit=1) == [first]


@pytest.mark.parametrize(
    "content", ["A plain text.\n\nTwo paragraphs.\n", "one line", " = Only Title = \n\nText\n"]
)
def test_other_text_file_is_one_text(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text(content, encoding="utf-8")
    assert load_texts(str(path)) == [content]


def test_jsonl_gives_each_text(tmp_path: Path) -> None:
    texts = ["ein Text", "第二个文本", "line\u2028separator inside"]
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    path.write_text("\r\n".join([*lines, "", '{"text": "  "}', ""]), encoding="utf-8", newline="")
    assert load_texts(path) == texts


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfText.")
    assert load_texts(path) == ["Text."]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', InputError, "line 2"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"body": "x"}\n', InputError, "line 3"),
        ("a.jsonl", b'["text"]\n', InputError, "line 1"),
        ("a.jsonl", b"[" * 100_000 + b"\n", InputError, "line 1.*nested too deeply"),
        ("a.jsonl", b'{"text": 5}\n', InputError, "line 1"),
        ("a.jsonl", b"\n \n", InputError, "empty"),
        ("a.txt", b"caf\xe9", InputError, "byte 3.*UTF-8"),
        ("a.txt", b"", InputError, "empty"),
        ("a.txt", b" \n\n", InputError, "empty"),
        ("a.pdf", b"%PDF", InputError, r"\.jsonl, \.json, .*\.txt"),
        ("a.txt", None, SourceUnavailableError, r"a\.txt"),
    ],
)
def test_bad_files_are_named(
    name: str, content: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as caught:
        load_texts(path)
    assert re.search(message, str(caught.value)) or re.search("UTF-8.*byte 3", str(caught.value))
    assert name in str(caught.value)


def test_folder_without_texts_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data file"):
        load_texts(tmp_path)


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    import gzip

    texts = ["one, with a comma", "two\nlines", "d\u00e9j\u00e0 \u4f60"]
    entries = [{"text": text} for text in texts]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "list.json").write_text(json.dumps(entries))
    (tmp_path / "columns.json").write_text(json.dumps({"text": texts}))
    (tmp_path / "rows.json").write_text(json.dumps({"data": entries}))
    (tmp_path / "strings.json").write_text(json.dumps(texts))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(entries)
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(__import__("pyarrow").table({"text": texts}), tmp_path / "a.parquet")
    files = sorted(tmp_path.iterdir())
    for file in files:
        assert load_texts(file) == texts, file
    assert load_texts(tmp_path) == texts * len(files)


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="limit is 0"):
        load_texts("python-docs", limit=0)
    with pytest.raises(UnknownNameError, match="did you mean 'validation'"):
        load_texts("wikitext", split="validaton")
    with pytest.raises(SourceUnavailableError, match="python-docs"):
        load_texts("no-such-source")


def test_wikitext_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rankkv\[data\]"'):
        load_texts("wikitext")


FACT = "The number of the locker is 7391."
WORDS = st.text(alphabet="abc ", min_size=1, max_size=30).filter(str.strip)
DOCUMENTS = st.lists(
    st.tuples(WORDS, st.sampled_from([". ", "? ", ".\n", ".\n\n"])), min_size=1, max_size=30
).map(lambda parts: "".join(word + end for word, end in parts))


@given(text=DOCUMENTS, depth=st.floats(0, 1))
def test_fact_is_in_and_nothing_is_lost(text: str, depth: float) -> None:
    result = insert_fact(text, FACT, depth)
    assert result.count(FACT) == 1
    before, after = result.split(FACT)
    assert "".join((before + after).split()) == "".join(text.split())
    # Only whitespace is added, so what comes before the fact ends with the text's start, and so on.
    assert text.startswith(before.rstrip())
    assert text.endswith(after.lstrip())


@given(text=DOCUMENTS, first=st.floats(0, 1), second=st.floats(0, 1))
def test_deeper_is_never_earlier(text: str, first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert insert_fact(text, FACT, low).index(FACT) <= insert_fact(text, FACT, high).index(FACT)


def test_fact_stands_at_a_boundary_near_its_depth(python_docs: str) -> None:
    for depth in (0.0, 0.1, 0.35, 0.5, 0.9, 1.0):
        result = insert_fact(python_docs, FACT, depth)
        position = result.index(FACT)
        assert abs(position / len(python_docs) - depth) < 0.01
        assert position == 0 or re.search(r"([.!?][\"')\]]*\s+|\n[ \t]*\n\s*)\Z", result[:position])
    assert insert_fact(python_docs, FACT, 0.0).startswith(FACT + "\n\n")
    assert insert_fact(python_docs, FACT, 1.0).endswith("\n\n" + FACT)


@pytest.mark.parametrize("depth", [-0.1, 1.5, float("nan")])
def test_depth_out_of_range(depth: float) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\]"):
        insert_fact("A text. Another.", FACT, depth)


@pytest.mark.parametrize(("text", "fact"), [("", FACT), (" \n", FACT), ("A text.", " ")])
def test_nothing_to_hide(text: str, fact: str) -> None:
    with pytest.raises(InputError, match="blank"):
        insert_fact(text, fact)


@pytest.mark.parametrize("tokens", [1, 17, 1000, 4096])
def test_start_of_so_many_tokens(tokens: int, embedded: tuple[Any, Any], python_docs: str) -> None:
    _, tokenizer = embedded
    start = take_tokens(tokenizer, python_docs, tokens)
    assert python_docs.startswith(start)
    count = len(tokenizer(start, add_special_tokens=False)["input_ids"])
    assert tokens - 4 < count <= tokens


def test_start_never_ends_inside_a_character(embedded: tuple[Any, Any]) -> None:
    _, tokenizer = embedded
    text = "雪が降る🙂🙃 " * 10
    for tokens in range(3, 40):
        start = take_tokens(tokenizer, text, tokens)
        assert text.startswith(start)
        assert len(tokenizer(start, add_special_tokens=False)["input_ids"]) <= tokens


def test_text_too_short_says_how_short(embedded: tuple[Any, Any]) -> None:
    _, tokenizer = embedded
    count = len(tokenizer("A short text.", add_special_tokens=False)["input_ids"])
    with pytest.raises(InputError, match=f"has {count};"):
        take_tokens(tokenizer, "A short text.", count + 1)
    with pytest.raises(ConfigError, match="at least 1"):
        take_tokens(tokenizer, "A short text.", 0)
