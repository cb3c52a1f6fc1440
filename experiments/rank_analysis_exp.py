"""Effective rank of every layer over samples of a data set, and the budgets each strategy makes of it.

    python experiments/rank_analysis_exp.py --model embedded --dataset python-docs --num_samples 4

Writes `rank_analysis.json` and, under `figures/`, the rank per layer with error bars and the budgets per
strategy.  Started by `accelerate launch` or `torchrun`, each process analyzes its share of the samples, and the
first one writes.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rankkv.cli.common import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    collect_versions,
    format_error,
    write_json,
)
from rankkv.errors import ConfigError, InputError, RankKVError
from rankkv.utils.processes import find_own_device, is_main_process, split_samples

# The method's four strategies, then the baselines. "power" with its exponent 1 would be "proportional" again.
STRATEGIES: dict[str, dict[str, Any]] = {
    "proportional": {},
    "softmax": {},
    "adaptive": {},
    "power": {"exponent": 4.0},
    "uniform": {},
    "pyramid": {},
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Effective rank of every layer over samples, and the budgets each strategy makes of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag: str, **options: Any) -> None:
        names = [flag] if "_" not in flag else [flag, flag.replace("_", "-")]
        parser.add_argument(*names, **options)

    add("--model", default="embedded", help="hub id, local folder, GGUF file, or embedded")
    add(
        "--dataset", default="python-docs", help="python-docs, wikitext, or the path of a .txt or .jsonl file"
    )
    add("--num_samples", type=int, default=10, help="samples to analyze")
    add("--max_length", type=int, default=1024, help="tokens of each sample")
    add("--scope", default="evictable", help="attention ranked: evictable, window or full")
    add("--aggregation", default="concat", help="how the heads of a layer are joined")
    add("--strategy", default=None, help="strategy of the samples' budgets; None: the default")
    add("--compression_ratio", type=float, default=0.3, help="fraction of the KV cache kept, in (0, 1]")
    add("--seed", type=int, default=0, help="seed of the choice of samples")
    add("--output_dir", type=Path, default=Path("results"), help="where rank_analysis.json and figures/ go")
    return parser.parse_args(arguments)


def cut_samples(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Cut texts into pieces of exactly ``max_length`` tokens that do not overlap.

    A text shorter than that is joined, in order, with the short ones after it (a blank line between them)
    until they are long enough; what is left over at the end of a text is dropped.  Every piece starts with
    the tokenizer's beginning-of-sequence token if prompts of this tokenizer do.
    """
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else []
    size = max_length - len(prefix)
    if size < 1:
        raise ConfigError(f"--max_length is {max_length}, which leaves no room for text; give at least 2.")

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    pieces: list[list[int]] = []
    gap, waiting = tokenize("\n\n"), list[int]()
    for text in texts:
        ids = tokenize(text.strip())
        if len(ids) < size:
            waiting += (gap if waiting else []) + ids
            if len(waiting) < size:
                continue
            ids, waiting = waiting, []
        pieces += [prefix + ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    return pieces


def choose_samples(pieces: list[list[int]], num_samples: int, max_length: int, seed: int) -> list[int]:
    """Draw the indices of ``num_samples`` different pieces, ascending."""
    if len(pieces) < num_samples:
        raise InputError(
            f"the data set gives {len(pieces)} samples of {max_length} tokens but --num_samples asks for "
            f"{num_samples}: lower one of the two, or give more text."
        )
    return sorted(random.Random(seed).sample(range(len(pieces)), num_samples))


def allocate_all(
    config: Any, ranks: list[float], length: int, layer_indices: list[int]
) -> dict[str, list[int]]:
    """Return what each of STRATEGIES makes of the same ranks, under the same total and bounds."""
    from rankkv.budget.plan import BudgetPlan
    from rankkv.config import RankKVConfig

    budgets = {}
    for name, options in STRATEGIES.items():
        plan = BudgetPlan(
            RankKVConfig(config.compression_ratio, strategy=name, strategy_options=options),
            length,
            layer_indices,
        )
        for rank in ranks:
            plan.add_layer(rank)
        budgets[label(name, options)] = plan.finish()
    return budgets


def measure_default_budgets(model: Any, samples: list[list[int]], compression_ratio: float) -> list[float]:
    """Return the budget of every layer, mean over the samples, that the default gives without a profile.

    The default measures eviction errors on each prompt, so no mean rank can stand for them.
    """
    import torch

    from rankkv import compress

    budgets = [
        compress(
            model, torch.tensor([ids], device=model.device), compression_ratio=compression_ratio, profile=None
        ).budgets
        for ids in samples
    ]
    return [sum(own) / len(own) for own in zip(*budgets, strict=True)]


def compute_intervals(samples: list[list[float]]) -> tuple[list[float], list[float]]:
    """Return the bounds of the 95 % t interval of every layer's mean, `[sample][layer]` in.

    One sample has no interval: both bounds are its value.
    """
    from math import sqrt
    from statistics import fmean, stdev

    from scipy.stats import t

    low, high = [], []
    for own in zip(*samples, strict=True):
        spread = t.ppf(0.975, len(own) - 1) * stdev(own) / sqrt(len(own)) if len(own) > 1 else 0.0
        low.append(fmean(own) - spread)
        high.append(fmean(own) + spread)
    return low, high


def label(strategy: str, options: dict[str, Any]) -> str:
    return " ".join([strategy, *(f"({name} {value:g})" for name, value in options.items())])


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Path]] | None:
    """Analyze the samples, write record and figures, and return the record and all paths written.

    Of several processes each does its share, and all but the first return None.
    """
    for flag in ("num_samples", "max_length"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} is {getattr(arguments, flag)} but must be at least 1.")

    import torch

    from rankkv import RankKVAnalyzer, RankKVConfig, load_model, load_texts
    from rankkv.budget.plan import BudgetPlan
    from rankkv.evaluation.results import describe_origin
    from rankkv.pipeline import analyze_samples, summarize_layers
    from rankkv.plots.style import new_figure
    from rankkv.rank.aggregation import get_aggregation

    # All that can be wrong with the options shows before a model loads.
    config = RankKVConfig(arguments.compression_ratio, strategy=arguments.strategy, scope=arguments.scope)
    BudgetPlan.check(config)
    get_aggregation(arguments.aggregation)
    new_figure(1, 1)
    main = is_main_process()
    if main:
        print(f"Loading {arguments.dataset} and {arguments.model} ...", file=sys.stderr)
    texts = load_texts(arguments.dataset)
    model, tokenizer = load_model(arguments.model, device_map=find_own_device())
    torch.manual_seed(arguments.seed)

    pieces = cut_samples(tokenizer, texts, arguments.max_length)
    chosen = choose_samples(pieces, arguments.num_samples, arguments.max_length, arguments.seed)
    if main:
        print(
            f"{len(texts)} texts make {len(pieces)} samples of {arguments.max_length} tokens "
            f"(short texts joined, the rest of a long one dropped); "
            f"{len(chosen)} of them drawn with seed {arguments.seed}.",
            file=sys.stderr,
        )
    strategy, options = config.resolve_strategy()
    analyzer = RankKVAnalyzer(
        model,
        arguments.model,
        strategy=strategy,
        scope=arguments.scope,
        aggregation=arguments.aggregation,
        strategy_options=options,
    )
    with tqdm(
        total=len(split_samples(chosen)),
        file=sys.stderr,
        # A line for each redraw is too much where lines cannot be redrawn.
        mininterval=0.2 if sys.stderr.isatty() else 5,
        bar_format="{percentage:3.0f}% {bar:20} {n:.1f}/{total} samples, {elapsed} gone, {remaining} left",
        disable=not main,
    ) as bar:
        results = analyze_samples(
            analyzer,
            [torch.tensor([pieces[index]]) for index in chosen],
            arguments.compression_ratio,
            on_progress=lambda done, _: bar.update(done - bar.n),
        )
    if not main:
        return None

    layers = summarize_layers(results)
    layer_indices = results[0].layer_indices
    mean_ranks = [row["rank_mean"] for row in layers]
    by_strategy = allocate_all(config, mean_ranks, arguments.max_length, layer_indices)
    by_strategy["default"] = measure_default_budgets(
        model, [pieces[index] for index in chosen], arguments.compression_ratio
    )
    record = {
        "arguments": {**vars(arguments), "output_dir": str(arguments.output_dir)},
        "versions": {**collect_versions(), **describe_origin()},
        "seed": arguments.seed,
        "strategy": strategy,
        "strategy_options": options,
        "sampling": {
            "texts": len(texts),
            "pieces": len(pieces),
            "rule": "texts cut into pieces of max_length tokens without overlap, shorter ones joined; "
            "pieces drawn without replacement",
        },
        "layers": layers,
        "samples": [
            {"sample": place, "piece": index, **result.to_dict()}
            for place, (index, result) in enumerate(zip(chosen, results, strict=True))
        ],
        "budgets_by_strategy": by_strategy,
    }
    written = [write_json(arguments.output_dir / "rank_analysis.json", record)]
    return record, [*written, *draw(record, arguments.output_dir)]


