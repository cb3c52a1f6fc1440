"""Evaluation: a model, texts and settings go in, rows with intervals come out, and finished rows survive a kill."""

from __future__ import annotations

from .perplexity import ContinuationScore, compute_continuation_loss, evaluate_continuation
from .prefill_record import PrefillRecord, record_prefill
from .task_runner import BLANK, FULL, evaluate_blank, evaluate_sample, evaluate_task
from .tasks import TASKS, Haystack, Sample, Task, get_task, make_samples, register_task, unregister_task

__all__ = [
    "BLANK",
    "FULL",
    "TASKS",
    "ContinuationScore",
    "Haystack",
    "PrefillRecord",
    "Sample",
    "Task",
    "compute_continuation_loss",
    "evaluate_blank",
    "evaluate_continuation",
    "evaluate_sample",
    "evaluate_task",
    "get_task",
    "make_samples",
    "record_prefill",
    "register_task",
    "unregister_task",
]
