"""`rankkv eval`: scores of compressed caches on tasks, as paired differences with intervals."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import AUTO_SELECTOR, RankKVConfig, check_compression_ratio, check_max_loss, check_predicted
from ..errors import ConfigError, InputError, UnknownNameError
from ..utils.hub import require
from ..utils.processes import find_own_device, gather, is_main_process, split_samples
from .checks import check_method, check_model
from .common import check_at_least_one, collect_versions, parse_options, print_json, reports_errors
from .display import format_seconds, make_console, show_step
from .evaluate_data import (
    list_few_contexts,
    list_floor_notes,
    list_verdicts,
    plan_data,
    print_data,
    read_data,
)
from .known import list_names, load_known
from .options import DeviceMap, DtypeName, ModelName

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.comparison import Comparison

#: Tasks that run if neither --tasks nor --data is given.
DEFAULT_TASKS = "perplexity,needle"
# Columns of a terminal that takes all digits.
WIDE = 132
#: Name of a unit of work, and a function that yields its rows.
Unit = tuple[str, Callable[[], Iterable[dict[str, Any]]]]


@reports_errors
def evaluate(
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Built-in tasks (see --list) or lm-evaluation-harness tasks, comma-separated.",
            show_default="perplexity,needle, or none with --data",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Benchmark file as published (LongBench, RULER, InfiniteBench, SCBench, ...) or a folder; may be "
            "repeated."
        ),
    ] = None,
    model: ModelName = "embedded",
    text: Annotated[
        str, typer.Option(help="Source of the contexts: python-docs, wikitext, or a file or folder of texts.")
    ] = "python-docs",
    ratios: Annotated[
        str, typer.Option(help="Fractions of the KV cache kept, in (0, 1], comma-separated.")
    ] = "0.1,0.2",
    max_losses: Annotated[
        str | None,
        typer.Option(
            help="Losses to stay below, in nats per token, comma-separated: the smallest such cache of each selector.",
            show_default="none",
        ),
    ] = None,
    selectors: Annotated[
        str | None,
        typer.Option(
            help="Token selection methods, comma-separated; auto is what compress() takes.",
            show_default="auto; snapkv with --question before",
        ),
    ] = None,
    strategies: Annotated[
        str,
        typer.Option(help="Budget strategies, auto or default, comma-separated; uniform is always added."),
    ] = "auto",
    quantized: Annotated[
        str | None,
        typer.Option(
            help="Quantized caches beside the others: int4, int8 (all tokens), evict+int8 (equal bytes)."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a context, comma-separated.")] = "1024",
    samples: Annotated[
        int, typer.Option(help="Samples per length; documents per task of lm-evaluation-harness.")
    ] = 20,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    question: Annotated[
        str,
        typer.Option(
            help="Ask the question after the compression of the context, or compress both (before)."
        ),
    ] = "after",
    question_aware: Annotated[
        bool, typer.Option("--question-aware", help="The same as --question before.")
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Use the chat template.",
            show_default="no in built-in tasks; with --data as the benchmark does",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Contexts of each task of --data.", show_default="all")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of an output for --data.", show_default="the benchmark's"),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt of --data; a longer one loses its middle.",
            show_default="the model's context length",
        ),
    ] = None,
    data_task: Annotated[
        str | None,
        typer.Option(
            help="Task of --data, for a file whose name does not say it.", show_default="the file's name"
        ),
    ] = None,
    task_option: Annotated[
        list[str] | None,
        typer.Option(help="Option of built-in tasks that have it, name=value; may be repeated."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of lm-evaluation-harness tasks.")
    ] = None,
    floor: Annotated[bool, typer.Option(help="Stop if the full cache is no better than guessing.")] = True,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for rows.parquet; repeat the command to resume."),
    ] = None,
    dtype: DtypeName = None,
    device_map: DeviceMap = None,
    list_tasks: Annotated[
        bool, typer.Option("--list", help="List built-in tasks and their options.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the comparisons as JSON to stdout.")] = False,
) -> None:
    """Score tasks with the full and compressed caches; table on stderr. Also under accelerate launch or torchrun."""
    console = make_console()
    main = is_main_process()
    console.quiet = not main
    if list_tasks:
        from rich.console import Console

        Console(highlight=False).print(_make_task_table())
        return
    check_at_least_one("--samples", samples)
    for flag, value in (
        ("--limit", limit),
        ("--max-new-tokens", max_new_tokens),
        ("--max-length", max_length),
    ):
        check_at_least_one(flag, value)
    if question not in ("after", "before"):
        raise ConfigError(f"--question is {question!r} but must be 'after' or 'before'.")
    question = "before" if question_aware else question
    if selectors is None:
        selectors = AUTO_SELECTOR if question == "after" else "snapkv"
    methods = _split(selectors, "--selectors")
    given = parse_options(task_option, "--task-option")
    names = [] if tasks is None and data else _split(tasks or DEFAULT_TASKS, "--tasks")
    numbers = [_number(item, float, "--ratios") for item in _split(ratios, "--ratios")]
    counts = [_number(item, int, "--lengths") for item in _split(lengths, "--lengths")]
    # Check names and numbers before the slow imports.
    for number in numbers:
        check_compression_ratio(number)
    losses = (
        [_number(item, float, "--max-losses") for item in _split(max_losses, "--max-losses")]
        if max_losses
        else []
    )
    for number in losses:
        check_max_loss(number)
        for name in methods:
            check_predicted(number, name)
    for name in methods:
        if name != AUTO_SELECTOR:
            check_method("selectors", name, {}, "--selectors")
    for name in _split(strategies, "--strategies"):
        if name not in list_names("presets"):
            check_method("strategies", name, {}, "--strategies")
    check_model(model, dtype, device_map)
    benchmarks = read_data(data or [], limit, data_task, max_new_tokens)
    if benchmarks:
        print_data(console, benchmarks, question)
    with show_step(console, f"Loading {model}"):
        from ..evaluation.comparison import check_floor, compare_settings, find_identical
        from ..evaluation.quantized import add_quantized_settings
        from ..evaluation.results import ResultStore
        from ..evaluation.settings import build_settings
        from ..evaluation.tasks import TASKS
        from ..models.loading import load_model

        settings, uniform_of = build_settings(
            numbers,
            methods,
            _split(strategies, "--strategies"),
            losses,
        )
        if quantized is not None:
            settings, uniform_of = add_quantized_settings(
                settings, uniform_of, _split(quantized, "--quantized")
            )
        built_in = [name for name in names if name in TASKS]
        harness = [name for name in names if name not in TASKS]
        task_options = _assign_options(built_in, given)
        manager = find_harness(harness, include_path, counts)
        config = {
            "model": model,
            "dtype": dtype,
            "tasks": names,
            "text": text,
            "lengths": counts,
            "samples": samples,
            "seed": seed,
            "question_aware": question == "before",
            "chat": bool(chat),
            "task_options": given,
            "settings": settings,
        }
        if benchmarks:
            config["data"] = {
                "digests": [benchmark.digest for benchmark in benchmarks],
                "max_length": max_length,
                "chat": chat,
            }
        store = None if output is None else ResultStore(output, config)
        language_model, tokenizer = load_model(model, dtype, device_map or find_own_device())
    if AUTO_SELECTOR in methods:
        settings = choose_selector(console, settings, language_model)

    sampling = {
        "lengths": counts,
        "count": samples,
        "seed": seed,
        "question_aware": question == "before",
        "chat": bool(chat),
    }
    reading = {
        "question": question,
        "chat": chat,
        "max_length": max_length,
        "text_length": counts[0],
        "seed": seed,
    }
    of_data = {name for benchmark in benchmarks for name in benchmark.tasks}
    notes: list[str] = []
    blind: set[str] = set()
    rows: list[dict[str, Any]] = []
    for name, units in itertools.chain(
        plan_built_in(language_model, tokenizer, text, built_in, settings, task_options, sampling),
        plan_harness(language_model, tokenizer, harness, settings, manager, sampling),
        plan_data(console, language_model, tokenizer, benchmarks, settings, reading),
    ):
        found = run_units(console, name, units, store)
        if name in of_data:
            # The rows of a long run are worth reading in any case.
            floor_notes = list_floor_notes(found, seed) if floor else []
            notes += floor_notes
            blind |= {name} if floor_notes else set()
        elif floor:
            check_floor(found, seed=seed)
        rows += found
    if not main:
        return
    if store is not None:
        store.join(store.folder / "rows.parquet")
    comparisons = compare_settings(rows, uniform_of, seed=seed)
    if not console.is_terminal:
        # A log has no width limit.
        console.width = WIDE
    for table in make_comparison_tables(comparisons, digits=3 if console.width >= WIDE else 2):
        console.print(table, "")
    summary = make_summary_table(comparisons)
    if summary is not None:
        console.print(summary, "")
    for verdict in list_verdicts(comparisons, blind):
        console.print(verdict, markup=False, soft_wrap=True)
    for task, one, other in find_identical(rows, settings, warn=False):
        notes.append(
            f"{task}: {one} and {other} gave the same output and likelihood on every sample. Make the context longer "
            "than every layer's budget."
        )
    for note in [*notes, *list_few_contexts(comparisons)]:
        console.print(f"Warning: {note}", markup=False, soft_wrap=True)
    if store is not None:
        console.print(
            f"Rows: {store.folder / 'rows.parquet'}. A page with figures: rankkv report {store.folder}",
            markup=False,
            soft_wrap=True,
        )
    if json:
        print_json(
            {
                "config": config,
                "comparisons": [comparison.to_dict() for comparison in comparisons],
                "versions": collect_versions(),
            }
        )


def _split(given: str, flag: str) -> list[str]:
    """Split a comma-separated list and drop repeated items."""
    items = list(dict.fromkeys(item.strip() for item in given.split(",") if item.strip()))
    if not items:
        raise ConfigError(f"{flag} {given!r} is an empty list: give at least one item.")
    return items


def _number(text: str, kind: Callable[[str], Any], flag: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} must be a number.") from None


def choose_selector(
    console: Console, settings: Mapping[str, Mapping[str, Any]], model: Any
) -> dict[str, dict[str, Any]]:
    """Return the settings with the selector that compress() takes in place of "auto", and print its name.

    In all of them, because uniform budgets are compared with others of the same selector.
    """
    from ..cache.resolve import choose_for_questions

    chosen, remarks = choose_for_questions(RankKVConfig(), model)
    name = chosen.selector if chosen.selector != AUTO_SELECTOR else "snapkv"
    console.print(
        "; ".join([f"Selector auto: {name}, as compress() takes it", *remarks]) + ".",
        markup=False,
        soft_wrap=True,
    )
    return {
        setting: {**options, "selector": name} if options.get("selector") == AUTO_SELECTOR else dict(options)
        for setting, options in settings.items()
    }


def _assign_options(tasks: Sequence[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each task the given options that it has; raise if no task has one."""
    from ..evaluation.tasks import TASKS, list_options

    known = {name: list_options(TASKS[name]) for name in tasks}
    for option in given:
        if not any(option in options for options in known.values()):
            listed = "; ".join(f"{name}: {', '.join(options) or 'none'}" for name, options in known.items())
            raise ConfigError(f"no task has the option {option!r}; the options are {listed}.")
    return {name: {k: v for k, v in given.items() if k in options} for name, options in known.items()}


