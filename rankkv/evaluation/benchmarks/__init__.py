"""Published benchmarks: files go in as they are, samples with the benchmark's own prompts and metrics come out."""

from __future__ import annotations

from .base import DataItem, DataQuestion, Shape
from .files import SHAPES, Benchmark, load_benchmark
from .metrics import METRICS, Metric, get_metric
from .samples import BenchmarkSamples, make_benchmark_samples

__all__ = [
    "METRICS",
    "SHAPES",
    "Benchmark",
    "BenchmarkSamples",
    "DataItem",
    "DataQuestion",
    "Metric",
    "Shape",
    "get_metric",
    "load_benchmark",
    "make_benchmark_samples",
]
