"""Profiles: the measured sensitivity of each layer and head of one model, kept as JSON; no torch is imported here."""

from .record import RankProfile

__all__ = ["RankProfile"]
