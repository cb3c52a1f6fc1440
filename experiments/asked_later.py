"""Compress a document, then ask: codes found, and loss of the text that follows, for each method.

    python experiments/asked_later.py --texts encyclopaedia=wiki.txt --samples 15 --output_dir results/asked_later

Each context hides codes.  It is compressed before any question is known, and each question gets a copy of the cache.
Answers are scored with the right answer given token by token: the mean loss of its tokens, and whether every token is
the most likely one.  The continuation of the same text, without codes, is scored too.  One prefill serves all methods.
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
from rankkv.evaluation.settings import NAMED_STRATEGIES

_EQUAL = {"head_budgets": None, "profile": None}
#: Equal layers, whose heads compete by their scores, as in Ada-KV.
_HEADS = {"strategy": "uniform", "head_budgets": "adaptive", "profile": None}
#: Name of each method, and its options of RankKVCache.  `selector` may be a name with options.
METHODS: dict[str, dict[str, Any]] = {
    "snapkv uniform": {"selector": "snapkv", "strategy": "uniform", **_EQUAL},
    "snapkv pyramid": {"selector": "snapkv", "strategy": "pyramid", **_EQUAL},
    "snapkv cake": {"selector": "snapkv", "strategy": "cake", **_EQUAL},
    "snapkv heads": {"selector": "snapkv", **_HEADS},
    "snapkv default": {"selector": "snapkv", **NAMED_STRATEGIES["default"]},
    "snapkv profile": {"selector": "snapkv", **NAMED_STRATEGIES["auto"]},
    "snapkv global": {"selector": "snapkv", "strategy": "global"},
    "h2o default": {"selector": "h2o", **NAMED_STRATEGIES["default"]},
    "h2o profile": {"selector": "h2o", **NAMED_STRATEGIES["auto"]},
    "h2o global": {"selector": "h2o", "strategy": "global"},
    "expected default": {"selector": "expected_attention", **NAMED_STRATEGIES["default"]},
    "expected global": {"selector": "expected_attention", "strategy": "global"},
    "criticalkv heads": {"selector": "criticalkv", **_HEADS},
    "dropkv heads": {"selector": "dropkv", **_HEADS},
    "dropkv default": {"selector": "dropkv", **NAMED_STRATEGIES["default"]},
    "defensivekv heads": {"selector": "defensivekv", **_HEADS},
    "defensivekv default": {"selector": "defensivekv", **NAMED_STRATEGIES["default"]},
    "capkv default": {"selector": "capkv", **NAMED_STRATEGIES["default"]},
    "compactor heads": {"selector": "compactor", **_HEADS},
    "compactor default": {"selector": "compactor", **NAMED_STRATEGIES["default"]},
    "kvzip kvcompose": {"selector": "kvzip", "strategy": "kvcompose"},
    "kvzip": {"selector": "kvzip"},
    "kvzip plus": {"selector": "kvzip_plus"},
    "echo": {"selector": "echo", "profile": None},
    # With the score weights of the model's profile, where it has them.
    "echo weighed": {"selector": "echo"},
    "echo default": {"selector": "echo", **NAMED_STRATEGIES["default"]},
    "echo profile": {"selector": "echo", **NAMED_STRATEGIES["auto"], "head_budgets": "profile"},
    "echo uniform": {"selector": "echo", "strategy": "uniform", **_EQUAL},
    "echo equal heads": {"selector": "echo", "strategy": "global", "head_budgets": None},
}
TASKS = ("multi_question", "niah_multivalue", "variable_tracking", "quotation")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compress a document, then ask: codes found, and loss of the text that follows.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_text_arguments(parser, samples=4, continuation=128)
    add("--ratios", type=float, nargs="+", default=[0.0625, 0.125, 0.25], help="fractions of the cache kept")
    add(
        "--methods",
        nargs="+",
        default=list(METHODS),
        help="names above, or a selector such as echo:chunk_size=64",
    )
    add("--tasks", nargs="*", default=["multi_question"], choices=TASKS, help="questions asked afterwards")
    add("--question_aware", action="store_true", help="compress each question with the context instead")
    add("--seed", type=int, default=0, help="where the contexts start, of the codes, and of the bootstrap")
    add("--output_dir", type=Path, default=Path("results/asked_later"), help="where everything goes")
    return parser.parse_args(arguments)


def build_method(name: str) -> dict[str, Any]:
    """Return the options of a method: one of the table, or `selector:option=value,... strategy`."""
    from rankkv.selection import get_selector

    if name in METHODS:
        return dict(METHODS[name])
    described, _, strategy = name.partition(" ")
    selector, _, listed = described.partition(":")
    options = {}
    for item in filter(None, listed.split(",")):
        key, _, value = item.partition("=")
        options[key] = int(value) if value.isdigit() else {"True": True, "False": False}.get(value, value)
    more = NAMED_STRATEGIES.get(strategy, {"strategy": strategy}) if strategy else {}
    return {"selector": get_selector(selector, **options), **more}


def build_cells(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return every combination as `method|ratio` and its options of RankKVCache."""
    return {
        f"{name}|{ratio:g}": {**build_method(name), "compression_ratio": ratio}
        for name, ratio in itertools.product(arguments.methods, arguments.ratios)
    }


