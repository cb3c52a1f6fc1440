"""Task runner: one prefill per sample for all settings, and one row per sample and setting."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.report import compute_metadata_bytes, count_slots
from ..errors import ConfigError
from ..models.compat import cache_argument
from ..models.placement import find_input_device
from .perplexity import predict_tokens
from .prefill_record import PrefillRecord, record_prefill
from .quantized import build_setting, copy_cache, count_quantized_bytes
from .tasks import Prompt, Sample

#: Settings that every task runs: the full cache, and the full cache of a context without the answers (the guess rate).
FULL, BLANK = "full", "blank"

#: Tokens of a greedy output beyond the length of the right answer.
EXTRA_TOKENS = 8


@dataclass(frozen=True)
class _Outcome:
    """Hold the result of one question after one cache; ``predicted`` are log-probabilities, ``[token, vocabulary]``."""

    score: float
    loss: float
    output: str
    predicted: Tensor


def evaluate_task(
    model: Any,
    tokenizer: Any,
    samples: Iterable[Sample],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    blank: bool = True,
) -> Iterator[dict[str, Any]]:
    """Score samples with the full cache and every setting.

    Each sample takes one prefill, and a second one for its blank context.

    Parameters
    ----------
    model, tokenizer
        A causal language model and its tokenizer.
    samples : iterable of Sample
        From :func:`~rankkv.evaluation.tasks.make_samples`.
    settings : mapping
        Maps each setting's name to its options of :class:`~rankkv.RankKVCache`, or those of
        :func:`~rankkv.evaluation.quantized.add_quantized_settings`.
    blank : bool, default True
        If True, also measure the guess rate.

    Yields
    ------
    dict
        The rows of :func:`evaluate_sample`, then the row of the blank context, for each sample.

    Raises
    ------
    ConfigError
        If a setting's name is "full" or "blank".
    RankKVError
        As :class:`~rankkv.RankKVCache`.
    """
    for sample in samples:
        record = record_prefill(model, torch.tensor(sample.context_ids)[None], tokenizer=tokenizer)
        yield from evaluate_sample(record, tokenizer, sample, settings)
        # Free the record before the next prefill: two of them may not fit into memory.
        del record
        if blank and sample.blank_ids is not None:
            yield evaluate_blank(model, tokenizer, sample)


def evaluate_sample(
    record: PrefillRecord, tokenizer: Any, sample: Sample, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Score one sample with the full cache, then with each setting, from one recorded prefill.

    Parameters
    ----------
    record : PrefillRecord
        Prefill of ``sample.context_ids``.
    tokenizer
        Tokenizer of the model.
    sample : Sample
        Each of its questions gets a copy of the cache.
    settings : mapping
        Maps each setting's name to its options of :class:`~rankkv.RankKVCache`.

    Yields
    ------
    dict
        One row per setting, ``"full"`` first, with the same columns for every task:

        - ``task``, ``sample``, ``index``, ``seed``, ``length`` (tokens), ``depth``, ``question_aware``,
          ``questions``, ``setting``, ``metric``, ``higher_is_better``;
        - ``chance``: score of a random choice, or null; ``cut_tokens``: tokens that the context lost;
        - ``score``: the task's metric, mean over questions;
        - ``answer_loss``: mean negative log-likelihood of the right answer, nats per token;
        - ``divergence``: mean Kullback-Leibler divergence from the full cache's predictions over the right answer,
          nats per token; null for a blank context;
        - ``kept_tokens`` and ``full_tokens``: tokens of the context, summed over layers;
        - ``cache_bytes`` and ``full_cache_bytes``: bytes of the context's keys and values; ``metadata_bytes``: bytes of
          positions, masks and scores beside them;
        - ``output`` and ``expected``: text.

    Raises
    ------
    ConfigError
        If a setting's name is "full" or "blank".
    """
    taken = {FULL, BLANK} & set(settings)
    if taken:
        raise ConfigError(
            f"the setting name {sorted(taken)[0]!r} is reserved for the reference of every task: rename the setting."
        )
    whole = _measure_size(record.build_full_cache())
    full = [_ask(record, tokenizer, prompt, record.build_full_cache()) for prompt in sample.prompts]
    yield _make_row(sample, FULL, full, full, whole, whole)
    for name, options in settings.items():
        cache = build_setting(record, options)
        size = _measure_size(cache)
        # The last question may use up the cache itself.
        outcomes = [
            _ask(record, tokenizer, prompt, copy_cache(cache) if number + 1 < len(sample.prompts) else cache)
            for number, prompt in enumerate(sample.prompts)
        ]
        yield _make_row(sample, name, outcomes, full, size, whole)


def evaluate_blank(model: Any, tokenizer: Any, sample: Sample) -> dict[str, Any]:
    """Score a sample's questions after the full cache of its blank context: the guess rate.

    Raises
    ------
    ConfigError
        If the sample has no blank context.
    """
    if sample.blank_ids is None:
        raise ConfigError(
            f"sample {sample.name} of {sample.task.name!r} has no blank context, so it has no guess rate: leave "
            "evaluate_blank out."
        )
    record = record_prefill(model, torch.tensor(sample.blank_ids)[None])
    outcomes = [_ask(record, tokenizer, prompt, record.build_full_cache()) for prompt in sample.prompts]
    whole = _measure_size(record.build_full_cache())
    return _make_row(sample, BLANK, outcomes, None, whole, whole)


