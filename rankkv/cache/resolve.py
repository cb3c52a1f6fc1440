"""Resolution of the options left to ``"auto"`` for one model: its profile and its head budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

from ..budget.heads import compute_head_weights
from ..budget.plan import BudgetPlan
from ..budget.strategies import get_strategy
from ..config import PROFILE_USERS, SCORE_WEIGHT_USERS, RankKVConfig, check_predicted
from ..errors import ConfigError, ProfileError, UnsupportedModelError
from ..models.tensor_parallel import HeadShards, find_head_shards
from ..observe.rotary import find_rotations
from ..profile.known import describe_shape, find_profile, sample_weights
from ..profile.record import RankProfile
from ..rank.measures import get_measure
from ..selection import SELECTORS, Selector, get_selector
from .masks import can_mask_heads, check_head_budgets


def check_methods(config: RankKVConfig) -> None:
    """Check, before any model runs, that the strategy, its options and its measure are registered.

    Raises
    ------
    ConfigError, UnknownNameError
        If one of them is not.
    """
    BudgetPlan.check(config)
    strategy = get_strategy(config.resolve_strategy()[0])
    if strategy.measure is not None:
        get_measure(strategy.measure)


#: Selector for questions that come after the compression.
LATER_SELECTOR = "echo"


def choose_for_questions(config: RankKVConfig, model: Any) -> tuple[RankKVConfig, list[str]]:
    """Return the options with the selector for questions that come after the compression, and remarks on it.

    Only if every option that chooses tokens is left open.  A model that the selector cannot serve keeps the usual one.

    Parameters
    ----------
    config : RankKVConfig
        All options.
    model : PreTrainedModel
        The model they are for.
    """
    open_ones = (
        "selector",
        "strategy",
        "strategy_options",
        "scope",
        "aggregation",
        "profile",
        "head_budgets",
    )
    if any(getattr(config, name) != getattr(RankKVConfig, name) for name in open_ones):
        return config, []
    obstacle = find_obstacle(model)
    if obstacle:
        remark = (
            f"questions that come later would be served best by selector {LATER_SELECTOR!r}, but {obstacle}"
        )
        return config, [remark]
    return replace(config, selector=LATER_SELECTOR), []


def find_obstacle(model: Any) -> str:
    """Return the reason why selector ``"echo"`` cannot serve a model; empty if it can."""
    name, backend = type(model).__name__, model.config.get_text_config(decoder=True)._attn_implementation
    if not can_mask_heads(backend):
        return f"{backend} has one mask for all heads"
    if find_head_shards(model) is not None:
        return "tensor parallelism splits the heads over processes"
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    indices = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    try:
        rotations = find_rotations(model, indices)
    except UnsupportedModelError:
        return f"how {name} applies positions is not known"
    except Exception as error:
        # The probe runs the model on six tokens.  A model that wants more than tokens still serves the usual selector.
        return f"{name} could not be probed with six tokens ({type(error).__name__})"
    if not any(rotations.values()):
        return f"{name} has no rotary embedding"
    return ""


def resolve_options(
    config: RankKVConfig,
    model: Any,
    layer_indices: list[int],
    shards: HeadShards | None,
    selector: Selector | None = None,
) -> RankKVConfig:
    """Return the options with profile and head budgets resolved for this model.

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
    selector : Selector, optional
        The token selection method, which may ask for a strategy; by default that of the options.

    Raises
    ------
    ConfigError
        If strategy ``"global"`` meets a selector whose scores do not compare, or if head budgets are requested, but
        tensor parallelism does not allow them.
    UnsupportedModelError
        If head budgets are requested, but the attention backend does not allow them.
    ProfileError
        If the given profile belongs to another model, or a profile is needed and none is known.
    """
    text_config = model.config.get_text_config(decoder=True)
    backend = text_config._attn_implementation
    requested = config.head_budgets not in (None, "auto")
    if requested:
        check_head_budgets(backend)
    if requested and shards is not None:
        raise ConfigError(
            f"head_budgets={config.head_budgets!r} spreads a layer's budget over all its heads, but tensor "
            f"parallelism splits them over {shards.size} processes: use head_budgets=None with this model."
        )
    one_head = getattr(text_config, "num_key_value_heads", None) == 1 or (
        getattr(text_config, "multi_query", False) is True
    )
    can_spread = shards is None and not one_head and can_mask_heads(backend)
    selector = get_selector(config.selector) if selector is None else selector
    config = resolve_global(config, selector, can_spread)
    if _weighs_scores(config):
        return resolve_score_weights(config, model, layer_indices, selector)
    config = resolve_profile(config, model, layer_indices, can_spread)
    config = resolve_head_budgets(config, can_spread)
    if config.head_budgets == "profile" and layer_indices:
        # Called only to raise before the prefill if the profile holds no heads.
        compute_head_weights(config.profile)
    return config


def resolve_global(config: RankKVConfig, selector: Selector, can_spread: bool) -> RankKVConfig:
    """Return the options with the strategy that the selector asks for, and heads that compete with ``"global"``.

    Parameters
    ----------
    config : RankKVConfig
        All options.
    selector : Selector
        The token selection method.
    can_spread : bool
        True if the heads of a layer may keep different numbers of tokens.

    Raises
    ------
    ConfigError
        If the strategy compares scores and those of the selector do not compare over heads and layers, or it protects
        a fraction of each budget; if the strategy keeps heads equal and ``head_budgets`` does not.
    """
    asks = config.strategy is None and not config.strategy_options
    if asks and selector.strategy is not None and config.head_budgets not in ("distortion", "profile"):
        config = replace(config, strategy=selector.strategy)
    if config.strategy is None or not get_strategy(config.strategy).by_scores:
        return config
    check_global(config, selector)
    if get_strategy(config.strategy).equal_heads:
        if config.head_budgets not in ("auto", None):
            raise ConfigError(
                f"head_budgets={config.head_budgets!r} lets heads keep different numbers of tokens, and strategy="
                f"{config.strategy!r} gives all heads of a layer the same: use strategy='global' with it."
            )
        return replace(config, head_budgets=None)
    if config.head_budgets == "auto":
        return replace(config, head_budgets="adaptive" if can_spread and not config.keeps_all else None)
    return config


def resolve_score_weights(
    config: RankKVConfig, model: Any, layer_indices: list[int], selector: Selector
) -> RankKVConfig:
    """Return the options with the profile whose score weights belong to this selector, or without one.

    Raises
    ------
    ProfileError
        If a profile is given that belongs to another model or does not weigh this selector's scores.
    """
    if isinstance(config.profile, RankProfile):
        config.profile.check_model(describe_shape(model), sample_weights(model), layer_indices)
        weighed = config.profile.score_weights.get("selector")
        if weighed != str(selector):
            raise ProfileError(
                f"strategy={config.strategy!r} would weigh the scores of selector {str(selector)!r}, but the profile "
                f"weighs {'none' if weighed is None else f'those of {weighed!r}'}: leave the profile out, or measure "
                "one with rankkv calibrate --replay."
            )
        return config
    if config.profile is None or not layer_indices:
        return config
    return replace(config, profile=find_profile(model, layer_indices, weighs=str(selector)))


def _weighs_scores(config: RankKVConfig) -> bool:
    """Return True if the strategy uses the score weights of a profile, and its heads are not split by it."""
    return config.strategy in SCORE_WEIGHT_USERS and config.head_budgets != "profile"


def resolve_new_profile(
    config: RankKVConfig, model: Any, layer_indices: list[int], selector: Selector
) -> RankKVConfig:
    """Return the options of a prefill that waits, with the profile that was newly given checked or found.

    Raises
    ------
    ProfileError
        As :func:`resolve_options`.
    """
    if _weighs_scores(config):
        return resolve_score_weights(config, model, layer_indices, selector)
    return resolve_profile(config, model, layer_indices, config.head_budgets is not None)


def check_global(config: RankKVConfig, selector: Selector) -> None:
    """Check that the scores of a selector compare as the strategy needs it.

    Raises
    ------
    ConfigError
        As :func:`resolve_global`.
    """
    if not get_strategy(config.resolve_strategy()[0]).by_scores:
        return
    if not selector.comparable:
        raise ConfigError(
            f"strategy={config.strategy!r} compares scores over all heads and layers, but those of selector "
            f"{selector.name!r} only order the tokens of one head: use another strategy, or one of the selectors "
            f"{', '.join(name for name, known in SELECTORS.items() if known.comparable)}."
        )
    if selector.recent_fraction is not None:
        raise ConfigError(
            f"recent_fraction={selector.recent_fraction} of selector {selector.name!r} depends on a head's budget, but "
            f"strategy={config.strategy!r} protects the same newest tokens in all heads: leave one of them out."
        )


#: Options that a prefill does not read, so that they may change before the compression.
READ_AT_COMPRESSION = (
    "compression_ratio", "budget", "min_budget", "strategy", "strategy_options", "scope", "aggregation", "profile",
    "head_budgets", "head_floor", "protect", "max_loss", "on_doubt",
)  # fmt: skip


def change_before_compression(
    config: RankKVConfig, selector: Selector, changes: Mapping[str, Any]
) -> RankKVConfig:
    """Return the options of a prefill with some changed that it did not read.

    Raises
    ------
    ConfigError
        If one was read, or strategy ``"global"`` cannot compare the selector's scores.
    """
    late = sorted(set(changes) - set(READ_AT_COMPRESSION))
    if late:
        raise ConfigError(
            f"{late[0]} is read during the prefill, which is over: build a new cache with it, or change one of: "
            f"{', '.join(READ_AT_COMPRESSION)}."
        )
    strategy, by = changes.get("strategy"), changes.get("head_budgets", config.head_budgets)
    if strategy not in (None, *PROFILE_USERS, *SCORE_WEIGHT_USERS) and by != "profile":
        # The profile that was found served the strategy of before.
        changes = {"profile": None, **changes}
    changed = replace(config, **changes)
    if (changed.head_budgets is None) != (config.head_budgets is None):
        raise ConfigError(
            f"head_budgets={changed.head_budgets!r} needs other cache layers than head_budgets="
            f"{config.head_budgets!r}: build a new cache with it."
        )
    check_methods(changed)
    check_global(changed, selector)
    check_predicted(changed.max_loss, selector.name)
    return changed


def resolve_profile(
    config: RankKVConfig, model: Any, layer_indices: list[int], can_spread: bool = True
) -> RankKVConfig:
    """Return the options with ``profile="auto"`` replaced by the known profile, if it is used.

    Parameters
    ----------
    config : RankKVConfig
        All options.
    model : PreTrainedModel
        The model they are for.
    layer_indices : list of int
        Its compressible layers.
    can_spread : bool, default True
        True if the heads of a layer may keep different numbers of tokens.

    Raises
    ------
    ProfileError
        If the given profile belongs to another model, or a profile is needed and none is known.
    """
    if not layer_indices or config.profile is None:
        return config
    if isinstance(config.profile, RankProfile):
        config.profile.check_model(describe_shape(model), sample_weights(model), layer_indices)
        return config
    by_heads = config.head_budgets == "profile"
    prefers_heads = by_heads or (can_spread and _is_left_open(config))
    wanted = by_heads or config.strategy in PROFILE_USERS
    # Strategy options without a strategy belong to the uncalibrated default.  Heads measured on the prompt need no
    # profile.
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
    """Return the options with ``head_budgets="auto"`` replaced by one way to spread budgets over heads.

    If ``strategy`` is not given either, the way that measured best is used: ``"profile"`` with a profile that has
    heads, ``"distortion"`` without a profile.  The result is None, so that all heads of a layer keep equally many
    tokens, with a profile of layers only, with a given strategy, and with another scope or aggregation.

    Parameters
    ----------
    config : RankKVConfig
        All options, their profile resolved.
    can_spread : bool
        True if the heads of a layer may keep different numbers of tokens.
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
    """Return True if strategy, scope and aggregation are at their defaults and less than the full cache is kept."""
    usual = (config.scope, config.aggregation) == (RankKVConfig.scope, RankKVConfig.aggregation)
    return config.head_budgets == "auto" and config.strategy is None and usual and not config.keeps_all
