"""Random generation calls: any family, prompt, option and way of generating, checked against what must always hold.

``python tests/support/soak.py --calls 200 --seed 0`` prints how many ran; the slow tests run the same.
"""

from __future__ import annotations

import argparse
import itertools
import random
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import families
import oracles
import torch

from rankkv import RankKVCache
from rankkv.budget_allocation import STRATEGIES
from rankkv.cache.head_budget_layer import HeadBudgetLayer
from rankkv.config import FLOOR_TOKENS, GLOBAL_FLOOR_TOKENS
from rankkv.errors import UnsupportedModelError
from rankkv.models.compat import cache_argument
from rankkv.rank.aggregation import AGGREGATIONS
from rankkv.selection import get_selector

#: Options with which a family may refuse by name: what they need is not there in every model.
_MAY_BE_REFUSED = (
    ("positions", "packed"),
    ("prefill", "chunked"),
    ("decode", "periodic"),
    ("decode", "bounded"),
    # Echo turns queries: a model without rotary embedding is refused.
    ("selector", "echo"),
)


@dataclass(frozen=True)
class Call:
    """One random call: everything that reproduces it."""

    number: int
    family: str
    backend: str
    lengths: tuple[int, ...]
    options: dict[str, Any]
    chunk: int | None
    beams: int
    new_tokens: int

    def prompts(self) -> list[torch.Tensor]:
        return [oracles.random_prompt(n, seed=1000 * self.number + n) for n in self.lengths]


@dataclass
class Report:
    """What a soak came to."""

    ran: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.ran} calls, {sum(self.refused.values())} refused by name, {len(self.failures)} failures"
        ]
        lines += [f"  checked {count:4d} times: {name}" for name, count in self.checks.most_common()]
        lines += [f"  refused {count:4d} times: {name}" for name, count in self.refused.most_common()]
        return "\n".join(lines + self.failures)


def draw_call(number: int, seed: int) -> Call:
    """Draw one call; the same for the same number and seed."""
    draw = random.Random(seed * 1_000_003 + number)
    known = [
        name for name, family in families.FAMILIES.items() if family.exists and family.outcome == "compressed"
    ]
    name = draw.choice(known)
    lengths = tuple(
        draw.choice((1, 2, 5, draw.randint(1, 60), draw.randint(1, 300))) for _ in range(draw.randint(1, 3))
    )
    prefill = draw.choice(("single", "single", "chunked", "streaming"))
    options: dict[str, Any] = {
        "compression_ratio": draw.choice((1.0, 0.9, 0.5, 0.3, 0.1, 0.02)),
        "selector": draw.choice(sorted(oracles.ONE_PASS)),
        "strategy": draw.choice((None, *sorted(STRATEGIES))),
        "scope": draw.choice(
            ("evictable", "window") if prefill == "chunked" else ("evictable", "window", "full")
        ),
        "aggregation": draw.choice(sorted(AGGREGATIONS)),
        "window_size": draw.choice((1, 8, 32, 64)),
        "sink_size": draw.choice((0, 4, 9)),
        "decode": draw.choice(("grow", "grow", "bounded", "periodic")),
        "decode_interval": draw.choice((1, 3, 8)),
        "positions": draw.choice(("original", "original", "packed")),
        "prefill": prefill,
        "storage": draw.choice(("full", "full", "int8", "offload")),
        "min_budget": draw.choice((None, None, 1, 7)),
        "protect": draw.choice((None, None, [(2, 9)], [(0, 3), (30, 41)])),
    }
    by_scores = options["strategy"] is not None and STRATEGIES[options["strategy"]].by_scores
    if by_scores and not get_selector(options["selector"]).comparable:
        # Refused by name before anything runs; another test says so.
        options["strategy"] = "uniform"
    chunk = None
    if prefill != "single":
        # A last chunk of one token cannot be told from a decode step.
        fitting = [size for size in range(2, max(lengths) + 2) if max(lengths) % size != 1]
        chunk = draw.choice(fitting) if fitting else None
    return Call(
        number=number,
        family=name,
        # What else a backend needs, such as a compiler, is not the subject here.
        backend=draw.choice([b for b in families.FAMILIES[name].backends if b in ("sdpa", "eager")]),
        lengths=lengths,
        options=options,
        chunk=chunk,
        beams=draw.choice((1, 1, 1, 2)),
        new_tokens=draw.randint(2, 14),
    )


def _generate(model: Any, call: Call, ids: Any, mask: Any, cache: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=call.new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=oracles.PAD,
        num_beams=call.beams,
        prefill_chunk_size=call.chunk,
        return_dict_in_generate=True,
        output_logits=True,
        **cache_argument(cache),
    )


