"""Profiles: the measured sensitivity of each layer and head of one model, kept as JSON; imports no torch."""

from .record import RankProfile

__all__ = ["RankProfile"]
