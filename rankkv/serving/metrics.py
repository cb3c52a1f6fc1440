"""Metrics of the server, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from .contexts import ContextStore
from .turns import Job, Turns

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_TTFT_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_TPOT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class _StoreCounters(Collector):
    """Counts that the store keeps itself."""

    def __init__(self, store: ContextStore) -> None:
        self._store = store

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield both counters."""
        store = self._store
        yield CounterMetricFamily("rankkv_cache_evictions", "Caches that left memory.", store.evicted)
        yield CounterMetricFamily("rankkv_cache_loads", "Caches that came back from disk.", store.loaded)


class Metrics:
    """Count requests and tokens, and read the state of store and queue when asked.

    Parameters
    ----------
    store : ContextStore
        Contexts.
    turns : Turns
        Queue.
    """

    def __init__(self, store: ContextStore, turns: Turns) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rankkv_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.tokens = Counter(
            "rankkv_tokens",
            "Tokens: prompt (all), cached (of the prompt, taken from a context), answer.",
            ["kind"],
            registry=self.registry,
        )
        self.lookups = Counter(
            "rankkv_context_lookups",
            "Requests that began with a stored context (hit) or not (miss).",
            ["result"],
            registry=self.registry,
        )
        self.ttft = Histogram(
            "rankkv_ttft_seconds",
            "Seconds from the request's arrival to the first token, the queue included.",
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.tpot = Histogram(
            "rankkv_tpot_seconds",
            "Seconds per token after the first one.",
            buckets=_TPOT_BUCKETS,
            registry=self.registry,
        )
        self.compression = Histogram(
            "rankkv_compression_seconds",
            "Seconds to prefill and compress a context.",
            buckets=(0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600),
            registry=self.registry,
        )
        self._gauge("rankkv_cache_bytes", "Bytes of caches in memory.", store.held_bytes)
        self._gauge(
            "rankkv_cache_saved_bytes", "Bytes that they would take more uncompressed.", store.saved_bytes
        )
        self._gauge("rankkv_contexts", "Stored contexts.", lambda: store.count(stored=True))
        self._gauge("rankkv_conversations", "Conversations in memory.", lambda: store.count(stored=False))
        self._gauge("rankkv_queue_waiting", "Requests that wait for their turn.", lambda: turns.waiting)
        self._gauge("rankkv_queue_running", "Requests that the model works on.", lambda: turns.running)
        self.registry.register(_StoreCounters(store))

    def note_request(self, route: str, status: int) -> None:
        """Count one finished request."""
        self.requests.labels(route, str(status)).inc()

    def note_job(self, job: Job) -> None:
        """Count the tokens and times of a finished answer."""
        if job.prompt_tokens:
            self.tokens.labels("prompt").inc(job.prompt_tokens)
            self.tokens.labels("cached").inc(job.cached_tokens)
            self.tokens.labels("answer").inc(job.answer_tokens)
            self.lookups.labels("hit" if job.cached_tokens else "miss").inc()
        if job.first_token is not None and job.last_token is not None:
            self.ttft.observe(job.first_token - job.arrived)
            if job.answer_tokens > 1:
                self.tpot.observe((job.last_token - job.first_token) / (job.answer_tokens - 1))

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(read)
