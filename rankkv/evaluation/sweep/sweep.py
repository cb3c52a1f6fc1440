"""Sweep: one prefill per sample for all settings, one file per finished sample, resumable after a kill."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, RankKVError, UnknownNameError
from ...models.checkpoints import get_context_length
from ...models.compat import cache_argument
from ...models.loading import load_model
from ...models.placement import find_input_device
from ...models.texts import load_texts
from ...utils.hub import require
from ...utils.processes import ProcessRank, find_own_device, find_process_rank
from ..benchmarks import load_benchmark, make_benchmark_samples
from ..prefill_record import PrefillRecord, record_prefill
from ..results import ResultStore, write_rows
from ..task_runner import EXTRA_TOKENS, evaluate_blank, evaluate_sample
from ..tasks import Haystack, Sample, get_task, make_samples
from .config import BUILT_IN, DATA, HARNESS, SweepConfig, SweepModel, SweepTask
from .kept_tokens import describe_kept_tokens

#: Names in a results folder: all rows, and the kept-token maps.
ROWS, PORTRAITS = "rows.parquet", "portraits"
# Long enough that the forward's fixed cost does not hide the cost per token.
_PROBE_TOKENS = 256
_FILLER = "The quick brown fox jumps over the lazy dog. " * 30
# Tokens that a task of the harness is taken to generate.
_HARNESS_OUTPUT = 64


@dataclass(frozen=True)
class Unit:
    """Hold one sample of one task for one model: it takes one prefill and fills one file.

    A task of lm-evaluation-harness is one unit, because the harness runs it as a whole: its sample is None.

    Attributes
    ----------
    name : str
        Name of the file, without its suffix.
    model, task, seed, sample
        The sample, and where it comes from.
    maps_kept_tokens : bool
        True if the tokens that each setting keeps of this prompt are recorded too.
    """

    name: str
    model: SweepModel
    task: SweepTask
    seed: int
    sample: Sample | None
    maps_kept_tokens: bool


class Sweep:
    """Run all settings of a sweep in a folder that remembers the finished samples.

    Parameters
    ----------
    config : SweepConfig
        The sweep to run.
    folder : str or Path
        Results folder.  A run writes ``manifest.json``, ``parts/`` and kept-token maps in ``portraits/``.
        :meth:`finish` writes ``rows.parquet``.
    share : ProcessRank, optional
        Share of the samples that this process runs; the launcher's environment gives the default.

    Raises
    ------
    InputError
        If the folder holds another sweep, or a text cannot be used.
    """

    def __init__(self, config: SweepConfig, folder: str | Path, share: ProcessRank | None = None) -> None:
        self.config = config
        self.folder = Path(folder)
        self.share = find_process_rank() if share is None else share
        self._texts = {
            name: "\n\n".join(text.strip() for text in load_texts(name))
            for name in dict.fromkeys(task.text for task in config.tasks if task.source == BUILT_IN)
        }
        self._benchmarks = {
            place: load_benchmark(
                task.task, limit=task.count, max_new_tokens=task.options.get("max_new_tokens")
            )
            for place, task in enumerate(config.tasks)
            if task.source == DATA
        }
        self.manager = _find_harness([task for task in config.tasks if task.source == HARNESS])
        digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in self._texts.items()}
        digests |= {config.tasks[place].task: found.digest for place, found in self._benchmarks.items()}
        self.store = ResultStore(self.folder, {**config.to_dict(), "text_digests": digests})
        self._names: dict[str, list[str]] = {}

    def load(self, model: SweepModel) -> ModelSweep:
        """Load a model, make its samples, and find those that are not done.

        Raises
        ------
        RankKVError
            If the model cannot be loaded, or the samples cannot be made from the text.
        """
        device = find_own_device() or ("cuda" if torch.cuda.is_available() else None)
        loaded, tokenizer = load_model(model.name, model.dtype, model.device_map)
        if model.device_map is None and device is not None:
            loaded = loaded.to(device)
        units = self._list_units(model, tokenizer, get_context_length(loaded))
        self._names[model.name] = [unit.name for unit in units]
        own = units[self.share.rank :: self.share.size]
        return ModelSweep(
            self, loaded, tokenizer, units, [unit for unit in own if not self.store.is_done(unit.name)]
        )

    def _list_units(self, model: SweepModel, tokenizer: Any, context_length: int | None) -> list[Unit]:
        """List the units of a model, those of all processes, in a fixed order."""
        units: list[Unit] = []
        haystacks = {name: Haystack(tokenizer, text) for name, text in self._texts.items()}
        prefix = f"m{self.config.models.index(model)}-{_slug(model.name)}"
        for place, task in enumerate(self.config.tasks):
            for seed in self.config.seeds:
                start = f"{prefix}--t{place}-{_slug(task.label)}--s{seed}"
                if task.source == HARNESS:
                    units.append(Unit(f"{start}--all", model, task, seed, None, False))
                    continue
                samples = self._make_samples(place, task, seed, tokenizer, haystacks, context_length)
                units += [
                    Unit(
                        name=f"{start}--{sample.name}"
                        if task.source == BUILT_IN
                        else f"{start}--{number:04d}",
                        model=model,
                        task=task,
                        seed=seed,
                        sample=sample,
                        maps_kept_tokens=seed == self.config.seeds[0] and number == len(samples) // 2,
                    )
                    for number, sample in enumerate(samples)
                ]
        return units

    def _make_samples(
        self,
        place: int,
        task: SweepTask,
        seed: int,
        tokenizer: Any,
        haystacks: Mapping[str, Haystack],
        context_length: int | None,
    ) -> list[Sample]:
        """Make the samples of a built-in task or of a benchmark's file."""
        try:
            if task.source == DATA:
                return make_benchmark_samples(
                    self._benchmarks[place].items,
                    tokenizer,
                    question="before" if task.question_aware else "after",
                    chat=task.chat,
                    max_length=task.options.get("max_length"),
                    context_length=context_length,
                    seed=seed,
                ).samples
            return make_samples(
                get_task(task.task),
                tokenizer,
                haystacks[task.text],
                lengths=task.lengths,
                count=task.count,
                seed=seed,
                question_aware=task.question_aware,
                chat=bool(task.chat),
                **task.options,
            )
        except (RankKVError, TypeError) as error:
            raise ConfigError(f"tasks[{place}] ({task.label}): {error}") from error

    def finish(self) -> Path | None:
        """Write all rows to one file if every sample of every model is done, by any process.

        Returns
        -------
        Path or None
            The file of rows, or None if a sample is missing.

        Raises
        ------
        ConfigError
            If a model was not loaded, because its samples are not known then.
        """
        missing = [model.name for model in self.config.models if model.name not in self._names]
        if missing:
            raise ConfigError(f"the samples of {missing[0]!r} are not known: call load() before finish().")
        if not all(self.store.is_done(name) for names in self._names.values() for name in names):
            return None
        return self.store.join(self.folder / ROWS)


