"""RankKVConfig: every option of RankKV, in one frozen dataclass that checks them before a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ConfigError, UnknownNameError
from .profile.record import RankProfile, check_profile
from .utils.frozen import FrozenOptions

SCOPES = ("full", "window", "evictable")
#: Ways to join the heads of a layer for its rank.
AGGREGATIONS = ("mean", "per_head", "median", "max", "min", "concat", "mass_normalized")
DECODE_MODES = ("grow", "bounded", "periodic")
POSITION_MODES = ("original", "packed")
STORAGE_MODES = ("full", "int8", "offload")
PREFILL_MODES = ("single", "chunked", "streaming")
#: Ways to spread a layer's budget over its kv heads; "auto" takes the way that measured best, if the model allows it.
HEAD_BUDGETS = ("auto", "adaptive", "distortion", "profile")
#: Strategies that use a profile.
PROFILE_USERS = ("profile", "blend")
#: Strategies that use the score weights of a profile where it has them.
SCORE_WEIGHT_USERS = ("global",)

#: Meaning of `strategy=None` without calibration: the best of all strategies, measured on several kinds of text.
DEFAULT_STRATEGY = "distortion"
#: Meaning of `strategy=None` with a profile of the model.
PROFILED_STRATEGY = "blend"

#: Meaning of the selector "auto": the method that fits when the question comes.
AUTO_SELECTOR = "auto"

#: Message if an option would be ignored.
BOTH_GIVEN = "give either config=RankKVConfig(...) or single options, not both: one would be ignored."


class DefaultRatio(float):
    """Ratio that no one gave: with ``max_loss`` or strategy ``"threshold"`` it sets no upper bound."""


#: Strategies that set the size of the cache themselves.
SIZING_STRATEGIES = ("threshold",)
#: Default of ``compression_ratio``.
DEFAULT_RATIO = DefaultRatio(0.3)
#: Largest value of ``max_loss``, in nats per token.
MOST_LOSS = 10.0
#: Selectors whose loss was measured, so that it can be predicted.
PREDICTED_SELECTORS = ("snapkv", "echo")
#: What a doubtful prediction leads to: only a line in the summary, or a larger cache.
DOUBT_MODES = ("say", "keep")

#: Fewest tokens per layer unless `min_budget` is given.
FLOOR_TOKENS = 16
#: Newest tokens that strategy ``"global"`` protects in every head.
GLOBAL_RECENT_TOKENS = 16
#: Fewest tokens per head with strategy ``"global"``: its newest tokens and 4 sinks.
GLOBAL_FLOOR_TOKENS = GLOBAL_RECENT_TOKENS + 4


@dataclass(frozen=True)
class RankKVConfig:
    """Hold every option that decides what a :class:`~rankkv.RankKVCache` keeps.

    This is the one place that documents the options, in five groups:

    - size: ``compression_ratio``, ``budget``, ``min_budget``, ``max_loss``, ``on_doubt``
    - tokens: ``selector``, ``window_size``, ``sink_size``, ``protect``
    - layers: ``strategy``, ``strategy_options``, ``scope``, ``aggregation``, ``profile``
    - heads: ``head_budgets``, ``head_floor``
    - time and storage: ``prefill``, ``decode``, ``decode_interval``, ``recompress_turns``, ``positions``, ``storage``

    Parameters
    ----------
    compression_ratio : float, default 0.3
        Fraction of the KV cache kept, in (0, 1].  kvpress gives this name to the fraction *removed*.  With ``max_loss``
        or strategy ``"threshold"`` it is an upper bound, and 1 if it is not given.
    budget : int, optional
        Average number of tokens per layer; overrides ``compression_ratio``.
    min_budget : int, optional
        Fewest tokens per layer; None means ``max(16, average budget // 2)``.
    max_loss : float, optional
        Loss to stay below, in nats per token, in (0, 10]: the mean KL divergence of the next-token distribution from
        the full cache's, over the 128 tokens that follow.  The smallest cache is kept whose loss is predicted to stay
        below it for nine of ten prompts.  ``compression_ratio`` and ``budget`` beside it, only if given, are upper
        bounds of the cache.  All layers stay at that bound until the last one has prefilled.
    on_doubt : {"say", "keep"}, default "say"
        What a doubtful prediction leads to, such as that of a short prompt.  ``"say"``: a line in ``summary()``.
        ``"keep"``, with ``max_loss``: half of ``max_loss`` is aimed at.
    selector : str or Selector, default "auto"
        Token selection method: a key of :data:`rankkv.selection.SELECTORS`, or a selector with options.  ``"auto"`` is
        ``"snapkv"``, which keeps what the end of the prompt asks for.  In :func:`rankkv.compress` and the pipeline,
        where questions come later, it is ``"echo"``, as long as strategy, profile, head budgets, scope and aggregation
        are left open too and the model allows it.
    window_size : int, default 32
        Number of last queries observed (the observation window).
    sink_size : int, default 4
        Number of first tokens protected as attention sinks; 0 protects none.
    protect : sequence of (int, int), optional
        Spans ``(start, stop)`` of real tokens that every layer keeps, such as a system prompt.  Padding does not count.
    strategy : str, optional
        Budget strategy, a key of :data:`rankkv.budget_allocation.STRATEGIES`.  None takes the measured default:
        ``"blend"`` with a known profile of the model, else ``"distortion"``.  None also lets the heads of a layer keep
        different numbers of tokens, see ``head_budgets``.  With selectors ``"echo"``, ``"kvzip"``, ``"kvzip_plus"``
        and ``"kvgrad"`` it takes ``"global"``: one top-k of the scores over all heads and layers, of which each head
        keeps at least ``head_floor`` of the average, 4 sinks and the 16 newest tokens.
    strategy_options : mapping, optional
        Options of the strategy, such as ``{"exponent": 2}``.
    scope : {"evictable", "window", "full"}, default "evictable"
        Part of the attention whose effective rank is computed.
    aggregation : str, default "concat"
        Way to join the heads of a layer for its rank: ``"concat"``, ``"mean"``, ``"per_head"``, ``"median"``,
        ``"max"``, ``"min"`` or ``"mass_normalized"``.
    profile : {"auto"}, RankProfile, path or None, default "auto"
        Measured sensitivity of the model's layers.  ``"auto"`` uses the known profile of the model, shipped or in the
        user's cache folder, unless ``strategy`` or its options are given.  None never uses calibration.
    head_budgets : {"auto", None, "distortion", "profile", "adaptive"}, default "auto"
        Way to spread a layer's budget over its kv heads.

        - ``None``: all heads of a layer keep the same number of tokens.
        - ``"distortion"``: budgets follow each head's eviction error, measured on this prompt.  With strategy
          ``"distortion"`` (then the default) one budget is divided over all heads of all layers, and a layer's budget
          is the sum over its heads.
        - ``"profile"``: budgets follow each head's sensitivity in the profile.  With strategy ``"blend"`` (then the
          default), or ``"profile"`` with an exponent, a layer's budget follows the sum over its heads; other strategies
          leave the layers' budgets unchanged.
        - ``"adaptive"``: the tokens of all heads compete for the layer's budget (Ada-KV, arXiv:2407.11550).
        - ``"auto"``: ``"adaptive"`` with strategy ``"global"``.  Else ``"profile"`` if a profile with heads is used,
          ``"distortion"`` if no profile is used.  It is None if a strategy, another scope or another aggregation is
          given, if the ratio is 1, on flash attention, under tensor parallelism, and for models with one kv head.

        Memory equals the budgets, since only kept tokens are stored.  A decode step takes longer than with None, since
        heads are padded to equal length for each attention call.
    head_floor : float, default 0.2
        Fraction of the layer's budget that every head keeps if heads differ, in [0, 1].  With ``"distortion"`` it is a
        fraction of the average budget; every layer keeps it too, and at least 16 tokens or ``min_budget``.
    prefill : {"single", "chunked", "streaming"}, default "single"
        ``"single"``: the first forward is the whole prompt.  ``"chunked"``: the prompt comes in several forwards; it is
        compressed at the first one-token step or at ``finish()``, with exactly the result of one forward.
        ``"streaming"``: the cache is compressed after each chunk, so memory stays bounded during the prefill; the
        result is approximate.
    decode : {"grow", "bounded", "periodic"}, default "grow"
        Treatment of generated tokens.  ``"grow"`` keeps them all.  ``"bounded"`` lets each layer grow to its budget,
        then evicts one token for each new one.  ``"periodic"`` compresses again every ``decode_interval`` tokens.
    decode_interval : int, default 128
        Tokens between two compressions with ``decode="periodic"``.
    recompress_turns : bool, default False
        Compress later multi-token forwards (new turns) too, each by its own observation window.
    positions : {"original", "packed"}, default "original"
        ``"original"``: kept keys keep the rotary positions of their tokens.  ``"packed"``: attention sees kept keys at
        consecutive positions and new tokens right behind them, as in StreamingLLM's own code.
    storage : {"full", "int8", "offload"}, default "full"
        Form of kept keys and values between two forwards: unchanged, int8 with one scale per token and head, or in CPU
        memory.  Eviction comes first; only kept tokens are stored.

    Raises
    ------
    ConfigError, UnknownNameError
        If an option is outside its range or names something that is not registered.
    ProfileError, SourceUnavailableError
        If ``profile`` is damaged or missing.

    Examples
    --------
    >>> RankKVConfig(compression_ratio=0.2).window_size
    32
    """

    compression_ratio: float = DEFAULT_RATIO
    budget: int | None = None
    selector: Any = AUTO_SELECTOR
    strategy: str | None = None
    scope: str = "evictable"
    aggregation: str = "concat"
    strategy_options: Mapping[str, Any] | None = field(default=None)
    window_size: int = 32
    sink_size: int = 4
    decode: str = "grow"
    decode_interval: int = 128
    positions: str = "original"
    prefill: str = "single"
    recompress_turns: bool = False
    storage: str = "full"
    profile: Any = "auto"
    min_budget: int | None = None
    head_budgets: str | None = "auto"
    head_floor: float = 0.2
    protect: Any = None
    max_loss: float | None = None
    on_doubt: str = "say"

    def __post_init__(self) -> None:
        # The dataclass is frozen for its users; checked values are stored through `object`.
        if isinstance(self.compression_ratio, DefaultRatio):
            # The type stays, so that a changed copy still knows that no one gave a ratio.
            is_open = self.max_loss is not None or self.strategy in SIZING_STRATEGIES
            object.__setattr__(self, "compression_ratio", DefaultRatio(1.0) if is_open else DEFAULT_RATIO)
        else:
            object.__setattr__(self, "compression_ratio", check_compression_ratio(self.compression_ratio))
        if self.budget is not None:
            _check_int("budget", self.budget, 1, "it is the average number of tokens per layer")
        _check_int("window_size", self.window_size, 1, "it is the number of last queries observed")
        _check_int("sink_size", self.sink_size, 0, "it is the number of first tokens protected")
        if self.min_budget is not None:
            _check_int("min_budget", self.min_budget, 1, "it is the fewest tokens per layer")
        _check_choice("scope", self.scope, SCOPES)
        _check_choice("aggregation", self.aggregation, AGGREGATIONS)
        _check_choice("decode mode", self.decode, DECODE_MODES)
        _check_choice("positions mode", self.positions, POSITION_MODES)
        _check_choice("prefill mode", self.prefill, PREFILL_MODES)
        _check_choice("storage", self.storage, STORAGE_MODES)
        if self.head_budgets is not None:
            _check_choice("head_budgets", self.head_budgets, HEAD_BUDGETS)
        _check_floor(self.head_floor)
        _check_int(
            "decode_interval", self.decode_interval, 1, "it is the number of tokens between two compressions"
        )
        if not isinstance(self.recompress_turns, bool):
            raise ConfigError(f"recompress_turns={self.recompress_turns!r} must be True or False.")
        object.__setattr__(self, "protect", check_spans(self.protect))
        self._check_loss()
        self._check_profile()
        if self.prefill == "chunked" and self.scope == "full":
            raise ConfigError(
                "scope='full' needs all queries of the prompt, which prefill='chunked' does not keep: use "
                "scope='evictable' or prefill='single'."
            )
        if self.strategy_options is not None:
            object.__setattr__(self, "strategy_options", FrozenOptions(self.strategy_options))

    def _check_loss(self) -> None:
        _check_choice("on_doubt", self.on_doubt, DOUBT_MODES)
        if self.max_loss is None:
            if self.on_doubt == "keep":
                raise ConfigError(
                    "on_doubt='keep' keeps more than max_loss asks for, and none is given: give max_loss."
                )
            return
        object.__setattr__(self, "max_loss", check_max_loss(self.max_loss))
        if self.strategy in SIZING_STRATEGIES:
            raise ConfigError(
                f"strategy={self.strategy!r} and max_loss={self.max_loss:g} both set the size of the cache: leave "
                "one of them out."
            )
        evicting = {
            "prefill='streaming'": self.prefill == "streaming",
            "recompress_turns=True": self.recompress_turns,
            "decode='bounded'": self.decode == "bounded",
        }
        given = next((option for option, is_given in evicting.items() if is_given), None)
        if given is not None:
            raise ConfigError(
                f"max_loss={self.max_loss:g} is settled once, at the end of a prompt, and {given} evicts at other "
                "times: use prefill='single' or 'chunked', decode='grow' or 'periodic' and recompress_turns=False, or "
                "give compression_ratio instead."
            )

    def _check_profile(self) -> None:
        object.__setattr__(self, "profile", check_profile(self.profile))
        uses_profile = self.strategy in PROFILE_USERS or self.head_budgets == "profile"
        given = isinstance(self.profile, RankProfile)
        if given and self.strategy is None and self.head_budgets == "distortion":
            raise ConfigError(
                "head_budgets='distortion' measures the prompt and uses no profile, but one is given: leave one of "
                "them out, or use head_budgets='profile'."
            )
        if (
            given
            and self.strategy is not None
            and not uses_profile
            and self.strategy not in SCORE_WEIGHT_USERS
        ):
            raise ConfigError(
                f"strategy={self.strategy!r} uses no profile, but one is given: leave one of them out, or use strategy "
                f"{' or '.join(map(repr, PROFILE_USERS))}, or head_budgets='profile'."
            )
        if self.profile is None and uses_profile:
            user = (
                f"strategy={self.strategy!r}" if self.strategy in PROFILE_USERS else "head_budgets='profile'"
            )
            raise ConfigError(
                f"{user} needs a profile, but profile=None forbids one: use profile='auto' or give a RankProfile."
            )

    @property
    def keeps_all(self) -> bool:
        """True if nothing can be evicted: the ratio is 1 and nothing else sets the size."""
        sized = self.max_loss is not None or self.strategy in SIZING_STRATEGIES
        return self.compression_ratio == 1.0 and self.budget is None and not sized

    def resolve_strategy(self) -> tuple[str, dict[str, Any]]:
        """Return the name and options of the strategy, with the defaults filled in."""
        options = dict(self.strategy_options or {})
        if self.strategy is not None:
            return self.strategy, options
        calibrated = isinstance(self.profile, RankProfile) or self.head_budgets == "profile"
        if calibrated and self.head_budgets != "distortion":
            return PROFILED_STRATEGY, options
        return DEFAULT_STRATEGY, options

    def to_dict(self) -> dict[str, Any]:
        """Return all options as JSON-ready values."""
        record = {item.name: getattr(self, item.name) for item in fields(self)}
        record["selector"] = str(self.selector)
        record["strategy"], record["strategy_options"] = self.resolve_strategy()
        if isinstance(self.profile, RankProfile):
            record["profile"] = self.profile.to_dict()
        return record


def join_options(options: Mapping[str, Any]) -> RankKVConfig:
    """Return the config that is given as ``config``, or the one of single options.

    Raises
    ------
    ConfigError
        If both are given, or ``config`` is something else.

    Examples
    --------
    >>> join_options({"config": RankKVConfig(0.2)}) == join_options({"compression_ratio": 0.2})
    True
    """
    config = options.get("config")
    if config is None:
        return RankKVConfig(**{name: value for name, value in options.items() if name != "config"})
    if len(options) > 1 or not isinstance(config, RankKVConfig):
        raise ConfigError(BOTH_GIVEN)
    return config


def complete_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return new options, plus resets for the old options they would conflict with.

    A new ratio resets ``budget``, which would override it, and ``max_loss``.  A new ``max_loss`` resets the ratio and
    the budget.  A new strategy resets the old strategy's options.

    Examples
    --------
    >>> complete_options({"budget": 64, "strategy": "uniform"})
    {'strategy_options': None, 'budget': 64, 'strategy': 'uniform'}
    >>> RankKVConfig(0.5, **complete_options({"budget": 64})).compression_ratio
    0.5
    """
    unset: dict[str, Any] = {}
    if "compression_ratio" in given:
        unset["budget"] = None
        unset["max_loss"], unset["on_doubt"] = None, "say"
    if "max_loss" in given:
        unset["compression_ratio"], unset["budget"] = DEFAULT_RATIO, None
    if "strategy" in given:
        unset["strategy_options"] = None
    return {**unset, **given}


