"""The parts of a results folder: rows, kept-token maps, benchmarks, the demo's record and the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import InputError
from ..evaluation.results import MANIFEST, read_rows
from ..evaluation.sweep.sweep import PORTRAITS, ROWS
from ..evaluation.task_runner import FULL
from ..utils.files import read_json

BENCH, DEMO = "bench.json", "demo.json"
_NEEDED = {"label", "method", "ratio", "score", "sample", "setting"}
#: Columns that tell a sample and a setting apart.
_IDENTITY = ("model", "label", "setting", "seed", "length", "sample")
_MEASURED = ("score", "answer_loss", "output")
#: Parts of the benchmarks' record, any of which tells it from other records.
_BENCH_PARTS = {"latency", "memory", "targets", "throughput", "scaling", "analysis"}


@dataclass
class ReportData:
    """Parts of a results folder; any may be empty.

    Attributes
    ----------
    folder : Path
        Folder or file that was read.
    rows : list of dict
        One for each setting and sample, with the columns of a sweep.
    kept_maps : list of dict
        Kept-token maps: one for each prompt and setting.
    bench, demo, manifest : dict
        As written by the benchmarks, the demo and the sweep.
    is_finished : bool
        True if the rows are all of the sweep's.
    notes : list of str
        Sentences on the data that a reader of the page must know.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    kept_maps: list[dict[str, Any]] = field(default_factory=list)
    bench: dict[str, Any] = field(default_factory=dict)
    demo: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    is_finished: bool = True
    notes: list[str] = field(default_factory=list)


def collect_results(folder: str | Path, bench: str | Path | None = None) -> ReportData:
    """Read the parts of a results folder, or one record.

    Parameters
    ----------
    folder : str or Path
        Folder with any of ``rows.parquet`` (or ``parts/`` of an unfinished sweep), ``portraits/`` (kept-token maps),
        ``bench.json``, ``demo.json`` and ``manifest.json``.  Or one file: rows as Parquet, or the JSON record of the
        benchmarks or of the demo.
    bench : str or Path, optional
        Benchmarks from elsewhere.

    Returns
    -------
    ReportData
        The parts that were found.  A row that is there twice counts once, and a note says so.

    Raises
    ------
    InputError
        If there is no such folder or file, it has none of the parts, one of them cannot be read, or one sample has
        two different scores for one setting.
    """
    folder = Path(folder)
    if folder.is_file():
        data = _read_file(folder)
    elif folder.is_dir():
        data = _read_folder(folder)
    else:
        raise InputError(
            f"{str(folder)!r} is no folder and no file: give a folder that `rankkv sweep` wrote."
        )
    if bench is not None:
        data.bench = _read_json(Path(bench))
    if not (data.rows or data.kept_maps or data.bench or data.demo):
        raise InputError(
            f"{str(folder)!r} holds nothing to report: none of {ROWS}, parts/, {PORTRAITS}/, {BENCH} and {DEMO}."
        )
    data.rows, doubled = _drop_doubled(_adapt(data.rows, folder), folder)
    if doubled:
        data.notes.append(f"{doubled:,} of the rows are there twice, with the same scores. Each counts once.")
    measured = str((data.manifest.get("environment") or {}).get("rankkv") or __version__)
    if measured != __version__:
        data.notes.append(
            f"The rows were measured with RankKV {measured}, this is {__version__}: defaults may differ."
        )
    if data.manifest.get("note"):
        data.notes.append(f"From the manifest: {data.manifest['note']}.")
    return data


def _read_folder(folder: Path) -> ReportData:
    parts = sorted((folder / "parts").glob("*.parquet"))
    joined = folder / ROWS
    return ReportData(
        folder,
        rows=_read_parquet([joined] if joined.exists() else parts),
        kept_maps=[
            row | {"prompt": path.stem}
            for path in sorted((folder / PORTRAITS).glob("*.parquet"))
            for row in _read_parquet([path])
        ],
        bench=_read_json(folder / BENCH) if (folder / BENCH).exists() else {},
        demo=_read_json(folder / DEMO) if (folder / DEMO).exists() else {},
        manifest=_read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {},
        is_finished=joined.exists() or not parts,
    )


