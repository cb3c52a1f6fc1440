"""Metrics of published benchmarks: one function each, from an output and its references to a score in [0, 1]."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import UnknownNameError
from ...utils.hub import require

INSTALL = 'pip install "rankkv[benchmarks]"'

# The list of LongBench: punctuation of Chinese text, and dashes and quotes beyond ASCII.
_CHINESE_PUNCTUATION = (
    "\uff01\uff1f\uff61\u3002\uff02\uff03\uff04\uff05\uff06\uff07\uff08\uff09\uff0a\uff0b\uff0c\uff0d\uff0f\uff1a"
    "\uff1b\uff1c\uff1d\uff1e\uff20\uff3b\uff3c\uff3d\uff3e\uff3f\uff40\uff5b\uff5c\uff5d\uff5e\uff5f\uff60\uff62"
    "\uff63\uff64\u3001\u3003\u300b\u300c\u300d\u300e\u300f\u3010\u3011\u3014\u3015\u3016\u3017\u3018\u3019\u301a"
    "\u301b\u301c\u301d\u301e\u301f\u3030\u303e\u303f\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026"
    "\u2027\ufe4f."
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
# InfiniteBench turns these into spaces before it looks for words.
_SEPARATORS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))


@dataclass(frozen=True)
class Metric:
    """Define a metric.

    Attributes
    ----------
    name : str
        Key in :data:`METRICS`.
    function : callable
        ``function(output, references, classes)`` returns a score in [0, 1].
    source : str
        Benchmark whose definition it is.
    packages : tuple of str
        Packages that it imports.
    """

    name: str
    function: Callable[[str, Sequence[str], Sequence[str]], float]
    source: str
    packages: tuple[str, ...] = ()

    def check_packages(self) -> None:
        """Raise a MissingDependencyError with the install command if a package is missing."""
        for package in self.packages:
            require(package, INSTALL, f"the metric {self.name!r}")

    def compute(self, output: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
        """Compute the score of one output.

        Examples
        --------
        >>> METRICS["qa_f1"].compute("The Eiffel tower", ["Eiffel Tower in Paris", "Louvre"])
        0.6666666666666666
        """
        return float(self.function(output, references, classes))


def get_metric(name: str) -> Metric:
    """Return the metric of a name.

    Raises
    ------
    UnknownNameError
        If there is no such metric.
    """
    if name not in METRICS:
        raise UnknownNameError.of("metric", name, METRICS)
    return METRICS[name]


# -- words in common ------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Return a text in lower case without punctuation, articles and repeated white space.

    Examples
    --------
    >>> normalize_answer("The  cat, a dog!")
    'cat dog'
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalize_chinese(text: str) -> str:
    """Return a text in lower case without Chinese and ASCII punctuation and white space."""
    return "".join(text.lower().translate(_NO_CHINESE_PUNCTUATION).split())


def compute_f1(output: Sequence[str], reference: Sequence[str]) -> float:
    """Compute the harmonic mean of precision and recall of the tokens that two sequences share.

    Examples
    --------
    >>> compute_f1(["a", "b"], ["b", "c", "b"])
    0.4
    """
    shared = sum((Counter(output) & Counter(reference)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(output), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def _qa_f1(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    own = normalize_answer(output).split()
    return max((compute_f1(own, normalize_answer(one).split()) for one in references), default=0.0)


def _cut_chinese(text: str) -> list[str]:
    import jieba

    return list(jieba.cut(text, cut_all=False))


def _qa_f1_zh(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    def split(text: str) -> list[str]:
        return [word for word in map(normalize_chinese, _cut_chinese(text)) if word]

    own = split(output)
    return max((compute_f1(own, split(one)) for one in references), default=0.0)


def _character_f1_zh(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    own = list(normalize_chinese(output))
    return max((compute_f1(own, list(normalize_chinese(one))) for one in references), default=0.0)


# -- rouge ----------------------------------------------------------------------------------------------------


def _rouge_l(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    # The library of LongBench. Its values are not those of rouge-score.
    from rouge import Rouge

    def compare(reference: str) -> float:
        try:
            return float(Rouge(metrics=["rouge-l"]).get_scores([output], [reference])[0]["rouge-l"]["f"])
        except (ValueError, RecursionError):
            # LongBench gives 0 where the library fails: on an empty text, and on a very long one.
            return 0.0

    return max(map(compare, references), default=0.0)


def _rouge_l_zh(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    cut = [" ".join(_cut_chinese(text)) for text in (output, *references)]
    return _rouge_l(cut[0], cut[1:], classes)


def _rouge_l_sum(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeLsum"], use_stemmer=False)
    return max((scorer.score(one, output)["rougeLsum"].fmeasure for one in references), default=0.0)


# -- classes, numbers, code -----------------------------------------------------------------------------------


def _classification(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    def score(reference: str) -> float:
        named = [name for name in classes if name in output]
        # LongBench removes from the list that it walks over, which skips the entry behind each removed one.
        # Its published scores have this, so it is done here too.
        place = 0
        while place < len(named):
            if named[place] in reference and named[place] != reference:
                named.remove(named[place])
            place += 1
        return 1.0 / len(named) if reference in named else 0.0

    return max(map(score, references), default=0.0)


def _share_of_numbers(output: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", output)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _count(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    return max((_share_of_numbers(output, one) for one in references), default=0.0)


def _make_retrieval(word: str) -> Callable[[str, Sequence[str], Sequence[str]], float]:
    def score(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
        wanted = [found[0] for one in references if (found := re.findall(rf"{word}(\d+)", one))]
        return max((_share_of_numbers(output, number) for number in wanted), default=0.0)

    return score


def _code_similarity(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    lines = output.lstrip("\n").split("\n")
    # The first line that is neither a comment nor the fence of a code block.
    line = next((one for one in lines if not ("`" in one or "#" in one or "//" in one)), "")

    def compare(reference: str) -> float:
        if not line or not reference:
            return 0.0
        return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100

    return max(map(compare, references), default=0.0)


# -- strings to find ------------------------------------------------------------------------------------------


def _string_match_all(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    text = output.lower()
    return sum(one.lower() in text for one in references) / len(references) if references else 0.0


def _string_match_part(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    text = output.lower()
    return float(any(one.lower() in text for one in references))


def _contains(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    return float(any(one in output for one in references))


def _word(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    return float(references[0] in output.translate(_SEPARATORS).split()) if references else 0.0


def _name(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    words = [word.upper() for word in output.translate(_SEPARATORS).split()]
    return float(references[0] in words) if references else 0.0


def _first_digits(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    found = re.search(r"[0-9]+", output)
    return float(found is not None and bool(references) and found.group() == references[0])


def _first_number(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    found = re.search(r"\d+\.\d+|\d+", output)
    return float(found is not None and bool(references) and float(found.group()) == float(references[0]))


def _last_number(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    words = re.sub(r"[\n.`'\":]", " ", output).split()
    return float(bool(words) and bool(references) and words[-1] == references[0])


def _number_sequence(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    numbers = [int(found) for found in re.findall(r"[0-9]+", output)]
    right = 0
    for wanted, found in zip(references, numbers, strict=False):
        if int(float(wanted)) != found:
            break
        right += 1
    return right / len(references) if references else 0.0


# -- multiple choice ------------------------------------------------------------------------------------------


def _choice(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """Score a letter, an option's text, or what follows "answer is"; ``references`` are both of these."""
    text = output.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in references)
    if text in references:
        return 1.0
    text = re.sub(r" {2,}", " ", re.sub(r"[\n\"'.,?!{}]", " ", text))
    for lead in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = text.partition(lead)
        if found:
            return float(any(rest[1:].startswith(one) for one in references))
    letter = next((word for word in text.split() if word in "ABCD"), None)
    return float(letter in references)


