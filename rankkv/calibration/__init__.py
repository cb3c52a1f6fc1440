"""Calibration: measures a RankProfile or query filters from a model and texts."""

from .calibrate import calibrate
from .loss_curves import measure_loss_curves
from .query_centres import compute_query_centres, save_query_centres
from .query_filters import compute_query_filters, save_query_filters
from .score_weights import compute_score_weights

__all__ = [
    "calibrate",
    "compute_query_centres",
    "compute_query_filters",
    "compute_score_weights",
    "measure_loss_curves",
    "save_query_centres",
    "save_query_filters",
]
