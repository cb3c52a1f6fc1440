"""Settings to compare: every selector with every strategy at every ratio, and uniform budgets beside each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from ..budget.plan import BudgetPlan
from ..config import RankKVConfig, check_predicted
from ..selection import get_selector

#: In a setting's name, in place of a strategy: the number after it is a loss, not a ratio.
MAX_LOSS = "max_loss"
#: Strategy that every other strategy is compared with.
UNIFORM = "uniform"
#: Presets: names that stand for a combination of options.  Any other name is a strategy with its default options.
NAMED_STRATEGIES: dict[str, dict[str, Any]] = {
    "auto": {},
    "default": {"profile": None},
    "layers": {"profile": None, "head_budgets": None},
    "layers-profile": {"head_budgets": None},
}


def build_settings(
    ratios: Iterable[float],
    selectors: Iterable[str] = ("snapkv",),
    strategies: Iterable[str] = ("auto",),
    max_losses: Iterable[float] = (),
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Build all combinations, and name the uniform setting that each is compared with.

    Parameters
    ----------
    ratios : iterable of float
        Fractions of the cache kept, in (0, 1].
    selectors : iterable of str
        Token selection methods.
    strategies : iterable of str
        Budget strategies.  ``"auto"`` is the default of :class:`~rankkv.RankKVCache`, ``"default"`` the same
        without a profile.  ``"layers"`` (without a profile) and ``"layers-profile"`` (with one) give all heads of
        a layer the same budget.
    max_losses : iterable of float
        Losses to stay below, nats per token.  Each gives one setting for each selector, named ``"max_loss"`` in place
        of a strategy.  Its cache has another size for each context, so it is compared with the full cache alone.

    Returns
    -------
    settings : dict
        Maps ``"selector|strategy|ratio"`` to options of :class:`~rankkv.RankKVCache`.
    uniform_of : dict
        Maps each setting's name to the setting with uniform budgets, the same selector and the same ratio.

    Raises
    ------
    ConfigError
        If a ratio lies outside (0, 1].
    UnknownNameError
        If a name is not registered.

    Examples
    --------
    >>> settings, uniform_of = build_settings([0.2], ["h2o"])
    >>> sorted(settings)
    ['h2o|auto|0.2', 'h2o|uniform|0.2']
    >>> uniform_of["h2o|auto|0.2"]
    'h2o|uniform|0.2'
    """
    ratios, selectors = list(ratios), list(selectors)
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
    for selector, loss in itertools.product(selectors, max_losses):
        options = {"max_loss": loss, "selector": selector}
        RankKVConfig(**options)
        check_predicted(loss, get_selector(selector).name)
        name = f"{selector}|{MAX_LOSS}|{loss:g}"
        settings[name] = options
    return settings, uniform_of