def find_harness(names: Sequence[str], include_path: Path | None, lengths: Sequence[int] = ()) -> Any:
    """Return the harness' task manager for tasks that are not built in; None if there are none.

    Raises
    ------
    UnknownNameError
        If the harness is not installed, or does not know a name either.
    InputError
        If ``include_path`` is not a folder.
    """
    if not names:
        return None
    from ..evaluation.tasks import TASKS

    try:
        require("lm_eval", 'pip install "rankkv[lm-eval]"', "lm-evaluation-harness")
    except ImportError as error:
        raise UnknownNameError(
            f"{UnknownNameError.of('task', names[0], TASKS)} For tasks of lm-evaluation-harness: {error}"
        ) from None
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path {str(include_path)!r} is not a folder.")
    from ..evaluation.lm_eval.rows import build_task_manager, check_task_packages

    check_task_packages(names)
    manager = build_task_manager(names, None if include_path is None else str(include_path), lengths)
    for name in names:
        if not manager.match_tasks([name]):
            raise UnknownNameError(
                f"{UnknownNameError.of('task', name, TASKS)} lm-evaluation-harness has no such task either."
            )
    return manager


def plan_built_in(
    model: Any,
    tokenizer: Any,
    text: str,
    names: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    task_options: Mapping[str, Mapping[str, Any]],
    sampling: Mapping[str, Any],
) -> Iterator[tuple[str, list[Unit]]]:
    """Yield the name of each built-in task, and its samples as units of work."""
    if not names:
        return
    from ..evaluation import Haystack, get_task, make_samples
    from ..models.texts import load_texts

    haystack = Haystack(tokenizer, "\n\n".join(load_texts(text)))
    for name in names:
        samples = make_samples(get_task(name), tokenizer, haystack, **sampling, **task_options[name])
        units: list[Unit] = [
            (f"{name}-{sample.name}", partial(_evaluate_sample, model, tokenizer, sample, settings))
            for sample in samples
        ]
        yield name, units