def check_compression_ratio(compression_ratio: float) -> float:
    """Return ``compression_ratio`` as a float if it lies in (0, 1].

    Parameters
    ----------
    compression_ratio : float
        Fraction of the KV cache that is kept (compressed size / original size).

    Raises
    ------
    ConfigError
        If the value is not a number in (0, 1].

    Examples
    --------
    >>> check_compression_ratio(0.3)
    0.3
    """
    is_number = isinstance(compression_ratio, int | float) and not isinstance(compression_ratio, bool)
    if not is_number or not 0.0 < compression_ratio <= 1.0:
        raise ConfigError(
            f"compression_ratio={compression_ratio!r} is outside (0, 1]: it is the fraction of the KV cache that is "
            "kept (0.3 keeps 30%; kvpress means the fraction removed)."
        )
    return float(compression_ratio)


def check_max_loss(max_loss: object) -> float:
    """Return ``max_loss`` as a float if it lies in (0, 10].

    Raises
    ------
    ConfigError
        If the value is not a number in (0, 10].

    Examples
    --------
    >>> check_max_loss(0.05)
    0.05
    """
    is_number = isinstance(max_loss, int | float) and not isinstance(max_loss, bool)
    if not is_number or not 0.0 < max_loss <= MOST_LOSS:  # type: ignore[operator]
        raise ConfigError(
            f"max_loss={max_loss!r} is outside (0, {MOST_LOSS:g}]: give the loss to stay below in nats per token, such "
            "as 0.05."
        )
    return float(max_loss)  # type: ignore[arg-type]