def _read_file(path: Path) -> ReportData:
    if path.suffix == ".parquet":
        manifest = path.with_name(MANIFEST)
        return ReportData(
            path, rows=_read_parquet([path]), manifest=_read_json(manifest) if manifest.exists() else {}
        )
    record = _read_json(path)
    if "runs" in record and "document" in record:
        return ReportData(path, demo=record)
    if _BENCH_PARTS & set(record):
        return ReportData(path, bench=record)
    raise InputError(
        f"{str(path)!r} is not a record that a report shows: give a folder that `rankkv sweep` wrote, its {ROWS}, "
        f"{BENCH} or {DEMO}."
    )


def _read_parquet(paths: list[Path]) -> list[dict[str, Any]]:
    rows = []
    for path in paths:
        try:
            rows += read_rows([path])
        # pyarrow's errors of damaged files are among these.
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"cannot read {str(path)!r} as Parquet: {reason} Remove it and run again."
            ) from error
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict):
        raise InputError(f"{str(path)!r} holds no object: it is not one of the files that RankKV writes.")
    return record


def _drop_doubled(rows: Iterable[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows without those that are there twice, and how many those are."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    doubled = 0
    for row in rows:
        identity = tuple(row.get(name) for name in _IDENTITY)
        first = kept.setdefault(identity, row)
        if first is row:
            continue
        if any(first.get(name) != row.get(name) for name in _MEASURED):
            raise InputError(
                f"{str(folder)!r} holds two different results of sample {row['sample']!r} with {row['setting']!r} "
                f"(scores {first['score']:g} and {row['score']:g}): keep the rows of one run."
            )
        doubled += 1
    return list(kept.values()), doubled


def _adapt(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield rows with a sweep's columns; of `rankkv eval` and of the ablation too."""
    if not rows:
        return
    columns = set(rows[0])
    if columns >= _NEEDED:
        yield from rows
    elif columns >= {"kind", "text", "selector", "strategy", "ratio", "loss", "full_loss"}:
        yield from _adapt_ablation(rows)
    elif columns >= {"task", "setting", "score", "sample"}:
        yield from map(_adapt_evaluation, rows)
    else:
        raise InputError(
            f"the rows in {str(folder)!r} are not those of a sweep: they lack "
            f"{', '.join(sorted(_NEEDED - columns))}."
        )


def _adapt_evaluation(row: dict[str, Any]) -> dict[str, Any]:
    selector, _, rest = row["setting"].partition("|")
    strategy, _, ratio = rest.rpartition("|")
    method = f"{selector} + {strategy}" if strategy else row["setting"]
    named = {"model": "", "label": row["task"], "method": method, "ratio": float(ratio) if strategy else 1.0}
    return {"depth": None, **row, **named}


def _adapt_ablation(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    seen = set()
    for row in rows:
        common = {
            "model": "", "label": row["kind"], "sample": row["text"], "index": row["text"], "seed": 0,
            "metric": "loss", "higher_is_better": False, "depth": None, "full_tokens": None, "kept_tokens": None,
        }  # fmt: skip
        if row["text"] not in seen:
            seen.add(row["text"])
            loss = row["full_loss"]
            yield {
                **common,
                "setting": FULL,
                "method": FULL,
                "ratio": 1.0,
                "score": loss,
                "answer_loss": loss,
            }
        method, loss = f"{row['selector']} + {row['strategy']}", row["loss"]
        setting = f"{method} @ {row['ratio']:g}"
        yield {
            **common, "setting": setting, "method": method, "ratio": row["ratio"], "score": loss, "answer_loss": loss,
        }  # fmt: skip
