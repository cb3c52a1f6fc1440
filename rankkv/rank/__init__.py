"""Rank: an observation of a layer goes in, its effective rank or another measure comes out."""

from .measures import MEASURES, compute_measures
from .observed_layer import compute_group_ranks, compute_head_ranks, compute_layer_ranks

__all__ = [
    "MEASURES",
    "compute_group_ranks",
    "compute_head_ranks",
    "compute_layer_ranks",
    "compute_measures",
]