def score_answer(model: Any, cache: Any, prompt: Any) -> tuple[float, bool]:
    """Return the mean loss of an answer's tokens after the cache, and True if each is the most likely one."""
    import torch

    from rankkv.evaluation.perplexity import predict_tokens

    asked, answer = list(prompt.question_ids), list(prompt.answer_ids)
    # Without a question the context's own last prediction tells the answer's first token, whatever the cache.
    given = asked + answer if asked else answer
    predicted = predict_tokens(model, cache, torch.tensor(given)[None])[:-1]
    told = torch.tensor(answer if asked else answer[1:])
    predicted = predicted[-len(told) :]
    losses = -predicted.gather(-1, told[:, None])[:, 0]
    return float(losses.mean()), bool((predicted.argmax(dim=-1) == told).all())


def score_context(
    model: Any,
    tokenizer: Any,
    ids: Any,
    samples: dict[str, Sequence[Any]],
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield one row a cell, task and question, `full` among the methods."""
    import torch

    from rankkv.evaluation import evaluate_continuation, record_prefill

    cells = build_cells(arguments)

    def name_cell(cell: str) -> dict[str, Any]:
        method, _, ratio = cell.partition("|")
        return {"method": method, "ratio": float(ratio or 1.0)}

    if arguments.continuation > 1:
        record = record_prefill(model, ids[:, : arguments.context], tokenizer=tokenizer)
        scores = evaluate_continuation(record, ids[:, arguments.context :], cells)
        _, full = next(scores)
        yield {**name_cell("full"), "task": "continuation", "loss": full.loss, "right": 0.0, "divergence": 0.0,
               "kept_bytes": full.cache_bytes}  # fmt: skip
        for cell, score in scores:
            yield {
                **name_cell(cell),
                "task": "continuation",
                "loss": score.loss - full.loss,
                "right": 0.0,
                "divergence": score.divergence,
                "kept_bytes": score.cache_bytes,
            }
    for task, made in samples.items():
        for sample in made:
            record = record_prefill(model, torch.tensor(sample.context_ids)[None], tokenizer=tokenizer)
            for cell in ("full", *cells):
                cache = record.build_full_cache() if cell == "full" else record.build_cache(**cells[cell])
                kept_bytes = None if cell == "full" else cache.cache_bytes()
                for number, prompt in enumerate(sample.prompts):
                    last = number + 1 == len(sample.prompts)
                    own = cache if last else record.build_full_cache() if cell == "full" else cache.copy()
                    loss, right = score_answer(model, own, prompt)
                    yield {
                        **name_cell(cell),
                        "task": task,
                        "loss": loss,
                        "right": float(right),
                        "divergence": 0.0,
                        "kept_bytes": kept_bytes,
                    }


def summarize(rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Return a Markdown table for each task: a line a method, a column a share kept."""
    from rankkv.evaluation.statistics import compute_mean

    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        table: Table = {}
        for row in rows:
            if row["task"] == task:
                by_text = table.setdefault((row["method"], row["ratio"]), {})
                by_text.setdefault(row["text"], []).append((row["loss"], row["right"]))
        ratios = sorted({ratio for name, ratio in table if name != "full"})
        texts = sorted(table["full", 1.0])

        def tell(
            name: str, ratio: float, task: str = task, texts: Sequence[str] = texts, table: Any = table
        ) -> str:
            losses, rights = (average(name, ratio, part, table, texts) for part in (0, 1))
            loss, right = compute_mean(losses, seed=seed), compute_mean(rights, seed=seed)
            interval = f"{loss.mean:.3f} [{loss.low:.3f}, {loss.high:.3f}]"
            return interval if task == "continuation" else f"{right.mean:.2f} / {interval}"

        what = (
            "loss above the full cache's, nats per token"
            if task == "continuation"
            else "share of answers right / loss of the answer, nats per token"
        )
        lines += [f"### {task}: {what} ({len(texts)} contexts)", "", f"Full cache: {tell('full', 1.0)}.", ""]
        lines += ["| method | " + " | ".join(f"{100 * ratio:g} % kept" for ratio in ratios) + " |"]
        lines += ["|---|" + "---|" * len(ratios)]
        for name in dict.fromkeys(name for name, _ in table if name != "full"):
            lines.append(f"| {name} | " + " | ".join(tell(name, ratio) for ratio in ratios) + " |")
        lines += ["", *compare(table, task, texts, ratios, seed)]
    return "\n".join(lines)


#: The method that others are compared with, context by context.
REFERENCE = "kvzip"
#: Scores of each context, `(loss, right)` of every question, by method and share kept.
Table = dict[tuple[str, float], dict[str, list[tuple[float, float]]]]


def average(name: str, ratio: float, part: int, table: Table, texts: Sequence[str]) -> list[float]:
    """Return each context's mean over its questions: of the losses (part 0) or of the right answers (part 1)."""
    scores = table[name, ratio]
    return [sum(score[part] for score in scores[text]) / len(scores[text]) for text in texts]


def compare(
    table: Table, task: str, texts: Sequence[str], ratios: Sequence[float], seed: int
) -> Iterator[str]:
    """Yield the lines of a table of paired differences to the reference, if that was run at all."""
    from rankkv.evaluation.statistics import compute_mean

    names = [name for name in dict.fromkeys(name for name, _ in table) if name not in ("full", REFERENCE)]
    if (REFERENCE, ratios[0]) not in table or not names:
        return
    yield f"Difference to {REFERENCE}, paired by context:"
    yield ""
    yield "| method | " + " | ".join(f"{100 * ratio:g} % kept" for ratio in ratios) + " |"
    yield "|---|" + "---|" * len(ratios)
    for name in names:
        cells = []
        for ratio in ratios:
            parts = []
            for part, digits in ((1, 2), (0, 3)):
                pairs = zip(
                    *(average(who, ratio, part, table, texts) for who in (name, REFERENCE)), strict=True
                )
                parts.append(compute_mean([own - other for own, other in pairs], seed=seed).show(digits, "+"))
            cells.append(parts[1] if task == "continuation" else " / ".join(parts))
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""


def run(arguments: argparse.Namespace) -> str:
    """Score what is not scored yet, then write rows and summary; return the summary."""
    from rankkv import load_model
    from rankkv.evaluation.results import ResultStore
    from rankkv.evaluation.tasks import get_task, make_samples

    if arguments.samples < 1:
        raise ConfigError(f"--samples {arguments.samples} must be at least 1.")
    texts = read_texts(arguments)
    arguments.processes = 1
    store = ResultStore(arguments.output_dir, describe(arguments))
    model, tokenizer = load_model(arguments.model)
    for unit, kind, index, start, ids in iterate_contexts(store, tokenizer, texts, arguments):
        samples = {
            task: make_samples(
                get_task(task),
                tokenizer,
                tokenizer.decode(ids[0]),
                lengths=[arguments.context * 15 // 16],
                count=1,
                seed=arguments.seed + index,
                question_aware=arguments.question_aware,
            )
            for task in arguments.tasks
        }
        rows = score_context(model, tokenizer, ids, samples, arguments)
        store.write(unit, [{"kind": kind, "text": unit, "first_token": start, **row} for row in rows])
    return finish(store, arguments, summarize, lambda rows, folder: None)


if __name__ == "__main__":
    sys.exit(main(parse=parse_arguments, run=run))
