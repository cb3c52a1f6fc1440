"""Evict while 1,024 tokens are decoded: drift from the full cache, and answers that need tokens far back.

    python experiments/decode_drift.py --samples 2 --budgets 128 256 --output_dir results/decode_drift

Two kinds of traces are made by a seed, as a reasoning model might write them. In *tracking*, things move between
places, and every few lines one is asked for. In *arithmetic*, five variables grow by small numbers, and each line first
repeats the last value. A trace is given token by token behind a short prompt, so all methods decode the same text.
Measured for each token: the Kullback-Leibler divergence of the prediction from the full cache's. An answer is right if
each of its tokens is the most likely one. All rows of a method are one left-padded batch. A method is a selector, whose
layers and heads have equal budgets, or a selector and `default` or `profile`: the default of RankKVCache, without or
with the model's profile. Writes Parquet parts (a run that was killed goes on), `rows.parquet` and `summary.md` with
95 % intervals over traces.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocation_ablation import finish, main
from tqdm import tqdm

from rankkv.errors import ConfigError
from rankkv.evaluation.settings import NAMED_STRATEGIES

METHODS = (
    "streaming_llm", "snapkv", "snapkv default", "snapkv profile", "h2o", "tova", "keydiff", "dropkv", "r_kv",
    "triattention",
)  # fmt: skip
#: Options of RankKVCache by the word behind a selector.
BUDGETS: dict[str, dict[str, Any]] = {
    "": {"strategy": "uniform", "head_budgets": None, "profile": None},
    "default": NAMED_STRATEGIES["default"],
    "profile": NAMED_STRATEGIES["auto"],
}
PROMPTS = {
    "tracking": "Each line moves one thing to a place. Some lines say where a thing is now.\n",
    "arithmetic": "Each line repeats the last value of a letter, adds a number, and says the new value.\n",
}
#: Fewest tokens of a trace, so that each has an answer.
FEWEST = 64
THINGS = ("ball", "book", "coin", "key", "lamp", "ring")
PLACES = ("attic", "barn", "cellar", "garden", "hall", "kitchen", "office", "school")


@dataclass(frozen=True)
class Trace:
    """Token ids of a prompt and of what follows it, and the spans of answers in the latter."""

    prompt: list[int]
    ids: list[int]
    answers: list[tuple[int, int]]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evict while tokens are decoded: drift from the full cache, and answers right.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="embedded", help="hub id, local folder, or embedded")
    add(
        "--methods",
        nargs="+",
        default=list(METHODS),
        help="selectors, or 'SELECTOR default', 'SELECTOR profile'",
    )
    add("--budgets", type=int, nargs="+", default=[128, 256], help="tokens that each layer keeps")
    add("--interval", type=int, default=32, help="tokens between two compressions")
    add("--tokens", type=int, default=1024, help="tokens decoded")
    add("--samples", type=int, default=2, help="traces of each kind")
    add("--seed", type=int, default=0, help="of the traces and of the bootstrap")
    add("--output_dir", type=Path, default=Path("results/decode_drift"), help="where everything goes")
    return parser.parse_args(arguments)


def write_tracking(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield pieces of text, each with the answer that follows it or nothing."""
    places: dict[str, str] = {}
    while True:
        thing = draw.choice(THINGS)
        if thing in places and draw.random() < 0.35:
            yield f"Now the {thing} is in the", f" {places[thing]}"
            yield ".\n", ""
        else:
            places[thing] = draw.choice([place for place in PLACES if place != places.get(thing)])
            yield f"The {thing} goes to the {places[thing]}.\n", ""


