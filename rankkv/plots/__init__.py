"""Figures of ranks, budgets and measured generations; needs the extra ``rankkv[plots]``."""

from __future__ import annotations

from .figures import (
    plot_cache_comparison,
    plot_layer_ranks,
    plot_ranks_and_budgets,
    plot_strategy_budgets,
    save_figure,
)
from .quality import plot_kept_stretches, plot_quality, plot_recall_grids

__all__ = [
    "plot_cache_comparison",
    "plot_kept_stretches",
    "plot_layer_ranks",
    "plot_quality",
    "plot_ranks_and_budgets",
    "plot_recall_grids",
    "plot_strategy_budgets",
    "save_figure",
]
