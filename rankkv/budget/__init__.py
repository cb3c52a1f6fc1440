"""Budget: turns measures of the layers into whole tokens per layer and head that sum exactly to a total."""

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
