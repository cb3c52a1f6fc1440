"""Settings to compare: every selector with every strategy at every ratio, and uniform budgets beside each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from ..budget.plan import BudgetPlan
from ..config import RankKVConfig
from ..selection import get_selector

#: Budgets that every other strategy is compared with.
UNIFORM = "uniform"
#: Names that stand for a combination of options; any other name is a strategy with its own options.
NAMED_STRATEGIES: dict[str, dict[str, Any]] = {
    "auto": {},
    "default": {"profile": None},
    "layers": {"profile": None, "head_budgets": None},
    "layers-profile": {"head_budgets": None},
}


def build_settings(
    ratios: Iterable[float], selectors: Iterable[str] = ("snapkv",), strategies: Iterable[str] = ("auto",)
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Build all combinations, and say which one with uniform budgets each is compared with.

    Parameters
    ----------
    ratios : iterable of float
        Fractions of the cache kept, in (0, 1].
    selectors : iterable of str
        Token selection methods.
    strategies : iterable of str
        Budget strategies; ``"auto"`` is what :class:`~rankkv.RankKVCache` does by itself, ``"default"`` the same
        without calibration; ``"layers"`` and ``"layers-profile"`` leave the heads of a layer equal, without
        calibration and with.

    Returns
    -------
    settings : dict
        ``"selector|strategy|ratio"`` to options of :class:`~rankkv.RankKVCache`.
    uniform_of : dict
        Each setting's name to that of uniform budgets with the same selector and ratio.

    Raises
    ------
    ConfigError, UnknownNameError
        If a ratio lies outside its range, or a name is not registered.

    Examples
    --------
    >>> settings, uniform_of = build_settings([0.2], ["h2o"])
    >>> sorted(settings)
    ['h2o|auto|0.2', 'h2o|uniform|0.2']
    >>> uniform_of["h2o|auto|0.2"]
    'h2o|uniform|0.2'
    """
    names = dict.fromkeys([UNIFORM, *strategies])
    settings, uniform_of = {}, {}
    for selector, strategy, ratio in itertools.product(selectors, names, ratios):
        options = {
            "compression_ratio": ratio,
            "selector": selector,
            **NAMED_STRATEGIES.get(strategy, {"strategy": strategy}),
        }
        get_selector(selector)
        BudgetPlan.check(RankKVConfig(**options))
        name = f"{selector}|{strategy}|{ratio:g}"
        settings[name] = options
        uniform_of[name] = f"{selector}|{UNIFORM}|{ratio:g}"
    return settings, uniform_of
