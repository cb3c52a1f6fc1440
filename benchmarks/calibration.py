"""What calibration by gradients costs and tells, beside a run for each layer, ratio and head.

python -m benchmarks.calibration --texts python-docs --pieces 2

The CPU time of one over the other, and the correlation over heads and over layers of what both say of each piece.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.common import print_rows, publish, time_both
from rankkv import load_model, load_texts
from rankkv.calibration.gradient import measure_gradients
from rankkv.calibration.settings import CalibrationSettings
from rankkv.calibration.single_runs import measure_text

#: What both methods say, by its name in a profile.
COMPARED = ("head_gain_divergence", "gain_divergence", "gain_loss", "divergence", "excess_loss")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--texts", nargs="+", default=["python-docs"], help="as rankkv calibrate takes them")
    parser.add_argument("--pieces", type=int, default=2, help="pieces of text, spread evenly")
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    settings = CalibrationSettings(max_texts=options.pieces)
    pieces = settings.cut(tokenizer, ["\n\n".join(load_texts(source)) for source in options.texts])
    rows = [measure(model, piece, settings) for piece in pieces]
    shown = dict.fromkeys(COMPARED, "{:.3f}")
    print_rows("Gradients beside single runs", rows, {"piece_tokens": "{}", "cpu_ratio": "{:.3f}", **shown})
    publish("calibration", rows, options.output)


def measure(model: Any, piece: Sequence[int], settings: CalibrationSettings) -> dict[str, Any]:
    """Measure one piece by both methods."""
    ids = torch.tensor([list(piece)])
    records, seconds = [], []
    for function in (measure_gradients, measure_text):
        _, cpu = time_both(
            lambda function=function: records.append(function(model, ids, settings.context_tokens))
        )
        seconds.append(cpu)
    estimated, measured = records
    return {
        "piece_tokens": len(piece),
        "cpu_ratio": seconds[0] / seconds[1],
        **{name: _correlate(estimated[name], measured[name]) for name in COMPARED},
    }


def _correlate(one: Any, other: Any) -> float:
    return float(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1])


if __name__ == "__main__":
    main()
