"""Selection: methods that score the tokens of a layer, and the choice of kept tokens from their scores."""

from .base import GLOBAL_PROTECTION, NEEDS, Selector, WrappingSelector
from .registry import SELECTORS, get_selector, register_selector, unregister_selector
from .select import (
    CASCADE_SLACK,
    list_protected,
    raise_protected,
    rank_tokens,
    select_tokens,
    select_tokens_across_heads,
)

__all__ = [
    "CASCADE_SLACK",
    "GLOBAL_PROTECTION",
    "NEEDS",
    "SELECTORS",
    "Selector",
    "WrappingSelector",
    "get_selector",
    "list_protected",
    "raise_protected",
    "rank_tokens",
    "register_selector",
    "select_tokens",
    "select_tokens_across_heads",
    "unregister_selector",
]