class ModelSweep:
    """Run the samples of a sweep on one loaded model.

    Attributes
    ----------
    model : PreTrainedModel
        The model, on its device.
    units : list of Unit
        All units of this model, those of other processes included.
    waiting : list of Unit
        Units of this process that are not done.
    """

    def __init__(
        self, sweep: Sweep, model: Any, tokenizer: Any, units: list[Unit], waiting: list[Unit]
    ) -> None:
        self.units, self.waiting = units, waiting
        self.model, self._sweep, self._tokenizer = model, sweep, tokenizer
        self._settings = sweep.config.list_settings()
        self._options = {
            name: method.build_options(ratio) for name, (method, ratio) in self._settings.items()
        }

    def estimate_seconds(self) -> list[float]:
        """Estimate the seconds of each waiting unit from a short probe."""
        if not self.waiting:
            return []
        samples = [unit.sample for unit in self.waiting if unit.sample is not None]
        some = samples[0].context_ids if samples else self._tokenizer(_FILLER, verbose=False)["input_ids"]
        prefill, build, step = self._probe(some[:_PROBE_TOKENS])
        return [self._estimate_unit(unit, prefill, build, step) for unit in self.waiting]

    def _estimate_unit(self, unit: Unit, prefill: float, build: float, step: float) -> float:
        """Estimate the seconds of a unit from the three costs of :meth:`_probe`."""
        sample, caches = unit.sample, len(self._settings) + 1
        if sample is None:
            # The harness prefills each document anew for each cache.
            tokens = max(unit.task.lengths)
            return unit.task.count * caches * (tokens * (prefill + build) + step * _HARNESS_OUTPUT)
        asking = 0.0
        for prompt in sample.prompts:
            follow = len(prompt.question_ids) + len(prompt.answer_ids)
            asking += max(step, follow * prefill)
            if prompt.answers:
                # Upper bound: as if every answer were wrong, and therefore decoded.
                asking += step * (prompt.max_new_tokens or len(prompt.answer_ids) + EXTRA_TOKENS)
        length = len(sample.context_ids)
        blank = self._sweep.config.blank and sample.blank_ids is not None
        # The kept-token map builds each compressed cache a second time.
        mapping = build * length * len(self._settings) if unit.maps_kept_tokens else 0.0
        return (1 + blank) * length * prefill + caches * (build * length + asking) + blank * asking + mapping

    def _probe(self, token_ids: Sequence[int]) -> tuple[float, float, float]:
        """Return the seconds per prefilled token, per token of a built cache, and per decode step."""
        ids = torch.tensor(token_ids)[None]
        record_prefill(self.model, ids)  # warm-up: the first forward is slower
        seconds, record = _time(lambda: record_prefill(self.model, ids, tokenizer=self._tokenizer))
        # Build about four settings for all: with many methods a probe of each would take too long.
        tried = list(self._options.values())[:: max(1, len(self._options) // 4)]
        building = sum(_time(lambda options=options: record.build_cache(**options))[0] for options in tried)
        stepping, _ = _time(lambda: _forward(record, ids[:, :1]))
        return seconds / ids.shape[1], building / len(tried) / ids.shape[1], stepping

    def run(self) -> Iterator[Unit]:
        """Measure the waiting units one by one; each is written before it is yielded."""
        for unit in self.waiting:
            started = time.perf_counter()
            rows = self._measure(unit)
            seconds = time.perf_counter() - started
            self._sweep.store.write(unit.name, [{**row, "unit_seconds": seconds} for row in rows])
            yield unit

    def _measure_harness(self, unit: Unit) -> list[dict[str, Any]]:
        """Return the rows of a task of lm-evaluation-harness."""
        from ..lm_eval.rows import evaluate_harness_task, shorten_harness_errors

        # The harness prints to stdout, which is for results.
        with redirect_stdout(sys.stderr), shorten_harness_errors(f"task {unit.task.task}"):
            rows = evaluate_harness_task(
                self.model,
                self._tokenizer,
                unit.task.task,
                self._options,
                self._sweep.manager,
                count=unit.task.count,
                seed=unit.seed,
                question_aware=unit.task.question_aware,
            )
            return [{**self._describe(unit, row["setting"]), **row} for row in rows]

    def _measure(self, unit: Unit) -> list[dict[str, Any]]:
        """Return the rows of a unit; write its kept-token map if it has one."""
        sample = unit.sample
        if sample is None:
            return self._measure_harness(unit)
        record = record_prefill(self.model, torch.tensor(sample.context_ids)[None], tokenizer=self._tokenizer)
        found = list(evaluate_sample(record, self._tokenizer, sample, self._options))
        if unit.maps_kept_tokens:
            kept_maps = describe_kept_tokens(record, self._tokenizer, self._options)
            # Write the map before the unit counts as done, so that a kill in between does not lose it.
            write_rows(
                self._sweep.folder / PORTRAITS / f"{unit.name}.parquet",
                [{**self._describe(unit, row["setting"]), **row} for row in kept_maps],
            )
        # Free the record before the next prefill: two of them may not fit into memory.
        del record
        if self._sweep.config.blank and sample.blank_ids is not None:
            found.append(evaluate_blank(self.model, self._tokenizer, sample))
        return [{**self._describe(unit, row["setting"]), **row} for row in found]

    def _describe(self, unit: Unit, setting: str) -> dict[str, Any]:
        """Return the columns that say where a row comes from."""
        method, ratio = self._settings.get(setting, (None, 1.0))
        return {
            "model": unit.model.name,
            "label": unit.task.label,
            "method": setting if method is None else method.name,
            "selector": None if method is None else method.selector,
            "allocation": None if method is None else method.allocation,
            "ratio": ratio,
        }


def _find_harness(tasks: Sequence[SweepTask]) -> Any:
    """Return the harness' task manager; None without tasks of the harness.

    Raises
    ------
    MissingDependencyError
        If the harness, or a package of one of its tasks, is not installed.
    UnknownNameError
        If the harness has no such task.
    """
    if not tasks:
        return None
    require("lm_eval", 'pip install "rankkv[lm-eval]"', "lm-evaluation-harness")
    from ..lm_eval.rows import build_task_manager, check_task_packages

    names = [task.task for task in tasks]
    check_task_packages(names)
    paths = {task.options["include_path"] for task in tasks if "include_path" in task.options}
    if len(paths) > 1:
        raise ConfigError(
            f"the harness tasks have {len(paths)} values of include_path: put their YAML files into one folder."
        )
    lengths = sorted({length for task in tasks for length in task.lengths})
    manager = build_task_manager(names, next(iter(paths), None), lengths)
    for name in names:
        if not manager.match_tasks([name]):
            raise UnknownNameError(
                f"lm-evaluation-harness has no task {name!r}: list its tasks with rankkv lm-eval ls tasks, or give the "
                "folder of its YAML file as include_path."
            )
    return manager


def _forward(record: PrefillRecord, ids: torch.Tensor) -> None:
    """Run one forward after the full cache of a record."""
    with torch.no_grad():
        record.model(
            input_ids=ids.to(find_input_device(record.model)),
            use_cache=True,
            **cache_argument(record.build_full_cache()),
        )


def _time(call: Any) -> tuple[float, Any]:
    """Return the seconds that a call took, GPU work included, and its result."""
    started = time.perf_counter()
    value = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, value


def _slug(name: str) -> str:
    """Return a short form of a name that is safe in a file name.

    Two names may give the same form; the number before it in a unit's name keeps them apart.
    """
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[-40:] or "unnamed"


def count_samples(config: SweepConfig) -> Mapping[str, int]:
    """Return the number of contexts per task for one model.

    A question-aware task with several questions per context has more samples than that, a short file fewer.
    """
    return {
        task.label: (1 if task.source == DATA else len(task.lengths)) * task.count * len(config.seeds)
        for task in config.tasks
    }
