"""Ways to compress and to generate, as JSON-ready cases that `sharded_program.run` runs on any model."""

from __future__ import annotations

from typing import Any

import torch

from rankkv.budget.strategies import STRATEGIES
from rankkv.rank.aggregation import AGGREGATIONS
from rankkv.selection import SELECTORS

PROMPT_TOKENS = 150
#: Ids in the prompts are below it.
VOCAB_SIZE = 96
EVERY_STRATEGY = sorted(set(STRATEGIES) - {"profile", "blend"})


def make_cases() -> dict[str, dict[str, Any]]:
    """Return options by name: every selector, strategy, scope, way to join heads, and way to generate."""
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(3, VOCAB_SIZE, (2, PROMPT_TOKENS), generator=generator)
    common: dict[str, Any] = {"compression_ratio": 0.3, "min_budget": 8, "window_size": 16, "profile": None}

    def case(rows: int = 1, generate: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        made = {"options": {**common, **options}, "input_ids": prompt[:rows].tolist()}
        return made if generate is None else {**made, "generate": generate}

    # Long enough for texts to part where caches do.
    longer = {"max_new_tokens": 24}
    padded = case(rows=2)
    padded["attention_mask"] = [[1] * PROMPT_TOKENS, [0] * 40 + [1] * (PROMPT_TOKENS - 40)]
    return {
        **{
            f"selector {name}": case(selector=name)
            for name, selector in SELECTORS.items()
            if not selector.replays and not selector.required
        },
        **{f"strategy {name}": case(strategy=name) for name in EVERY_STRATEGY},
        **{
            f"{scope} {name}": case(strategy="power", scope=scope, aggregation=name)
            for scope in ("evictable", "window", "full")
            for name in AGGREGATIONS
        },
        "snapkv text": case(selector="snapkv", generate=longer),
        "h2o text": case(selector="h2o", generate=longer),
        "padded": padded,
        "beams": case(rows=2, generate={"num_beams": 3}),
        "sampling": case(generate={**longer, "do_sample": True}),
        "bounded": case(decode="bounded", generate=longer),
        "periodic": case(decode="periodic", decode_interval=4, generate=longer),
        "packed": case(positions="packed"),
        "int8": case(storage="int8"),
        "offload": case(storage="offload"),
        "chunked": case(prefill="chunked"),
        "lookup": case(generate={"prompt_lookup_num_tokens": 3}),
        "all kept": case(compression_ratio=1.0),
        "head budgets": case(head_budgets="adaptive"),
    }
