"""Calibration: measures a RankProfile or query filters from a model and texts."""

from .calibrate import calibrate
from .query_filters import compute_query_filters, save_query_filters

__all__ = ["calibrate", "compute_query_filters", "save_query_filters"]