def _choice_of_code(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """Score a letter before a period or colon, or what follows "answer is:"; ``references`` are name and letter."""
    letter = references[-1]
    if output[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = re.sub(r"Option|option|[\n`'\"*-]", " ", output.strip())
    text = re.sub(r" {2,}", " ", text)
    for lead in ("answer is:", "is:", "answer:"):
        _, found, rest = text.partition(lead)
        if found:
            return float(any(rest[1:].startswith(one) for one in references))
    return 0.0


def _stated_choice(output: str, references: Sequence[str], classes: Sequence[str]) -> float:
    text = output.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(
        r"The correct answer is ([A-D])", text
    )
    return float(found is not None and found.group(1) in references)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("qa_f1", _qa_f1, "LongBench"),
        Metric("qa_f1_zh", _qa_f1_zh, "LongBench", ("jieba",)),
        Metric("character_f1_zh", _character_f1_zh, "InfiniteBench"),
        Metric("rouge_l", _rouge_l, "LongBench", ("rouge",)),
        Metric("rouge_l_zh", _rouge_l_zh, "LongBench", ("rouge", "jieba")),
        Metric("rouge_l_sum", _rouge_l_sum, "InfiniteBench", ("rouge_score",)),
        Metric("classification", _classification, "LongBench"),
        Metric("count", _count, "LongBench"),
        Metric("retrieval", _make_retrieval("Paragraph "), "LongBench"),
        Metric("retrieval_zh", _make_retrieval("\u6bb5\u843d"), "LongBench"),
        Metric("code_similarity", _code_similarity, "LongBench"),
        Metric("string_match_all", _string_match_all, "RULER"),
        Metric("string_match_part", _string_match_part, "RULER"),
        Metric("contains", _contains, "SCBench"),
        Metric("word", _word, "InfiniteBench"),
        Metric("name", _name, "InfiniteBench"),
        Metric("first_digits", _first_digits, "InfiniteBench"),
        Metric("first_number", _first_number, "InfiniteBench"),
        Metric("last_number", _last_number, "InfiniteBench"),
        Metric("number_sequence", _number_sequence, "InfiniteBench"),
        Metric("choice", _choice, "InfiniteBench"),
        Metric("choice_of_code", _choice_of_code, "InfiniteBench"),
        Metric("stated_choice", _stated_choice, "LongBench v2"),
    )
}
