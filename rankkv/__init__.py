"""RankKV: KV cache compression with per-layer budgets from the effective rank of each layer's attention.

Names are imported on first use, so ``import rankkv`` loads neither torch nor transformers and patches nothing.

Examples
--------
>>> import rankkv
>>> "compute_effective_rank" in dir(rankkv)
True
"""

from __future__ import annotations

import importlib
from typing import Any

from rankkv._version import __version__

# Type checkers read the types of these names from `__init__.pyi`.
_HOME_OF = {
    "BudgetAllocation": "rankkv.budget_allocation",
    "BudgetAllocator": "rankkv.budget_allocation",
    "RankAnalysis": "rankkv.rank_analysis",
    "RankKVAnalyzer": "rankkv.pipeline",
    "RankKVCache": "rankkv.cache",
    "RankKVConfig": "rankkv.config",
    "RankKVResult": "rankkv.pipeline",
    "RankProfile": "rankkv.profile",
    "analyze_attention_ranks": "rankkv.rank_analysis",
    "calibrate": "rankkv.calibration",
    "compress": "rankkv.cache",
    "compute_effective_rank": "rankkv.rank_analysis",
    "compute_query_filters": "rankkv.calibration",
    "load_model": "rankkv.models",
    "load_texts": "rankkv.models",
    "quick_analyze": "rankkv.pipeline",
    "save_query_filters": "rankkv.calibration",
}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted(set(globals()) | set(__all__))