def _measure_size(cache: Any) -> tuple[int, int, int]:
    """Return a cache's tokens, summed over layers, its bytes, and the bytes beside keys and values."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    quantized = count_quantized_bytes(cache)
    if quantized is not None:
        return sum(layer.get_seq_length() for layer in cache.layers), quantized, 0
    if hasattr(cache, "kept_lengths"):
        return sum(cache.kept_lengths), cache.kept_bytes(), compute_metadata_bytes(cache)
    return (
        sum(count_slots(layer) for layer in layers),
        sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
        0,
    )


def _make_row(
    sample: Sample,
    setting: str,
    outcomes: Sequence[_Outcome],
    full: Sequence[_Outcome] | None,
    size: tuple[int, int, int],
    whole: tuple[int, int, int],
) -> dict[str, Any]:
    task, many = sample.task, len(outcomes)
    divergence = None
    if full is not None:
        divergence = sum(_compute_divergence(a, b) for a, b in zip(full, outcomes, strict=True)) / many
    return {
        "task": task.name,
        "sample": sample.name,
        "index": sample.index,
        "seed": sample.seed,
        "length": sample.length,
        "depth": sample.depth,
        "question_aware": sample.question_aware,
        "questions": many,
        "setting": setting,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "chance": sample.chance,
        "cut_tokens": sample.cut_tokens,
        "score": sum(one.loss if task.metric == "loss" else one.score for one in outcomes) / many,
        "answer_loss": sum(one.loss for one in outcomes) / many,
        "divergence": divergence,
        "kept_tokens": size[0],
        "full_tokens": whole[0],
        "cache_bytes": size[1],
        "full_cache_bytes": whole[1],
        "metadata_bytes": size[2],
        "output": "\n".join(one.output for one in outcomes),
        "expected": "\n".join(", ".join(prompt.answers) for prompt in sample.prompts),
    }


def _compute_divergence(full: _Outcome, other: _Outcome) -> float:
    if full is other:
        return 0.0
    return float((full.predicted.exp() * (full.predicted - other.predicted)).sum(-1).mean())


def _ask(record: PrefillRecord, tokenizer: Any, prompt: Prompt, cache: Any) -> _Outcome:
    """Measure the likelihood of the right answer, and decode greedily if greedy decoding gives another one."""
    model = record.model
    follow = torch.tensor(prompt.question_ids + prompt.answer_ids, device=find_input_device(model))[None]
    # Without a question the prefill predicts the first token of the answer. It is not scored: no cache is read for it.
    first = max(len(prompt.question_ids), 1)
    spare = copy.deepcopy(cache) if prompt.answers else None
    predicted, wanted = predict_tokens(model, cache, follow)[first - 1 : -1], follow[0, first:]
    loss = float(-predicted.gather(-1, wanted[:, None]).mean())
    if spare is None:
        return _Outcome(0.0, loss, "", predicted)
    if prompt.scorer is not None:
        output = tokenizer.decode(_decode(record, tokenizer, prompt, spare), skip_special_tokens=True)
        return _Outcome(prompt.scorer(output), loss, output, predicted)
    # If the right answer is the likeliest token at every step, greedy decoding gives it: no need to decode.
    said_right = bool((predicted.argmax(dim=-1) == wanted).all())
    if said_right and first == 1 and not prompt.question_ids:
        said_right = int(record.last_logits[0].argmax()) == prompt.answer_ids[0]
    ids = list(prompt.answer_ids) if said_right else _decode(record, tokenizer, prompt, spare)
    output = tokenizer.decode(ids, skip_special_tokens=True)
    return _Outcome(compute_recall(output, prompt.answers), loss, output, predicted)


def _decode(record: PrefillRecord, tokenizer: Any, prompt: Prompt, cache: Any) -> list[int]:
    """Return the ids that ``generate()`` gives greedily after context and question."""
    model, budget = record.model, prompt.max_new_tokens or len(prompt.answer_ids) + EXTRA_TOKENS
    asked = torch.tensor(prompt.question_ids, dtype=torch.long, device=find_input_device(model))[None]
    given = torch.cat([record.input_ids, asked], dim=1)
    said: list[int] = []
    if asked.shape[1] == 0:
        # The prefill predicts the first token. Append it, because generate() needs a token that is not in the cache.
        first = record.last_logits.argmax(dim=-1)
        said = [int(first)]
        given = torch.cat([given, first[None].to(given.device)], dim=1)
        budget -= 1
    end = model.generation_config.eos_token_id
    if said and said[0] in (end if isinstance(end, list) else [end]):
        return said
    output = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=budget,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **cache_argument(cache),
    )
    return said + output[0, given.shape[1] :].tolist()


def compute_recall(output: str, answers: Sequence[str]) -> float:
    """Compute the share of the answers that an output contains as whole words, ignoring case.

    As RULER's ``string_match_all``, except that a number inside a longer number does not count.

    Examples
    --------
    >>> compute_recall("The codes are 123 and 4567.", ["123", "456"])
    0.5
    """
    found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", output, re.IGNORECASE) for answer in answers]
    return sum(match is not None for match in found) / len(answers)
