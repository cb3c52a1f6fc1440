"""RankKV: KV cache compression whose per-layer budgets follow the effective rank of each layer's attention.

Names resolve on first use, so ``import rankkv`` loads neither torch nor transformers and patches nothing.

Examples
--------
>>> import rankkv
>>> "compute_effective_rank" in dir(rankkv)
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rankkv._version import __version__

if TYPE_CHECKING:
    from rankkv.budget_allocation import BudgetAllocation, BudgetAllocator
    from rankkv.cache.cache import RankKVCache
    from rankkv.cache.prefill import compress
    from rankkv.calibration.query_filters import compute_query_filters, save_query_filters
    from rankkv.config import RankKVConfig
    from rankkv.models.loading import load_model
    from rankkv.models.texts import load_texts
    from rankkv.pipeline import RankKVAnalyzer, RankKVResult, quick_analyze
    from rankkv.profile.record import RankProfile
    from rankkv.rank_analysis import RankAnalysis, analyze_attention_ranks, compute_effective_rank

__all__ = [
    "BudgetAllocation",
    "BudgetAllocator",
    "RankAnalysis",
    "RankKVAnalyzer",
    "RankKVCache",
    "RankKVConfig",
    "RankKVResult",
    "RankProfile",
    "__version__",
    "analyze_attention_ranks",
    "compress",
    "compute_effective_rank",
    "compute_query_filters",
    "load_model",
    "load_texts",
    "quick_analyze",
    "save_query_filters",
]

_HOME_OF = {
    "BudgetAllocation": "rankkv.budget_allocation",
    "BudgetAllocator": "rankkv.budget_allocation",
    "RankAnalysis": "rankkv.rank_analysis",
    "RankKVAnalyzer": "rankkv.pipeline",
    "RankKVCache": "rankkv.cache.cache",
    "RankKVConfig": "rankkv.config",
    "RankKVResult": "rankkv.pipeline",
    "RankProfile": "rankkv.profile.record",
    "analyze_attention_ranks": "rankkv.rank_analysis",
    "compress": "rankkv.cache.prefill",
    "compute_effective_rank": "rankkv.rank_analysis",
    "compute_query_filters": "rankkv.calibration.query_filters",
    "load_model": "rankkv.models.loading",
    "load_texts": "rankkv.models.texts",
    "quick_analyze": "rankkv.pipeline",
    "save_query_filters": "rankkv.calibration.query_filters",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name the first time the name is used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, resolved or not."""
    return sorted(set(globals()) | set(__all__))
