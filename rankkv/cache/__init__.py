"""Cache: a model and a config go in, a RankKVCache for `model.generate()` comes out."""

from .cache import RankKVCache
from .kept_tokens import analyze_kept_tokens
from .prefill import compress

__all__ = ["RankKVCache", "analyze_kept_tokens", "compress"]
