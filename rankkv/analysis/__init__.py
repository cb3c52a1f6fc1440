"""Analysis: generations, layer measures and the self-check."""

from .generation import GenerationRecord, analyze_generation
from .measuring_cache import MeasuringCache

__all__ = ["GenerationRecord", "MeasuringCache", "analyze_generation"]
