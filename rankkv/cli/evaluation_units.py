"""The work of `rankkv eval` in units that are written whole: a sample of an own task, or a task of the harness."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnknownNameError
from ..utils.hub import require
from ..utils.processes import gather, split_samples
from .display import show_step

if TYPE_CHECKING:
    from rich.console import Console

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
    from ..evaluation.lm_eval.rows import evaluate_harness_task

    # What the harness prints would stand in the JSON.
    with redirect_stdout(sys.stderr):
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
