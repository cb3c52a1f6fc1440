"""Predicted and real loss of compressed caches, and the size of the cache that stays below a loss.

    python experiments/quality_bound.py --texts encyclopaedia=wiki.txt --texts code=code.txt --samples 12

For each context, method and share kept: the attention lost, the loss predicted from it, and the real loss, the mean KL
divergence from the full cache over the 128 tokens that follow.  The same for each `max_loss`.  `--fit FILE` writes the
loss curves of the rows, and of those in the folders of `--also`, one curve per method.
Writes Parquet parts (a run that was killed goes on), `rows.parquet` and `summary.md` with 95 % intervals over contexts.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from allocation_ablation import add_text_arguments, describe, finish, iterate_contexts, main, read_texts

from rankkv.errors import ConfigError
from rankkv.utils.files import dump_json, write_text_atomically

#: Selector of each loss curve, and its options of RankKVCache.
METHODS: dict[str, dict[str, Any]] = {
    "echo": {"selector": "echo"},
    "snapkv": {"selector": "snapkv", "profile": None},
}
#: Strategy that each of them takes, which its curve records.
STRATEGIES = {"echo": "global", "snapkv": "distortion"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Predicted and real loss of compressed caches, and the cache that stays below a loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_text_arguments(parser, samples=12, continuation=129)
    add("--lengths", type=int, nargs="+", default=[1024, 512, 2048], help="tokens of the contexts, in turn")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="selectors")
    add(
        "--ratios",
        type=float,
        nargs="*",
        default=[0.03, 0.06, 0.12, 0.25, 0.5, 0.75],
        help="fractions of the cache kept",
    )
    add("--max_losses", type=float, nargs="*", default=[0.02, 0.05, 0.1], help="losses to stay below")
    add("--fit", type=Path, help="also write the loss curves to this file")
    add("--also", type=Path, nargs="*", default=[], help="folders whose rows join the fit")
    add("--seed", type=int, default=0, help="where the contexts start, and of the bootstrap")
    add("--output_dir", type=Path, default=Path("results/quality_bound"), help="where everything goes")
    found = parser.parse_args(arguments)
    # Contexts are cut for the longest; shorter ones are its end.
    found.context = max(found.lengths)
    return found


def score_context(model: Any, ids: Any, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row a method and size: what was asked, kept, lost, predicted and measured."""
    from rankkv.evaluation import record_prefill
    from rankkv.evaluation.perplexity import predict_tokens

    length = ids.shape[1] - arguments.continuation
    record = record_prefill(model, ids[:, :length])
    reference = predict_tokens(model, record.build_full_cache(), ids[:, length:])[:-1]
    probabilities = reference.exp()
    sizes = [("ratio", "compression_ratio", ratio) for ratio in arguments.ratios]
    sizes += [("max_loss", "max_loss", loss) for loss in arguments.max_losses]
    for method, (by, option, asked) in itertools.product(arguments.methods, sizes):
        cache = record.build_cache(**METHODS[method], **{option: asked})
        predicted, bound, lost = cache.predicted_loss, cache.loss_bounds[0], cache.lost_attention[0]
        kept = sum(cache.budgets) / (length * len(cache.budgets))
        doubts = cache.doubts
        after = predict_tokens(model, cache, ids[:, length:])[:-1]
        yield {
            "method": method,
            "by": by,
            "asked": asked,
            "tokens": length,
            "kept": kept,
            "lost": lost,
            "predicted": predicted,
            "bound": bound,
            "doubts": len(doubts),
            "divergence": float((probabilities * (reference - after)).sum(-1).mean()),
        }


