"""Benchmark files in `rankkv eval`: what is in them, what is done to them, and what the scores say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, FloorError

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.benchmarks import Benchmark, BenchmarkSamples
    from ..evaluation.comparison import Comparison

#: Fewer contexts than this give intervals that are too narrow.
FEW_CONTEXTS = 20
Unit = tuple[str, Callable[[], Iterable[dict[str, Any]]]]


def read_data(
    paths: Sequence[Path], limit: int | None, task: str | None, max_new_tokens: int | None
) -> list[Benchmark]:
    """Read benchmark files, before any model is loaded.

    Raises
    ------
    ConfigError
        If two files give the same task.
    RankKVError
        As :func:`~rankkv.evaluation.benchmarks.load_benchmark`.
    """
    from ..evaluation.benchmarks import load_benchmark

    found = [load_benchmark(path, limit=limit, task=task, max_new_tokens=max_new_tokens) for path in paths]
    names = list(itertools.chain.from_iterable(benchmark.tasks for benchmark in found))
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise ConfigError(
            f"two of --data hold the task {doubled!r}: put them into one folder, or run them in turn."
        )
    return found


def print_data(console: Console, benchmarks: Sequence[Benchmark], question: str) -> None:
    """Print the shape and the tasks of each file, and where the question stands."""
    for benchmark in benchmarks:
        for file, shape in benchmark.shapes.items():
            _say(console, f"{Path(file).name}: recognised as {shape}")
        for name, items in benchmark.tasks.items():
            asked = sum(len(item.questions) for item in items)
            metrics = {one.metric: one.max_new_tokens for item in items for one in item.questions}
            listed = ", ".join(f"{metric} of at most {most} new tokens" for metric, most in metrics.items())
            questions = "" if asked in (0, len(items)) else f", {asked} questions"
            _say(
                console, f"  {name}: {len(items)} contexts{questions}; {listed or 'loss of the last tokens'}"
            )
    where = (
        "after the compression: the context is compressed alone, then the question is asked"
        if question == "after"
        else "before the compression: context and question are compressed together"
    )
    _say(console, f"Question {where} (--question {question}).")


def plan_data(
    console: Console,
    model: Any,
    tokenizer: Any,
    benchmarks: Sequence[Benchmark],
    settings: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
) -> Iterator[tuple[str, list[Unit]]]:
    """Yield the name of each task, and its samples as units of work; print what was cut."""
    from ..evaluation.benchmarks import make_benchmark_samples
    from ..models.checkpoints import get_context_length

    for benchmark in benchmarks:
        for name, items in benchmark.tasks.items():
            made = make_benchmark_samples(
                items, tokenizer, context_length=get_context_length(model), **options
            )
            _print_cuts(console, name, made, options["max_length"] or get_context_length(model))
            yield (
                name,
                [
                    (f"{_slug(name)}-{sample.name}", partial(_evaluate, model, tokenizer, sample, settings))
                    for sample in made.samples
                ],
            )


def _evaluate(model: Any, tokenizer: Any, sample: Any, settings: Any) -> Iterator[dict[str, Any]]:
    from ..evaluation import evaluate_task

    return evaluate_task(model, tokenizer, [sample], settings)


def _print_cuts(console: Console, name: str, made: BenchmarkSamples, most: int | None) -> None:
    lengths = [len(sample.context_ids) for sample in made.samples]
    chat = "with" if made.chat.get(name) else "without"
    _say(
        console,
        f"{name}: {len(lengths)} prompts of {min(lengths):,} to {max(lengths):,} tokens before the compression, {chat} "
        "the chat template.",
    )
    if made.cut_contexts:
        _say(
            console,
            f"Warning: {name}: {made.cut_contexts} of {len(lengths)} prompts are too long for {most:,} tokens. They "
            f"lose their middle, {made.cut_tokens:,} tokens in all.",
        )
    if made.too_short:
        _say(console, f"Warning: {name}: {made.too_short} texts are too short and left out.")


def list_floor_notes(rows: Sequence[dict[str, Any]], seed: int) -> list[str]:
    """Return a sentence if the full cache is no better than the question without its context."""
    from ..evaluation.comparison import check_floor

    try:
        check_floor(rows, seed=seed)
    except FloorError as error:
        return [str(error)]
    return []


def list_verdicts(comparisons: Sequence[Comparison], blind: Collection[str] = ()) -> Iterator[str]:
    """Yield a sentence for each compressed setting but uniform ones: its score, the full cache's, the difference.

    ``blind`` names tasks on which the full cache is no better than guessing: they say nothing.
    """
    for task, group in itertools.groupby(comparisons, key=lambda one: one.task):
        settings = list(group)
        full = next((one for one in settings if one.setting == "full"), None)
        for one in settings:
            if full is None or one.to_full is None or one.setting == "blank" or "|uniform|" in one.setting:
                continue
            if task in blind:
                continue
            yield (
                f"{task}, {one.setting}: {one.score.mean:.3f} with {_share(one.bytes_share)} of the bytes, "
                f"{full.score.mean:.3f} with all of it. {judge(one)}"
            )


def judge(comparison: Comparison) -> str:
    """Return a sentence that says whether a setting differs from the full cache."""
    difference = comparison.to_full
    if difference is None:
        return ""
    if difference.low <= 0.0 <= difference.high:
        return f"No difference shown: {difference:+}."
    worse = (difference.mean < 0.0) == comparison.higher_is_better
    return f"The compressed cache is {'worse' if worse else 'better'}: {difference:+}."


def _share(share: float | None) -> str:
    return "a part" if share is None else f"{share:.1%}"


def list_few_contexts(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield a warning for each task with few contexts."""
    counts = {one.task: one.score.samples for one in comparisons}
    for task, count in counts.items():
        if count < FEW_CONTEXTS:
            yield (
                f"{task} has {count} contexts. With fewer than {FEW_CONTEXTS} the intervals are too narrow to trust: "
                "give a greater --limit or --samples."
            )


def _slug(name: str) -> str:
    """Return a task's name as a part of a file name."""
    return "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in name).lstrip(".") or "task"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
