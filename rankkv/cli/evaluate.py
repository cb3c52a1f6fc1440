"""`rankkv eval`: what compression costs on tasks, as paired differences with intervals."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import check_compression_ratio
from ..errors import ConfigError, InputError, UnknownNameError
from ..utils.hub import require
from ..utils.processes import find_own_device, gather, is_main_process, split_samples
from .checks import check_method, check_model
from .common import check_at_least_one, collect_versions, parse_options, print_json, reports_errors
from .display import make_console, show_step
from .known import list_names, load_known

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.comparison import Comparison

#: A name, and what gives its rows.
Unit = tuple[str, Callable[[], list[dict[str, Any]]]]


def find_harness(names: Sequence[str], include_path: Path | None) -> Any:
    """Return the harness' task manager, if it is needed and knows all names."""
    if not names:
        return None
    from ..evaluation.tasks import TASKS

    try:
        require("lm_eval", 'pip install "rankkv[lm-eval]"', "lm-evaluation-harness")
    except ImportError as error:
        raise UnknownNameError(
            f"{UnknownNameError.of('task', names[0], TASKS)} For others: {error}"
        ) from None
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path {str(include_path)!r} is not a folder.")
    from ..evaluation.lm_eval.rows import build_task_manager

    manager = build_task_manager(names, None if include_path is None else str(include_path))
    for name in names:
        if not manager.match_tasks([name]):
            raise UnknownNameError(
                f"{UnknownNameError.of('task', name, TASKS)} Nor has lm-evaluation-harness a task of that name."
            )
    return manager


def plan_own(
    model: Any,
    tokenizer: Any,
    text: str,
    names: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    task_options: Mapping[str, Mapping[str, Any]],
    sampling: Mapping[str, Any],
) -> Iterator[tuple[str, list[Unit]]]:
    """Yield each own task's name, and its samples as units of work."""
    if not names:
        return
    from ..evaluation import Haystack, get_task, make_samples
    from ..models.texts import load_texts

    haystack = Haystack(tokenizer, "\n\n".join(load_texts(text)))
    for name in names:
        samples = make_samples(get_task(name), tokenizer, haystack, **sampling, **task_options[name])
        units: list[Unit] = [
            (f"{name}-{sample.name}", partial(_evaluate_one, model, tokenizer, sample, settings))
            for sample in samples
        ]
        yield name, units


def _evaluate_one(model: Any, tokenizer: Any, sample: Any, settings: Any) -> list[dict[str, Any]]:
    from ..evaluation import evaluate_task

    return list(evaluate_task(model, tokenizer, [sample], settings))


def plan_harness(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    manager: Any,
    sampling: Mapping[str, Any],
) -> Iterator[tuple[str, list[Unit]]]:
    """Yield each task of the harness as one unit of work."""
    for name in names:
        run = partial(_evaluate_harness, model, tokenizer, name, settings, manager, sampling)
        units: list[Unit] = [(name, run)]
        yield name, units


