"""Selection: an observation of a layer goes in, scores and then the indices of the kept tokens come out."""

from .base import NEEDS, Selector, WrappingSelector
from .registry import SELECTORS, get_selector, register_selector, unregister_selector
from .select import CASCADE_SLACK, select_tokens, select_tokens_across_heads

__all__ = [
    "CASCADE_SLACK",
    "NEEDS",
    "SELECTORS",
    "Selector",
    "WrappingSelector",
    "get_selector",
    "register_selector",
    "select_tokens",
    "select_tokens_across_heads",
    "unregister_selector",
]
