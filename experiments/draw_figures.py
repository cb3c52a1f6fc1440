"""All figures of results/figures, drawn from the committed records.

    python experiments/draw_figures.py

No model is loaded and nothing is measured. `--records` names another folder of records, `--only` some of the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import allocation_ablation
import method_quality
import needle_grid
import rank_analysis_exp

from rankkv.cli.common import EXIT_BAD_INPUT, format_error
from rankkv.cli.demo import _draw_figures as draw_demo
from rankkv.errors import InputError, RankKVError
from rankkv.evaluation.results import read_rows
from rankkv.report import collect_results, write_figures

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import quality_speed


def name_source(record: dict[str, Any]) -> str:
    """Return the commit that a record was measured at, in words; nothing if it names none."""
    environments = (record.get(name) or {} for name in ("environment", "machine", "versions"))
    commit = next((str(own["commit"])[:7] for own in environments if own.get("commit")), "")
    return f"commit {commit}" if commit else ""


def draw_rows(name: str, draw: Callable[..., list[Path]], records: Path) -> list[Path]:
    """Draw the rows of one experiment."""
    manifest = json.loads((records / name / "manifest.json").read_text(encoding="utf-8"))
    # A name of an older commit may mean something else today.
    renamed = manifest.get("renamed", {})
    rows = [
        {**row, "strategy": renamed.get(row["strategy"], row["strategy"])}
        for row in read_rows([records / name / "rows.parquet"])
    ]
    return draw(rows, records, name_source(manifest))


def draw_rank_analysis(records: Path) -> list[Path]:
    """Draw ranks and budgets of each layer."""
    record = json.loads((records / "rank_analysis.json").read_text(encoding="utf-8"))
    return rank_analysis_exp.draw(record, records, name_source(record))


def draw_quality_speed(records: Path) -> list[Path]:
    """Draw loss against time and memory."""
    record = json.loads((records / "quality_speed.json").read_text(encoding="utf-8"))
    stem = records / "figures" / "quality_speed"
    return quality_speed.draw(record["rows"], record["settings"], stem, name_source(record))


def draw_demo_figures(records: Path) -> list[Path]:
    """Draw ranks, budgets, memory and times of the demo."""
    record = json.loads((records / "demo.json").read_text(encoding="utf-8"))
    return draw_demo(record["runs"], record["model"], records / "figures")


FIGURES: dict[str, Callable[[Path], list[Path]]] = {
    "ablation": lambda records: draw_rows("ablation", allocation_ablation.draw, records),
    "method_quality": lambda records: draw_rows("method_quality", method_quality.draw, records),
    "needle": lambda records: draw_rows("needle", needle_grid.draw, records),
    "rank_analysis": draw_rank_analysis,
    "quality_speed": draw_quality_speed,
    "demo": draw_demo_figures,
    "sweep": lambda records: write_figures(collect_results(records / "sweep"), records / "figures", "sweep_"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="All figures of results/figures, drawn from the committed records."
    )
    parser.add_argument("--records", type=Path, default=Path("results"), help="folder of the records")
    parser.add_argument(
        "--only", nargs="+", choices=list(FIGURES), default=list(FIGURES), help="some figures"
    )
    options = parser.parse_args(arguments)
    try:
        for name in options.only:
            for path in FIGURES[name](options.records):
                print(path)
    except OSError as error:
        print(format_error(InputError(f"cannot read {error.filename!r}: {error.strerror}.")), file=sys.stderr)
        return EXIT_BAD_INPUT
    except RankKVError as error:
        print(format_error(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
