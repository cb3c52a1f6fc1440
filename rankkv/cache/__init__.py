"""The KV cache: built from a model and a config, passed to `model.generate()`."""

from .cache import RankKVCache
from .kept_tokens import analyze_kept_tokens
from .prefill import compress
from .replay import ReplayPrompt

__all__ = ["RankKVCache", "ReplayPrompt", "analyze_kept_tokens", "compress"]