def _expected_total(call: Call, length: int, layers: int) -> int:
    options = call.options
    total = round(options["compression_ratio"] * length * layers)
    bounded = options["decode"] == "bounded"
    strategy = options["strategy"] or get_selector(options["selector"]).strategy
    by_scores = strategy is not None and STRATEGIES[strategy].by_scores
    usual = (
        max(GLOBAL_FLOOR_TOKENS, 16 + options["sink_size"], int(0.2 * total / layers))
        if by_scores
        else max(FLOOR_TOKENS, total // layers // 2)
    )
    floor = options["min_budget"] or usual
    spanned = len({i for start, stop in options["protect"] or () for i in range(start, min(stop, length))})
    floor = max(floor, spanned + FLOOR_TOKENS) if spanned else floor
    if bounded:
        return max(total, floor * layers)
    return min(max(total, min(floor, length) * layers), length * layers)


def _kept_of_row(cache: RankKVCache, row: int, ids: Any = None, mask: Any = None) -> list[list[list[int]]]:
    padding = 0 if ids is None else ids.shape[1] - int(mask[row].sum())
    return [
        [[p - padding for p in head if p >= padding] for head in oracles.kept_positions(cache, index)[row]]
        for index in cache.layer_indices
    ]


def run_call(call: Call, report: Report) -> None:
    """Run one call and check it; raises where something does not hold."""
    model = families.build(call.family, call.backend)
    ids, mask = oracles.left_pad(call.prompts())
    options = call.options
    cache = RankKVCache(model, **options)
    output = _generate(model, call, ids, mask, cache)
    text = output.sequences[:, ids.shape[1] :]

    def check(name: str, holds: bool) -> None:
        report.checks[name] += 1
        assert holds, name

    check("logits are finite", all(bool(torch.isfinite(step).all()) for step in output.logits))
    check("tokens seen", cache.seen_tokens == ids.shape[1] + call.new_tokens - 1)
    everything = options["compression_ratio"] == 1.0 and options["decode"] != "bounded"
    # Chunks of a streaming prefill see those before them as they are stored.
    exact = options["prefill"] != "streaming" or (everything and options["storage"] != "int8")
    plain = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=call.new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=oracles.PAD,
        num_beams=call.beams,
        use_cache=True,
        # Some hybrids do not go on exactly from one chunk to the next themselves.
        prefill_chunk_size=call.chunk,
    )[:, ids.shape[1] :]
    if exact and call.beams == 1:
        check("the first token is the plain model's", torch.equal(text[:, 0], plain[:, 0]))
    if everything and options["storage"] != "int8":
        check("everything kept changes no token", torch.equal(text, plain))

    # A row is treated as if it were alone; chunks of another length may differ in the last bits.
    if len(call.lengths) > 1 and call.beams == 1 and options["prefill"] == "single":
        row = call.number % len(call.lengths)
        alone = RankKVCache(model, **options)
        _generate(model, call, call.prompts()[row], None, alone)
        check(
            "a row keeps what it keeps alone", _kept_of_row(cache, row, ids, mask) == _kept_of_row(alone, 0)
        )

    layers = len(cache.layer_indices)
    for plan, budgets in zip(cache.plans, cache.budgets_per_row, strict=True):
        check("budgets sum to the total", sum(budgets) == plan.total_budget)
    once = options["decode"] != "periodic" and options["prefill"] != "streaming" and call.beams == 1
    # A threshold sets the total itself.
    if once and options["strategy"] != "threshold":
        for length, budgets in zip(call.lengths, cache.budgets_per_row, strict=True):
            check("the total is the ratio's", sum(budgets) == _expected_total(call, length, layers))
    if cache.budgets_per_row:
        widest = [max(column) for column in zip(*cache.budgets_per_row, strict=True)]
        most = {"grow": call.new_tokens, "periodic": options["decode_interval"], "bounded": 0}[
            options["decode"]
        ]
        kept = [cache.kept_lengths[index] for index in cache.layer_indices]
        padded = len(set(call.lengths)) > 1 and max(call.lengths) <= max(widest)
        if not padded:
            within = all(n <= budget + most for n, budget in zip(kept, widest, strict=True))
            check("no more is kept than the budgets say", within)

    for index in cache.layer_indices:
        layer, slots = cache.layers[index], cache.kept_lengths[index]
        # Room for tokens to come is held beside the tokens, and counted as such.
        room = layer.room_bytes
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.held()}
        keys, values = layer.keys, layer.values
        # Heads that keep different numbers of tokens are padded to the longest only when they are asked for.
        packed = sum(map(sum, layer.kept_per_head)) if isinstance(layer, HeadBudgetLayer) else None
        whole = keys.shape[-2] == values.shape[-2]
        check("slots are what is held", whole and (packed is not None or keys.shape[-2] == slots))
        expected = 0
        for states in (keys, values):
            numbers = states.numel() if packed is None else packed * states.shape[-1]
            expected += (
                numbers + 4 * numbers // states.shape[-1] if options["storage"] == "int8" else 4 * numbers
            )
        check("bytes are the arithmetic", sum(stored.values()) == expected + room)
        for heads in oracles.kept_positions(cache, index):
            for head in heads:
                check("positions ascend", all(a < b for a, b in itertools.pairwise(head)))
                if min(min(row) for row in cache.budgets_per_row) > 1:
                    # A budget of one token has no half for the newest.
                    check("the newest token is kept", head[-1] == cache.seen_tokens - 1)


def run_soak(calls: int = 200, seed: int = 0, stop_early: bool = False) -> Report:
    """Run ``calls`` random calls and report."""
    report = Report()
    for number in range(calls):
        call = draw_call(number, seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_call(call, report)
            report.ran += 1
        except UnsupportedModelError as error:
            report.ran += 1
            if any(call.options[name] == value for name, value in _MAY_BE_REFUSED):
                report.refused[f"{call.family}: {error}"] += 1
            else:
                report.failures.append(f"{call}: refused without reason: {error}")
        except Exception as error:
            report.ran += 1
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            report.failures.append(f"{call}: {type(error).__name__}: {error}\n{where}")
            if stop_early:
                break
    return report


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = run_soak(options.calls, options.seed)
    print(report)
    raise SystemExit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
