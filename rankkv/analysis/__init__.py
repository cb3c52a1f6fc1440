"""Analysis: a model and prompts go in, measured layers, samples and generations come out."""

from .generation import GenerationRecord, analyze_generation
from .measuring_cache import MeasuringCache

__all__ = ["GenerationRecord", "MeasuringCache", "analyze_generation"]
