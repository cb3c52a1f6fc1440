"""What a compressed cache is worth: tasks, shared prefills, statistics, and results that outlive a kill."""

from __future__ import annotations

from .needle import NeedleScore, evaluate_needle
from .perplexity import ContinuationScore, compute_continuation_loss, evaluate_continuation
from .shared_prefill import PrefillRecord, record_prefill

__all__ = [
    "ContinuationScore",
    "NeedleScore",
    "PrefillRecord",
    "compute_continuation_loss",
    "evaluate_continuation",
    "evaluate_needle",
    "record_prefill",
]
