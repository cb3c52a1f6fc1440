"""Rows of lm-evaluation-harness tasks, one per sample and setting, for the same statistics as all others."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ...errors import (
    InputError,
    MissingDependencyError,
    RankKVError,
    SourceUnavailableError,
    UnknownNameError,
)
from ...utils.hub import require
from ..task_runner import BLANK, FULL
from .model import RankKVLM

#: Packages that load data sets: an error of theirs says that the data are not there.
_LOADERS = {"datasets", "huggingface_hub", "fsspec"}
#: Modules whose package has another name.
_PACKAGES = {"sklearn": "scikit-learn", "bs4": "beautifulsoup4"}
#: Modules that the harness' tasks import, by the beginning of their names.
_TASK_PACKAGES = {
    "longbench": ("jieba", "fuzzywuzzy", "rouge"),
    "ruler": ("wonderwords", "nltk", "html2text", "bs4", "httpx"),
    "niah_": ("wonderwords", "nltk", "html2text", "bs4", "httpx"),
}
_INSTALL_TASKS = 'pip install "rankkv[lm-eval-tasks]"'


def build_task_manager(
    names: Sequence[str], include_path: str | None = None, lengths: Sequence[int] = ()
) -> TaskManager:
    """Build the harness' task manager, without its own tasks if the folder has all names.

    The harness takes long to list its own tasks.  RULER's tasks make their own data: they need the folder of a
    tokenizer, into which :func:`evaluate_harness_task` writes the model's, and lengths in tokens.
    """
    # The folder goes when the manager does.
    folder = tempfile.TemporaryDirectory(prefix="rankkv-tokenizer-")
    metadata: dict[str, Any] = {"tokenizer": folder.name}
    if lengths:
        metadata["max_seq_lengths"] = list(lengths)
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)
        if all(manager.match_tasks([name]) for name in names):
            manager.tokenizer_folder = folder
            return manager
    manager = TaskManager(include_path=include_path, metadata=metadata)
    manager.tokenizer_folder = folder
    return manager


def check_task_packages(names: Sequence[str]) -> None:
    """Check that the packages of LongBench's and RULER's tasks are installed.

    Raises
    ------
    MissingDependencyError
        If one is missing; the message gives the command that installs all of them.
    """
    for name in names:
        for prefix, packages in _TASK_PACKAGES.items():
            if name.startswith(prefix):
                for package in packages:
                    require(package, _INSTALL_TASKS, f"the task {name} of lm-evaluation-harness")


@contextmanager
def shorten_harness_errors(task: str) -> Iterator[None]:
    """Turn the harness' errors about a missing package or data set into errors of one sentence.

    Raises
    ------
    MissingDependencyError
        If the task needs a package that is not installed.
    SourceUnavailableError
        If its data set cannot be loaded.
    """
    try:
        yield
    except RankKVError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(error.name or "", error.name)
        remedy = f": pip install {package}" if package else ""
        raise MissingDependencyError(
            f"{task} needs a package that is not installed{remedy} ({_first_line(error)})."
        ) from error
    except LookupError as error:
        # nltk's missing data.  A KeyError or an IndexError is a bug: let it through.
        if isinstance(error, KeyError | IndexError):
            raise
        raise SourceUnavailableError(
            f"{task} needs data of nltk, which cannot be downloaded here: run python -m nltk.downloader punkt_tab once."
        ) from error
    except (OSError, ValueError) as error:
        # A ValueError of the harness or of a task is a bug: let it through. So is an OSError that no loader saw.
        packages = _list_packages(error)
        if not _LOADERS.intersection(packages[-1:] if isinstance(error, ValueError) else packages):
            raise
        raise SourceUnavailableError(
            f"the data set of {task} cannot be loaded ({_first_line(error)}): check the network and its name, or "
            "give your own tasks with --include-path."
        ) from error


def _list_packages(error: BaseException) -> list[str]:
    """Return the packages whose code an error passed, that where it was raised last."""
    frames = traceback.walk_tb(error.__traceback__)
    return [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame, _ in frames]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def evaluate_harness_task(
    model: Any,
    tokenizer: Any,
    name: str,
    settings: Mapping[str, Mapping[str, Any]],
    manager: TaskManager,
    *,
    count: int | None = None,
    seed: int = 0,
    **model_options: Any,
) -> Iterator[dict[str, Any]]:
    """Run one task of the harness with its own ``hf`` model, then with each setting on the model ``rankkv``.

    Parameters
    ----------
    model, tokenizer
        A causal language model and its tokenizer.
    name : str
        Task, group or tag of the harness.
    settings : mapping
        Maps each setting's name to its options of :class:`~rankkv.RankKVConfig`.
    manager : TaskManager
        From :func:`build_task_manager`.
    count : int, optional
        Documents per task; None means all.
    seed : int, default 0
        Seed of the harness' few-shot examples.
    **model_options
        More options of :class:`RankKVLM`, such as ``question_aware``.

    Yields
    ------
    dict
        The columns of :func:`~rankkv.evaluation.evaluate_sample`; null if the harness does not report a value.
        ``score`` is the task's first metric.  For a metric that sums over units (perplexities) it is the mean loss,
        nats per unit.  ``cache_bytes`` is the mean over all requests.  Multiple-choice tasks also have rows
        ``"blank"``, whose score is 1 / number of choices.

    Raises
    ------
    UnknownNameError
        If the harness has no such task.
    InputError
        If a sample has no metric.
    """
    if not manager.match_tasks([name]):
        raise UnknownNameError.of("task", name, manager.all_tasks)
    tokenizer.save_pretrained(manager.metadata["tokenizer"])
    for setting, options in {FULL: None, **settings}.items():
        wrapped = (
            HFLM(pretrained=model, tokenizer=tokenizer)
            if options is None
            else RankKVLM(pretrained=model, tokenizer=tokenizer, **model_options, **options)
        )
        results = lm_eval.simple_evaluate(
            wrapped,
            tasks=[name],
            task_manager=manager,
            limit=count,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        yield from _list_rows(results, setting, seed, wrapped)


def _list_rows(
    results: Mapping[str, Any], setting: str, seed: int, wrapped: HFLM
) -> Iterator[dict[str, Any]]:
    """Yield a row for each document of each task in the harness' results."""
    # The harness' own model counts no bytes.
    kept = getattr(wrapped, "mean_bytes", (None, None))
    for task, samples in results["samples"].items():
        choices = results["configs"][task]["output_type"] == "multiple_choice"
        # With several output filters a document has several entries: take the first.
        first = {sample["doc_id"]: sample for sample in reversed(samples)}
        for document in sorted(first):
            sample = first[document]
            if not sample.get("metrics"):
                raise InputError(
                    f"task {task!r} of the harness has no metric per sample: choose a task that has one."
                )
            metric = _choose_metric(sample)
            score, metric, higher = _read_score(
                sample[metric], metric, results["higher_is_better"][task].get(metric)
            )
            if metric.isdecimal():
                metric = f"answers found at {metric} tokens"
            row = {
                "task": task,
                "sample": str(document),
                "index": document,
                "seed": seed,
                "length": None,
                "depth": None,
                "question_aware": getattr(wrapped, "question_aware", None),
                "questions": 1,
                "setting": setting,
                "metric": metric,
                "higher_is_better": higher,
                "score": score,
                "answer_loss": None,
                "divergence": None,
                "kept_tokens": None,
                "full_tokens": None,
                "cache_bytes": kept[0],
                "full_cache_bytes": kept[1],
                "metadata_bytes": None,
                "output": str(sample["filtered_resps"]),
                "expected": str(sample["target"]),
            }
            yield row
            if setting == FULL and choices:
                guess = 1.0 / len(sample["arguments"])
                yield {**row, "setting": BLANK, "score": guess, "output": ""}


def _choose_metric(sample: Mapping[str, Any]) -> str:
    """Return the first metric of a sample; RULER names them by length and gives -1 for all others."""
    metrics = [str(name) for name in sample["metrics"]]
    return next((name for name in metrics if not (name.isdecimal() and sample[name] == -1)), metrics[0])


def _read_score(value: Any, metric: str, higher: bool | None) -> tuple[float, str, bool]:
    """Return a sample's score, the metric's name, and True if higher is better."""
    # Perplexities come as (log-likelihood, number of units).
    if isinstance(value, Sequence) and len(value) == 2:
        return -float(value[0]) / float(value[1]), f"{metric} as nats", False
    return float(value), metric, higher is not False