def draw(record: dict[str, Any], folder: Path, source: str = "") -> list[Path]:
    """Draw the rank of every layer with 95 % intervals over samples, and the budgets of every strategy."""
    from rankkv.plots import name_budgets, name_model, plot_layer_ranks, plot_strategy_budgets, save_figure
    from rankkv.plots.style import format_share

    arguments, samples = record["arguments"], record["samples"]
    layers = [row["layer"] for row in record["layers"]]
    means = [row["rank_mean"] for row in record["layers"]]
    model, text = name_model(Path(arguments["model"]).name), Path(arguments["dataset"]).name
    some = f"{len(samples)} samples of {arguments['max_length']:,} tokens of {text}"
    tail = f", {source}" if source else ""
    ranks = plot_layer_ranks(
        means,
        *compute_intervals([sample["layer_ranks"] for sample in samples]),
        layers,
        title=f"Effective rank of each layer: {model}\n"
        f"{arguments['scope']} attention, mean over {some} with 95 % intervals{tail}",
    )
    named = {}
    # The default comes first: the others are what it is compared with.
    for name, budgets in sorted(record["budgets_by_strategy"].items(), key=lambda item: item[0] != "default"):
        strategy, _, options = name.partition(" ")
        named[f"{name_budgets(strategy)} {options}".strip()] = budgets
    budgets = plot_strategy_budgets(
        named,
        layers,
        title=f"Budget of each layer by strategy: {model}\n"
        f"{some}, {format_share(arguments['compression_ratio'])} kept, dashed: average{tail}",
    )
    figures = folder / "figures"
    return [
        *save_figure(ranks, figures / "rank_per_layer"),
        *save_figure(budgets, figures / "budgets_per_strategy"),
    ]


def print_summary(record: dict[str, Any]) -> None:
    print("layer  rank (mean ± std)  budget (mean)")
    for row in record["layers"]:
        print(
            f"{row['layer']:5d}  {row['rank_mean']:8.2f} ± {row['rank_std']:6.2f}  {row['budget_mean']:13.1f}"
        )


def main() -> int:
    arguments = parse_arguments()
    try:
        found = run(arguments)
    except RankKVError as error:
        print(format_error(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if found is None:
        return 0
    record, written = found
    print_summary(record)
    print("Written: " + ", ".join(str(path) for path in written), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
