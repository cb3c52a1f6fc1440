"""Decode steps of several caches in turn, one token at a time, in wall and in CPU time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common import compute_ratio, time_both
from rankkv.models.compat import cache_argument


class Step:
    """Each call decodes one token greedily with a model and a cache; ``tokens`` are those it has given."""

    def __init__(self, model: Any, cache: Any, past: int) -> None:
        self.model, self.cache, self.past = model, cache, past
        self.tokens = [100]

    @torch.no_grad()
    def __call__(self) -> None:
        """Decode one token."""
        device = next(self.model.parameters()).device
        token = torch.tensor([self.tokens[-1:]], device=device)
        position = torch.tensor([[self.past]], device=device)
        logits = self.model(token, position_ids=position, use_cache=True, **cache_argument(self.cache)).logits
        self.tokens.append(int(logits[0, -1].argmax()))
        self.past += 1


def time_in_turn(
    steps: dict[str, Callable[[], None]], count: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall seconds and seconds of CPU time of ``count`` calls of each, in turn, after two that do not count."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-2, count):
        for name in list(steps) if turn % 2 == 0 else list(steps)[::-1]:
            seconds, cpu_seconds = time_both(steps[name])
            if turn >= 0:
                wall[name].append(seconds)
                cpu[name].append(cpu_seconds)
    return wall, cpu


def step_in_turn(steps: dict[str, Callable[[], None]], count: int, against: str) -> dict[str, dict[str, Any]]:
    """Time ``count`` calls of each in turn; give each other one's ratios to ``against``, and its median seconds."""
    wall, cpu = time_in_turn(steps, count)
    return {
        name: {
            "tpot_seconds": statistics.median(wall[name]),
            "tpot_cpu_seconds": statistics.median(cpu[name]),
            "tpot_ratio": compute_ratio(wall[name], wall[against]),
            "tpot_cpu_ratio": compute_ratio(cpu[name], cpu[against]),
        }
        for name in steps
    }


@torch.no_grad()
def measure_linears(model: Any, repeats: int = 10) -> tuple[float, float]:
    """Median wall and CPU seconds of all of a model's linear layers, each once on one row: a decode step's weights."""
    inputs = [
        (module, torch.ones(1, 1, module.in_features, dtype=module.weight.dtype, device=module.weight.device))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]

    def run() -> None:
        for module, row in inputs:
            module(row)

    run()
    found = [time_both(run) for _ in range(repeats)]
    return statistics.median(wall for wall, _ in found), statistics.median(cpu for _, cpu in found)