def write_arithmetic(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield pieces of text, each with the answer that follows it or nothing."""
    values = {letter: draw.randint(1, 9) for letter in "abcde"}
    for letter, value in values.items():
        yield f"{letter} is {value}.\n", ""
    while True:
        letter, more = draw.choice(list(values)), draw.randint(1, 9)
        yield f"{letter} was", f" {values[letter]}"
        yield f". {values[letter]} + {more} =", f" {values[letter] + more}"
        values[letter] += more
        yield f". {letter} is {values[letter]}.\n", ""


WRITERS = {"tracking": write_tracking, "arithmetic": write_arithmetic}


def make_trace(tokenizer: Any, kind: str, seed: int, tokens: int) -> Trace:
    """Make a trace of exactly ``tokens`` tokens behind its prompt; answers cut at the end are left out."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids: list[int] = []
    answers: list[tuple[int, int]] = []
    for text, answer in WRITERS[kind](random.Random(f"{kind} {seed}")):
        ids += encode(text)
        if answer:
            told = encode(answer)
            answers.append((len(ids), len(ids) + len(told)))
            ids += told
        if len(ids) >= tokens:
            break
    return Trace(encode(PROMPTS[kind]), ids[:tokens], [span for span in answers if span[1] <= tokens])


def predict_all(model: Any, traces: Sequence[Trace]) -> list[Any]:
    """Return the full cache's log-probabilities after each token of each trace, ``[token, vocabulary]``."""
    import torch

    from rankkv.models.placement import find_input_device

    found = []
    for trace in traces:
        ids = torch.tensor([trace.prompt + trace.ids], device=find_input_device(model))
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(trace.prompt) :]
        found.append(logits.float().log_softmax(dim=-1))
    return found


def decode(model: Any, cache: Any, traces: Sequence[Trace]) -> Iterator[Any]:
    """Prefill the prompts, give the traces one token at a time, and yield log-probabilities ``[row, vocabulary]``."""
    import torch

    from rankkv.models.compat import cache_argument
    from rankkv.models.placement import find_input_device

    device = find_input_device(model)
    width = max(len(trace.prompt) for trace in traces)
    ids = torch.tensor([[0] * (width - len(t.prompt)) + t.prompt for t in traces], device=device)
    mask = torch.tensor([[0] * (width - len(t.prompt)) + [1] * len(t.prompt) for t in traces], device=device)
    for step in range(len(traces[0].ids) + 1):
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **cache_argument(cache),
            )
        if step:
            yield output.logits[:, -1].float().log_softmax(dim=-1)
        if step < len(traces[0].ids):
            ids = torch.tensor([[trace.ids[step]] for trace in traces], device=device)
            mask = torch.cat([mask, mask.new_ones(len(traces), 1)], dim=-1)


def score_method(
    predictions: Iterator[Any], traces: Sequence[Trace], full: Sequence[Any]
) -> list[tuple[float, float]]:
    """Return for each trace the mean divergence from the full cache, and the share of answers right."""
    import torch

    drift = [0.0] * len(traces)
    likeliest: list[list[int]] = [[] for _ in traces]
    for step, predicted in enumerate(predictions):
        for row, known in enumerate(full):
            wanted = known[step].to(predicted.device)
            drift[row] += float((wanted.exp() * (wanted - predicted[row])).sum())
        for row, token in enumerate(predicted.argmax(dim=-1).tolist()):
            likeliest[row].append(token)
    scores = []
    for trace, total, tokens in zip(traces, drift, likeliest, strict=True):
        right = [tokens[start - 1 : stop - 1] == trace.ids[start:stop] for start, stop in trace.answers]
        scores.append((total / len(trace.ids), float(torch.tensor(right).float().mean())))
    return scores