def check_predicted(max_loss: float | None, selector: str) -> None:
    """Check that the loss of a selector can be predicted, if ``max_loss`` is given.

    Raises
    ------
    ConfigError
        If it was not measured.

    Examples
    --------
    >>> check_predicted(0.05, "echo")
    """
    if max_loss is None or selector in (*PREDICTED_SELECTORS, AUTO_SELECTOR):
        return
    raise ConfigError(
        f"max_loss={max_loss:g} needs the measured loss of a selector, and that of {selector!r} was not measured: use "
        f"selector {' or '.join(map(repr, PREDICTED_SELECTORS))}, or compression_ratio instead."
    )


def check_spans(protect: Any) -> tuple[tuple[int, int], ...]:
    """Return the spans ``(start, stop)`` of real tokens (padding not counted) as a tuple of tuples.

    Parameters
    ----------
    protect : iterable of (int, int), or None
        Half-open spans, ``0 <= start < stop``.

    Raises
    ------
    ConfigError
        If an entry is not such a pair.

    Examples
    --------
    >>> check_spans([(0, 12)])
    ((0, 12),)
    """
    if protect is None:
        return ()
    spans = list(protect) if isinstance(protect, Iterable) and not isinstance(protect, str) else [protect]
    for span in spans:
        numbers = isinstance(span, Sequence) and len(span) == 2 and all(type(bound) is int for bound in span)
        if not numbers or not 0 <= span[0] < span[1]:
            raise ConfigError(
                f"protect={protect!r}: {span!r} is not a span; give pairs (start, stop) of token indices with "
                "0 <= start < stop, such as [(0, 24)] for a system prompt of 24 tokens."
            )
    return tuple((int(start), int(stop)) for start, stop in spans)


def count_spanned(protect: Sequence[tuple[int, int]], length: int) -> int:
    """Count the tokens among ``length`` that lie in at least one span ``(start, stop)``.

    Examples
    --------
    >>> count_spanned([(0, 4), (2, 6)], length=5)
    5
    """
    return len({index for start, stop in protect for index in range(start, min(stop, length))})


def _check_int(name: str, value: object, minimum: int, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {minimum}: {meaning}.")


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnknownNameError.of(name, value, known)


def _check_floor(head_floor: object) -> None:
    is_number = isinstance(head_floor, int | float) and not isinstance(head_floor, bool)
    if not is_number or not 0.0 <= head_floor <= 1.0:  # type: ignore[operator]
        raise ConfigError(
            f"head_floor={head_floor!r} is outside [0, 1]: give the fraction of a layer's budget that every head "
            "keeps (1 gives all heads of a layer the same)."
        )
