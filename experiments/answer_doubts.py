"""Does the model doubt the answers that compression has spoiled? Least probability of an answer's tokens.

    python experiments/answer_doubts.py --texts encyclopaedia=wiki.txt --samples 4 --output_dir results/answer_doubts

Each context hides codes and is compressed before any question is known. Each question gets a copy of the cache, and the
model answers it greedily. Of the answers that are right with the full cache: how many of those that are wrong with the
compressed one have a token below `--least`, and how many of those that are still right.
Writes Parquet parts (a run that was killed goes on), `rows.parquet` and `summary.md`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from allocation_ablation import add_text_arguments, describe, finish, iterate_contexts, main, read_texts

from rankkv.errors import ConfigError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Least probability of an answer's tokens, with full and compressed caches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_text_arguments(parser, samples=4, continuation=0)
    add("--selector", default="echo", help="token selection method")
    add("--ratios", type=float, nargs="+", default=[0.06, 0.1], help="fractions of the cache kept")
    add("--least", type=float, default=0.47, help="an answer with a token below this probability is doubtful")
    add("--seed", type=int, default=0, help="where the contexts start, and of the codes")
    add("--output_dir", type=Path, default=Path("results/answer_doubts"), help="where everything goes")
    return parser.parse_args(arguments)


def answer(model: Any, cache: Any, prompt: Any) -> tuple[bool, float]:
    """Answer greedily with as many tokens as the right answer has; return if it is right, and the least probability."""
    import torch

    from rankkv.models.compat import cache_argument

    given, found, probabilities = list(prompt.question_ids), [], []
    with torch.no_grad():
        while len(found) < len(prompt.answer_ids):
            logits = model(torch.tensor(given)[None], use_cache=True, **cache_argument(cache)).logits[0, -1]
            given = [int(logits.argmax())]
            found += given
            probabilities.append(float(logits.float().softmax(-1)[given[0]]))
    return found == list(prompt.answer_ids), min(probabilities)


def score_sample(
    model: Any, tokenizer: Any, sample: Any, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield one row a question and share kept, the full cache's at ratio 1."""
    import torch

    from rankkv.evaluation import record_prefill

    record = record_prefill(model, torch.tensor(sample.context_ids)[None], tokenizer=tokenizer)
    for ratio in (1.0, *arguments.ratios):
        options = {"selector": arguments.selector, "compression_ratio": ratio}
        cache = record.build_full_cache() if ratio == 1.0 else record.build_cache(**options)
        for number, prompt in enumerate(sample.prompts):
            own = record.build_full_cache() if ratio == 1.0 else cache.copy()
            right, least = answer(model, own, prompt)
            yield {"ratio": ratio, "question": number, "right": float(right), "least": least}


def summarize(rows: Sequence[dict[str, Any]], least: float) -> str:
    """Return a Markdown table: a line a share kept."""
    import numpy as np

    right = {(row["text"], row["question"]) for row in rows if row["ratio"] == 1.0 and row["right"]}
    lines = [
        f"### answers that are right with the full cache ({len(right)} of "
        f"{sum(row['ratio'] == 1.0 for row in rows)}, {len({row['text'] for row in rows})} contexts)",
        "",
        f"| kept | wrong | of these below {least:g} | still right | of these below {least:g} | area under the curve |",
        "|---|---|---|---|---|---|",
    ]
    for ratio in sorted({row["ratio"] for row in rows} - {1.0}):
        own = [row for row in rows if row["ratio"] == ratio and (row["text"], row["question"]) in right]
        wrong, kept = (
            np.array([row["least"] for row in own if row["right"] == is_right]) for is_right in (0.0, 1.0)
        )
        shares = [f"{np.mean(group < least):.0%}" if len(group) else "" for group in (wrong, kept)]
        area = f"{(wrong[:, None] < kept[None]).mean():.2f}" if len(wrong) and len(kept) else ""
        lines.append(f"| {ratio:.0%} | {len(wrong)} | {shares[0]} | {len(kept)} | {shares[1]} | {area} |")
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace) -> str:
    """Score what is not scored yet, then write rows and summary; return the summary."""
    from rankkv import load_model
    from rankkv.evaluation.results import ResultStore
    from rankkv.evaluation.tasks import get_task, make_samples

    if arguments.samples < 1:
        raise ConfigError(f"--samples {arguments.samples} must be at least 1.")
    if not 0.0 < arguments.least < 1.0:
        raise ConfigError(f"--least {arguments.least:g} must be a probability in (0, 1).")
    texts = read_texts(arguments)
    arguments.processes = 1
    store = ResultStore(arguments.output_dir, describe(arguments))
    model, tokenizer = load_model(arguments.model)
    for unit, kind, index, start, ids in iterate_contexts(store, tokenizer, texts, arguments):
        (sample,) = make_samples(
            get_task("multi_question"),
            tokenizer,
            tokenizer.decode(ids[0]),
            lengths=[arguments.context * 15 // 16],
            count=1,
            seed=arguments.seed + index,
            question_aware=False,
        )
        rows = score_sample(model, tokenizer, sample, arguments)
        store.write(unit, [{"kind": kind, "text": unit, "first_token": start, **row} for row in rows])
    return finish(
        store, arguments, lambda rows, seed: summarize(rows, arguments.least), lambda rows, folder: None
    )


if __name__ == "__main__":
    sys.exit(main(parse=parse_arguments, run=run))