def build_selector(name: str, model: Any, tokenizer: Any, folder: str) -> Any:
    """Return a selector; the centres of TriAttention are calibrated on the first half of the Python documentation."""
    from rankkv import load_texts
    from rankkv.calibration import compute_query_centres, save_query_centres
    from rankkv.selection import get_selector

    selector = get_selector(name)
    if not selector.required:
        return selector
    path = Path(folder) / "centres.json"
    if not path.exists():
        whole = "\n\n".join(load_texts("python-docs"))
        ids = tokenizer(whole[: len(whole) // 2], return_tensors="pt", verbose=False).input_ids[0]
        save_query_centres(compute_query_centres(model, ids.split(1024)[:8]), path)
    return get_selector(name, centres=str(path))


def summarize(rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Return a Markdown table for each kind: a line a method, columns for each budget."""
    from rankkv.evaluation.statistics import compute_mean

    lines = []
    budgets = sorted({row["budget"] for row in rows if row["method"] != "full"})
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        full = [row["right"] for row in own if row["method"] == "full"]
        lines += [f"### {kind}: divergence from the full cache, nats per token / share of answers right", ""]
        lines += [f"Traces: {len(full)}. Full cache: {sum(full) / len(full):.2f} right.", ""]
        lines += ["| method | " + " | ".join(f"{budget} tokens" for budget in budgets) + " |"]
        lines += ["|---|" + "---|" * len(budgets)]
        for method in dict.fromkeys(row["method"] for row in own if row["method"] != "full"):
            cells = []
            for budget in budgets:
                found = [row for row in own if (row["method"], row["budget"]) == (method, budget)]
                drift = compute_mean([row["divergence"] for row in found], seed=seed)
                right = sum(row["right"] for row in found) / len(found)
                cells.append(f"{drift.mean:.3f} [{drift.low:.3f}, {drift.high:.3f}] / {right:.2f}")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> str:
    """Score what is not scored yet, then write rows and summary; return the summary."""
    from rankkv import RankKVCache, load_model
    from rankkv.evaluation.results import ResultStore

    if arguments.samples < 1 or arguments.tokens < FEWEST:
        raise ConfigError(
            f"--samples {arguments.samples} must be at least 1, and --tokens {arguments.tokens} at least {FEWEST}."
        )
    unknown = [name for name in arguments.methods if name.partition(" ")[2] not in BUDGETS]
    if unknown:
        raise ConfigError(
            f"--methods {unknown[0]!r} must be a selector, or one followed by default or profile."
        )
    config = {key: value for key, value in vars(arguments).items() if key != "output_dir"}
    store = ResultStore(arguments.output_dir, config)
    model, tokenizer = load_model(arguments.model)
    named = [(kind, index) for kind in WRITERS for index in range(arguments.samples)]
    traces = [make_trace(tokenizer, kind, arguments.seed + index, arguments.tokens) for kind, index in named]
    full = predict_all(model, traces)

    def write(
        unit: str, method: str, budget: int, scores: Sequence[tuple[float, float]], share: float
    ) -> None:
        rows = [
            {"method": method, "budget": budget, "kind": kind, "text": f"{kind}-{index:03d}",
             "divergence": drift, "right": right, "kept_share": share}
            for (kind, index), (drift, right) in zip(named, scores, strict=True)
        ]  # fmt: skip
        store.write(unit, rows)

    if not store.is_done("full"):
        plain = ([table[step] for table in full] for step in range(arguments.tokens))
        write("full", "full", 0, score_method(_stack(plain), traces, full), 1.0)
    units = [(method, budget) for budget in arguments.budgets for method in arguments.methods]
    with tempfile.TemporaryDirectory() as folder:
        for method, budget in tqdm(units, unit="method", disable=None):
            unit = f"{method}-{budget}"
            if store.is_done(unit):
                continue
            selector, _, budgets = method.partition(" ")
            cache = RankKVCache(
                model,
                budget=budget,
                selector=build_selector(selector, model, tokenizer, folder),
                decode="periodic",
                decode_interval=arguments.interval,
                **BUDGETS[budgets],
            )
            scores = score_method(decode(model, cache, traces), traces, full)
            write(unit, method, budget, scores, cache.kept_bytes() / cache.full_cache_bytes())
    return finish(store, arguments, summarize, lambda rows, folder: None)


def _stack(steps: Iterator[list[Any]]) -> Iterator[Any]:
    import torch

    return (torch.stack(rows) for rows in steps)


if __name__ == "__main__":
    sys.exit(main(parse=parse_arguments, run=run))