def _evaluate_harness(
    model: Any, tokenizer: Any, name: str, settings: Any, manager: Any, sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    from ..evaluation.lm_eval.rows import evaluate_harness_task, shorten_harness_errors

    # What the harness prints would stand in the JSON.
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
    """Run the units that are not there yet, and return the rows of all, in their order.

    Each of several launched processes runs its share; all get the rows of all.
    """
    own = split_samples(units)
    rows: list[list[dict[str, Any]]] = []
    with show_step(console, f"{name}, {len(units)} samples" if len(units) > 1 else name) as step:
        for done, (unit, run) in enumerate(own):
            step.advance(done, len(own), f"sample {done + 1}/{len(own)}")
            if store is None:
                rows.append(run())
                continue
            if not store.is_done(unit):
                store.write(unit, run())
            rows.append(store.read_unit(unit))
        return list(itertools.chain.from_iterable(gather(rows)))


@reports_errors
def evaluate(
    tasks: Annotated[
        str, typer.Option(help="Own tasks (see --list), or tasks of lm-evaluation-harness; comma between.")
    ] = "perplexity,needle",
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file, or embedded.")] = "embedded",
    text: Annotated[
        str, typer.Option(help="What contexts are cut from: python-docs, wikitext, a .txt or .jsonl file.")
    ] = "python-docs",
    ratios: Annotated[str, typer.Option(help="Fractions of the cache kept; comma between.")] = "0.1,0.2",
    selectors: Annotated[str, typer.Option(help="Token selection methods; comma between.")] = "snapkv",
    strategies: Annotated[
        str,
        typer.Option(help="Budget strategies, auto or default; comma between. uniform is always added."),
    ] = "auto",
    lengths: Annotated[str, typer.Option(help="Tokens of a context; comma between.")] = "1024",
    samples: Annotated[
        int, typer.Option(help="Samples of each length; documents of each task of the harness.")
    ] = 20,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    question_aware: Annotated[
        bool, typer.Option("--question-aware", help="Compress the question with the context.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Own tasks in the tokenizer's chat template.")] = False,
    task_option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the own tasks that have it, name=value; may be repeated."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of tasks for lm-evaluation-harness.")
    ] = None,
    floor: Annotated[bool, typer.Option(help="Stop where the full cache is no better than guessing.")] = True,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for rows.parquet; a run that was stopped goes on there."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Weights' dtype, such as bfloat16.", show_default="the checkpoint's own"),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Where the model goes, such as auto or cuda; needs accelerate.")
    ] = None,
    list_tasks: Annotated[bool, typer.Option("--list", help="List the own tasks and their options.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the comparisons as JSON to stdout.")] = False,
) -> None:
    """Score tasks with the full cache and compressed ones; table to stderr. Also under accelerate launch, torchrun."""
    console = make_console()
    main = is_main_process()
    console.quiet = not main
    if list_tasks:
        from rich.console import Console

        Console(highlight=False).print(_make_task_table())
        return
    check_at_least_one("--samples", samples)
    given = parse_options(task_option, "--task-option")
    names = _split(tasks, "--tasks")
    numbers = [_number(item, float, "--ratios") for item in _split(ratios, "--ratios")]
    counts = [_number(item, int, "--lengths") for item in _split(lengths, "--lengths")]
    for number in numbers:
        check_compression_ratio(number)
    for name in _split(selectors, "--selectors"):
        check_method("selectors", name, {}, "--selectors")
    for name in _split(strategies, "--strategies"):
        if name not in list_names("presets"):
            check_method("strategies", name, {}, "--strategies")
    check_model(model, dtype, device_map)
    with show_step(console, f"Loading {model}"):
        from ..evaluation.comparison import check_floor, compare_settings, find_identical
        from ..evaluation.results import ResultStore
        from ..evaluation.settings import build_settings
        from ..evaluation.tasks import TASKS
        from ..models.loading import load_model

        settings, uniform_of = build_settings(
            numbers,
            _split(selectors, "--selectors"),
            _split(strategies, "--strategies"),
        )
        own = [name for name in names if name in TASKS]
        harness = [name for name in names if name not in TASKS]
        task_options = _share_options(own, given)
        manager = find_harness(harness, include_path)
        config = {
            "model": model,
            "dtype": dtype,
            "tasks": names,
            "text": text,
            "lengths": counts,
            "samples": samples,
            "seed": seed,
            "question_aware": question_aware,
            "chat": chat,
            "task_options": given,
            "settings": settings,
        }
        store = None if output is None else ResultStore(output, config)
        language_model, tokenizer = load_model(model, dtype, device_map or find_own_device())

    sampling = {
        "lengths": counts,
        "count": samples,
        "seed": seed,
        "question_aware": question_aware,
        "chat": chat,
    }
    rows: list[dict[str, Any]] = []
    for name, units in itertools.chain(
        plan_own(language_model, tokenizer, text, own, settings, task_options, sampling),
        plan_harness(language_model, tokenizer, harness, settings, manager, sampling),
    ):
        found = run_units(console, name, units, store)
        if floor:
            check_floor(found, seed=seed)
        rows += found
    if not main:
        return
    if store is not None:
        store.join(store.folder / "rows.parquet")
    comparisons = compare_settings(rows, uniform_of, seed=seed)
    if not console.is_terminal:
        # A log has no width to keep to.
        console.width = 120
    for table in make_comparison_tables(comparisons):
        console.print(table, "")
    for task, one, other in find_identical(rows, settings, warn=False):
        console.print(
            f"Warning: {task}: {one} and {other} gave the same output and likelihood on every sample. Is the context "
            "longer than what every layer keeps?",
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


def make_comparison_tables(comparisons: Sequence[Comparison]) -> Iterator[Table]:
    """Yield a table for each task, a line for each setting: score, paired differences, and what was kept."""
    from rich.table import Table

    for _, group in itertools.groupby(comparisons, key=lambda one: one.task):
        settings = list(group)
        first = settings[0]
        better = "higher" if first.higher_is_better else "lower"
        table = Table(
            title=f"{first.task}: {first.metric}, {better} is better; {first.score.samples} contexts",
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        for name in ("cache", "kept", "score", "minus full", "minus uniform", "answer loss"):
            table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
        for one in settings:
            guess = one.setting == "blank"
            table.add_row(
                "guess rate" if guess else one.setting,
                "" if one.kept_share is None or guess else f"{one.kept_share:.0%}",
                str(one.score),
                "" if one.to_full is None or guess else f"{one.to_full:+}",
                "" if one.to_uniform is None else f"{one.to_uniform:+}",
                "" if one.answer_loss is None else f"{one.answer_loss:.3f}",
            )
        yield table


def _make_task_table() -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("task", "metric", "options", "source"):
        table.add_column(name)
    for task in load_known()["tasks"]:
        options = ", ".join(f"{name}={value}" for name, value in task["options"].items())
        table.add_row(task["name"], task["metric"], options, task["source"])
    return table


def _split(given: str, flag: str) -> list[str]:
    items = list(dict.fromkeys(item.strip() for item in given.split(",") if item.strip()))
    if not items:
        raise ConfigError(f"{flag} {given!r} names nothing: give at least one.")
    return items


def _number(text: str, kind: Callable[[str], Any], flag: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not a number.") from None


def _share_options(tasks: Sequence[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give each task those of the options that it has."""
    from ..evaluation.tasks import TASKS, list_options

    known = {name: list_options(TASKS[name]) for name in tasks}
    for option in given:
        if not any(option in options for options in known.values()):
            listed = "; ".join(f"{name}: {', '.join(options) or 'none'}" for name, options in known.items())
            raise ConfigError(f"no task has the option {option!r}; there are {listed}.")
    return {name: {k: v for k, v in given.items() if k in options} for name, options in known.items()}
