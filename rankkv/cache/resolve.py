"""Resolve the options left to ``"auto"`` for one model: its profile and its head budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..budget.heads import compute_head_weights
from ..budget.plan import BudgetPlan
from ..budget.strategies import get_strategy
from ..config import PROFILE_USERS, RankKVConfig
from ..errors import ConfigError, ProfileError
from ..models.tensor_parallel import HeadShards
from ..profile.known import describe_shape, find_profile, sample_weights
from ..profile.record import RankProfile
from ..rank.measures import get_measure
from .masks import can_mask_heads, check_head_budgets


def check_methods(config: RankKVConfig) -> None:
    """Raise, before any model runs, if the strategy, its options or its measure are not registered."""
    BudgetPlan.check(config)
    strategy = get_strategy(config.resolve_strategy()[0])
    if strategy.measure is not None:
        get_measure(strategy.measure)


def resolve_options(
    config: RankKVConfig, model: Any, layer_indices: list[int], shards: HeadShards | None
) -> RankKVConfig:
    """Return the options with the profile and the head budgets that "auto" means for this model.

    Parameters
    ----------
    config : RankKVConfig
        All options.
    model : PreTrainedModel
        The model they are for.
    layer_indices : list of int
        Its compressible layers.
    shards : HeadShards, optional
        The tensor-parallel processes of the model, where there are several.

    Raises
    ------
    ConfigError
        If head budgets are asked for where attention, or tensor parallelism, does not allow them.
    ProfileError
        If a profile given belongs to another model, or one is needed and none is known.
    """
    text_config = model.config.get_text_config(decoder=True)
    backend = text_config._attn_implementation
    asked = config.head_budgets not in (None, "auto")
    if asked:
        check_head_budgets(backend)
    if asked and shards is not None:
        raise ConfigError(
            f"head_budgets={config.head_budgets!r} spreads a layer's budget over all its heads, and tensor "
            f"parallelism keeps them in {shards.size} processes: use head_budgets=None with this model."
        )
    one_head = getattr(text_config, "num_key_value_heads", None) == 1 or (
        getattr(text_config, "multi_query", False) is True
    )
    can_spread = shards is None and not one_head and can_mask_heads(backend)
    config = resolve_profile(config, model, layer_indices, can_spread)
    config = resolve_head_budgets(config, can_spread)
    if config.head_budgets == "profile" and layer_indices:
        # Raises here, before the prefill, where the profile holds no heads.
        compute_head_weights(config.profile)
    return config


def resolve_profile(
    config: RankKVConfig, model: Any, layer_indices: list[int], can_spread: bool = True
) -> RankKVConfig:
    """Return the options with the profile of this model in the place of ``profile="auto"``, where it is used.

    Parameters
    ----------
    config : RankKVConfig
        All options.
    model : PreTrainedModel
        The model they are for.
    layer_indices : list of int
        Its compressible layers.
    can_spread : bool, default True
        Whether the heads of a layer may keep different numbers of tokens.

    Raises
    ------
    ProfileError
        If a profile given belongs to another model, or one is needed and none is known.
    """
    if not layer_indices or config.profile is None:
        return config
    if isinstance(config.profile, RankProfile):
        config.profile.check_model(describe_shape(model), sample_weights(model), layer_indices)
        return config
    by_heads = config.head_budgets == "profile"
    prefers_heads = by_heads or (can_spread and _is_left_open(config))
    wanted = by_heads or config.strategy in PROFILE_USERS
    # Options without a strategy are those of the uncalibrated default; heads measured in the prompt need no profile.
    decided = config.strategy is not None or config.strategy_options is not None
    if not wanted and (decided or config.head_budgets == "distortion"):
        return config
    profile = find_profile(model, layer_indices, with_heads=prefers_heads)
    if profile is not None:
        return replace(config, profile=profile)
    if wanted:
        user = "head_budgets='profile'" if by_heads else f"strategy={config.strategy!r}"
        raise ProfileError(
            f"{user} needs a profile, and none is known of {type(model).__name__} "
            f"{model.config._name_or_path or '(no name)'!r}: measure one with rankkv calibrate, or give "
            "profile=RankProfile.load(path)."
        )
    return config


def resolve_head_budgets(config: RankKVConfig, can_spread: bool) -> RankKVConfig:
    """Return the options with a way to spread budgets over heads in the place of ``head_budgets="auto"``.

    Where ``strategy`` is not given either it is what measured best: by the heads of the profile, where one with heads
    is used, else by what evicting costs each head in the prompt.  A profile of layers only, and a strategy that was
    asked for, or another part of the attention to rank, leave the heads of a layer equal.

    Parameters
    ----------
    config : RankKVConfig
        All options, their profile resolved.
    can_spread : bool
        Whether the heads of a layer may keep different numbers of tokens.
    """
    if config.head_budgets != "auto":
        return config
    way = None
    if can_spread and _is_left_open(config):
        profile = config.profile
        by_profile = isinstance(profile, RankProfile)
        way = "distortion" if not by_profile else "profile" if profile.head_gain_divergence else None
    return replace(config, head_budgets=way)


def _is_left_open(config: RankKVConfig) -> bool:
    """Whether what decides how heads are treated is left to what measured best, and there is something to spread."""
    usual = (config.scope, config.aggregation) == (RankKVConfig.scope, RankKVConfig.aggregation)
    keeps_all = config.compression_ratio == 1.0 and config.budget is None
    return config.head_budgets == "auto" and config.strategy is None and usual and not keeps_all