def fit_curves(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the loss curve of each method as plain JSON types."""
    from rankkv.models.embedded import EMBEDDED_HUB_ID
    from rankkv.profile.loss_curve import fit_loss_curve

    curves = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method and row["by"] == "ratio"]
        names = {EMBEDDED_HUB_ID if row["model"] == "embedded" else row["model"] for row in own}
        models = sorted(name.rpartition("/")[2] for name in names)
        curves[method] = fit_loss_curve(
            [row["lost"] for row in own],
            [row["divergence"] for row in own],
            [f"{row['model']} {row['text']}" for row in own],
            {"models": models, "strategy": STRATEGIES[method]},
        ).to_dict()
    return curves


def summarize(rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Return Markdown tables: correlation of predicted and real loss, and what each `max_loss` kept and lost."""
    from rankkv.evaluation.statistics import compute_mean

    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        by_ratio = [row for row in own if row["by"] == "ratio"]
        contexts = len({row["text"] for row in own})
        lines += [f"### {method} ({contexts} contexts)", ""]
        if by_ratio:
            rank = correlate([row["predicted"] for row in by_ratio], [row["divergence"] for row in by_ratio])
            alone = correlate([-row["kept"] for row in by_ratio], [row["divergence"] for row in by_ratio])
            within = sum(bool(row["divergence"] <= row["bound"]) for row in by_ratio) / len(by_ratio)
            lines += [
                f"Spearman correlation of predicted and real loss: {rank:.3f}; of the share kept alone: {alone:.3f}. "
                f"Real loss below the bound of nine in ten: {within:.0%} of {len(by_ratio)}.",
                "",
            ]
        lines += ["| asked | loss | below | of the bound | kept | fixed ratio for this loss | share of it |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for by, asked in dict.fromkeys((row["by"], row["asked"]) for row in own):
            those = [row for row in own if (row["by"], row["asked"]) == (by, asked)]
            loss = compute_mean([row["divergence"] for row in those], seed=seed)
            kept = compute_mean([row["kept"] for row in those], seed=seed)
            name = f"{asked:.0%} kept" if by == "ratio" else f"max_loss={asked:g}"
            line = [name, f"{loss.mean:.4f} [{loss.low:.4f}, {loss.high:.4f}]"]
            if by == "ratio":
                line += ["", "", f"{kept.mean:.3f}", "", ""]
            else:
                below = compute_mean([float(row["divergence"] <= asked) for row in those], seed=seed)
                fixed = find_fixed_ratio(by_ratio, loss.mean)
                line += [
                    f"{below.mean:.0%} [{below.low:.0%}, {below.high:.0%}]",
                    f"{loss.mean / asked:.2f}",
                    f"{kept.mean:.3f} [{kept.low:.3f}, {kept.high:.3f}]",
                    f"{fixed:.3f}" if fixed else "outside",
                    f"{kept.mean / fixed:.2f}" if fixed else "",
                ]
            lines.append("| " + " | ".join(line) + " |")
        lines.append("")
    return "\n".join(lines)


def correlate(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties in the order of the rows."""
    import numpy as np

    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def find_fixed_ratio(rows: Sequence[dict[str, Any]], loss: float) -> float | None:
    """Return the share kept at which one ratio for all contexts has this mean loss; None outside the measured ones."""
    import numpy as np

    means: list[tuple[float, float]] = []
    for ratio in sorted({row["asked"] for row in rows}):
        those = [row for row in rows if row["asked"] == ratio]
        kept = sum(row["kept"] for row in those) / len(those)
        means.append((kept, sum(row["divergence"] for row in those) / len(those)))
    if not means or not min(mean for _, mean in means) <= loss <= max(mean for _, mean in means):
        return None
    means.sort(key=lambda pair: pair[1])
    kept, losses = np.log(np.array(means)).T
    return float(np.exp(np.interp(np.log(loss), losses, kept)))


def run(arguments: argparse.Namespace) -> str:
    """Score what is not scored yet, then write rows, summary and curves; return the summary."""
    from rankkv import load_model
    from rankkv.evaluation.results import ResultStore

    if arguments.samples < 1 or arguments.continuation < 2 or min(arguments.lengths) < 1:
        raise ConfigError(
            f"--samples {arguments.samples} and --lengths {min(arguments.lengths)} must be at least 1, and "
            f"--continuation {arguments.continuation} at least 2."
        )
    texts = read_texts(arguments)
    arguments.processes = 1
    fit, also = arguments.fit, arguments.also
    del arguments.fit, arguments.also
    store = ResultStore(arguments.output_dir, {**describe(arguments), "model": Path(arguments.model).name})
    model, tokenizer = load_model(arguments.model)
    for unit, kind, index, start, ids in iterate_contexts(store, tokenizer, texts, arguments):
        length = arguments.lengths[index % len(arguments.lengths)]
        own = ids[:, -(length + arguments.continuation) :]
        first = start + ids.shape[1] - own.shape[1]
        common = {"model": Path(arguments.model).name, "kind": kind, "text": unit, "first_token": first}
        store.write(unit, [{**common, **row} for row in score_context(model, own, arguments)])
    summary = finish(store, arguments, summarize, lambda rows, folder: None)
    if fit is not None:
        rows = [row for folder in [arguments.output_dir, *also] for row in read_rows(folder)]
        write_text_atomically(fit, dump_json(fit_curves(rows)))
    return summary


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a finished run."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(folder / "rows.parquet").to_pylist()


if __name__ == "__main__":
    sys.exit(main(parse=parse_arguments, run=run))
