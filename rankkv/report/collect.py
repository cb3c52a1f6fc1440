"""What a results folder holds: rows of a sweep or an ablation, portraits of prompts, benchmarks, a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluation.results import MANIFEST, read_rows
from ..evaluation.sweep.sweep import PORTRAITS, ROWS
from ..evaluation.task_runner import FULL

BENCH, DEMO = "bench.json", "demo.json"
_NEEDED = {"label", "method", "ratio", "score", "sample", "setting"}


@dataclass
class ReportData:
    """All parts that were found; any may be empty.

    Attributes
    ----------
    folder : Path
        Where they come from.
    rows : list of dict
        One for each cell and sample, with the columns of a sweep.
    portraits : list of dict
        One for each prompt and setting.
    bench, demo, manifest : dict
        As written by the benchmarks, the demo and the sweep.
    is_finished : bool
        Whether the rows are all of the sweep's.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    portraits: list[dict[str, Any]] = field(default_factory=list)
    bench: dict[str, Any] = field(default_factory=dict)
    demo: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    is_finished: bool = True


def collect_results(folder: str | Path, bench: str | Path | None = None) -> ReportData:
    """Read whatever parts a results folder has.

    Parameters
    ----------
    folder : str or Path
        With any of ``rows.parquet`` (or ``parts/`` of an unfinished sweep), ``portraits/``, ``bench.json``,
        ``demo.json`` and ``manifest.json``.
    bench : str or Path, optional
        Benchmarks from elsewhere.

    Returns
    -------
    ReportData
        What was found.

    Raises
    ------
    InputError
        If there is no such folder, it has none of the parts, or one of them cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder: give one that `rankkv sweep` wrote.")
    parts = sorted((folder / "parts").glob("*.parquet"))
    joined = folder / ROWS
    data = ReportData(
        folder,
        rows=list(_adapt(read_rows([joined] if joined.exists() else parts), folder)),
        portraits=[
            row | {"prompt": path.stem}
            for path in sorted((folder / PORTRAITS).glob("*.parquet"))
            for row in read_rows([path])
        ],
        bench=_read_json(folder / BENCH if bench is None else Path(bench), must_exist=bench is not None),
        demo=_read_json(folder / DEMO),
        manifest=_read_json(folder / MANIFEST),
        is_finished=joined.exists() or not parts,
    )
    if not (data.rows or data.portraits or data.bench or data.demo):
        raise InputError(
            f"{str(folder)!r} holds nothing to report: none of {ROWS}, parts/, {PORTRAITS}/, {BENCH} and {DEMO}."
        )
    return data


def _read_json(path: Path, must_exist: bool = False) -> dict[str, Any]:
    if not path.exists() and not must_exist:
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}.") from error
    if not isinstance(record, dict):
        raise InputError(f"{str(path)!r} holds no object: it is not one of the files that RankKV writes.")
    return record


def _adapt(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield rows with a sweep's columns; those of `rankkv eval` and of the ablation are turned into them."""
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
            f"the rows in {str(folder)!r} are not those of a sweep: they lack {', '.join(sorted(_NEEDED - columns))}."
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
