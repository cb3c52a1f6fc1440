"""Calibration: a model and texts go in, a RankProfile or query filters come out."""

from .calibrate import calibrate
from .query_filters import compute_query_filters, save_query_filters

__all__ = ["calibrate", "compute_query_filters", "save_query_filters"]