def _evaluate_sample(model: Any, tokenizer: Any, sample: Any, settings: Any) -> Iterator[dict[str, Any]]:
    from ..evaluation import evaluate_task

    return evaluate_task(model, tokenizer, [sample], settings)


def plan_harness(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    manager: Any,
    sampling: Mapping[str, Any],
) -> Iterator[tuple[str, list[Unit]]]:
    """Yield the name of each task of the harness, and the whole task as one unit of work."""
    for name in names:
        run = partial(_evaluate_harness, model, tokenizer, name, settings, manager, sampling)
        units: list[Unit] = [(name, run)]
        yield name, units


def _evaluate_harness(
    model: Any, tokenizer: Any, name: str, settings: Any, manager: Any, sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    from ..evaluation.lm_eval.rows import evaluate_harness_task, shorten_harness_errors

    # The harness prints to stdout, which is for results.
    with redirect_stdout(sys.stderr), shorten_harness_errors(f"task {name}"):
        return list(
            evaluate_harness_task(
                model,
                tokenizer,
                name,
                settings,
                manager,
                count=sampling["count"],
                seed=sampling["seed"],
                question_aware=sampling["question_aware"],
            )
        )


def run_units(console: Console, name: str, units: Sequence[Unit], store: Any) -> list[dict[str, Any]]:
    """Run the units that the store does not hold yet, and return the rows of all units in order.

    Each launched process runs its share of the units and gets the rows of all.
    """
    own = split_samples(units)
    rows: list[list[dict[str, Any]]] = []
    started, measured = time.perf_counter(), 0
    with show_step(console, f"{name}, {len(units)} samples" if len(units) > 1 else name) as step:
        for done, (unit, run) in enumerate(own):
            left = ""
            if measured:
                seconds = (time.perf_counter() - started) / measured * (len(own) - done)
                left = f", about {format_seconds(seconds)} left"
            step.advance(done, len(own), f"sample {done + 1}/{len(own)}{left}")
            if store is not None and store.is_done(unit):
                rows.append(store.read_unit(unit))
                continue
            found = []
            for row in run():
                found.append(row)
                step.advance(done, len(own), f"sample {done + 1}/{len(own)}, cache {len(found)}{left}")
            measured += 1
            if store is not None:
                store.write(unit, found)
                found = store.read_unit(unit)
            rows.append(found)
        return list(itertools.chain.from_iterable(gather(rows)))


def make_comparison_tables(comparisons: Sequence[Comparison], digits: int = 3) -> Iterator[Table]:
    """Yield a table per task with a line per setting: tokens and bytes kept, score, paired differences, answer loss."""
    from rich.table import Table

    for _, group in itertools.groupby(comparisons, key=lambda one: one.task):
        settings = list(group)
        first = settings[0]
        better = "higher" if first.higher_is_better else "lower"
        chance = "" if first.chance is None else f"; a random choice scores {first.chance:.3f}"
        table = Table(
            title=f"{first.task}: {first.metric}, {better} is better; {first.score.samples} contexts{chance}",
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        loss = "answer loss" if digits > 2 else "loss"
        for name in ("cache", "kept", "bytes", "score", "minus full", "minus uniform", loss):
            table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
        for one in settings:
            guess = one.setting == "blank"
            table.add_row(
                "guess rate" if guess else one.setting,
                "" if one.kept_share is None or guess else f"{one.kept_share:.1%}",
                "" if one.bytes_share is None or guess else f"{one.bytes_share:.1%}",
                one.score.show(digits),
                "" if one.to_full is None or guess else one.to_full.show(digits, "+"),
                "" if one.to_uniform is None else one.to_uniform.show(digits, "+"),
                "" if one.answer_loss is None else f"{one.answer_loss:.{digits}f}",
            )
        yield table


def make_summary_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Return a table over tasks with a line per setting: mean and worst task; None for a single task."""
    from rich.table import Table

    from ..evaluation.comparison import summarize_tasks

    found = summarize_tasks(comparisons)
    if not found:
        return None
    table = Table(
        title=f"{found[0].tasks} tasks: scores of which higher is better",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for name in ("cache", "mean", "mean minus full", "worst task minus full", "worst task"):
        table.add_column(name, justify="left" if name in ("cache", "worst task") else "right", no_wrap=True)
    for one in found:
        table.add_row(
            one.setting,
            f"{one.mean:.3f}",
            "" if one.mean_to_full is None else f"{one.mean_to_full:+.3f}",
            "" if one.worst_to_full is None else f"{one.worst_to_full:+.3f}",
            one.worst_task or "",
        )
    return table


def _make_task_table() -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("task", "metric", "options", "source"):
        table.add_column(name)
    for task in load_known()["tasks"]:
        options = ", ".join(f"{name}={value}" for name, value in task["options"].items())
        table.add_row(task["name"], task["metric"], options, task["source"])
    return table
