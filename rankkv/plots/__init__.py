"""Numbers in, matplotlib figures and their PNG and PDF files out; needs the extra ``rankkv[plots]``."""

from __future__ import annotations

from .figures import (
    LayerBudgets,
    plot_cache_comparison,
    plot_layer_ranks,
    plot_ranks_and_budgets,
    plot_strategy_budgets,
    save_figure,
)
from .names import name_budgets, name_method, name_methods, name_model, name_selector
from .quality import Interval, plot_kept_stretches, plot_pairs, plot_quality, plot_recall_grids

__all__ = [
    "Interval",
    "LayerBudgets",
    "name_budgets",
    "name_method",
    "name_methods",
    "name_model",
    "name_selector",
    "plot_cache_comparison",
    "plot_kept_stretches",
    "plot_layer_ranks",
    "plot_pairs",
    "plot_quality",
    "plot_ranks_and_budgets",
    "plot_recall_grids",
    "plot_strategy_budgets",
    "save_figure",
]
