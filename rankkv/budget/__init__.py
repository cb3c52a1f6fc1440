"""Budget: one number or curve for each layer goes in, whole tokens for each layer and head come out, the total exact."""

from .plan import BudgetPlan
from .strategies import STRATEGIES, Strategy, get_strategy, register_strategy, unregister_strategy

__all__ = [
    "STRATEGIES",
    "BudgetPlan",
    "Strategy",
    "get_strategy",
    "register_strategy",
    "unregister_strategy",
]
