"""The KV cache: built from a model and a config, passed to `model.generate()`."""

from .cache import RankKVCache
from .kept_tokens import analyze_kept_tokens
from .prefill import compress

__all__ = ["RankKVCache", "analyze_kept_tokens", "compress"]
