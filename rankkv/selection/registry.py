"""Registry of selectors: one entry per method, and the functions that read and extend it."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..config import AUTO_SELECTOR
from ..errors import ConfigError, UnknownNameError
from ..utils.registry import add_entry, remove_entry
from .base import NEEDS, REPLAY, Selector, WrappingSelector
from .capkv import score_capkv
from .chunkkv import refine_chunkkv
from .compactor import score_compactor
from .criticalkv import refine_criticalkv
from .cur import score_cur
from .defensivekv import score_defensivekv
from .dropkv import score_dropkv
from .echo import score_echo
from .expected_attention import score_expected_attention
from .h2o import score_h2o
from .keydiff import score_keydiff
from .knorm import score_knorm
from .kvgrad import score_kvgrad
from .kvzip import score_kvzip, score_kvzip_plus
from .lagkv import score_lagkv
from .lava import score_lava
from .qfilter import score_qfilter
from .r_kv import refine_r_kv
from .random import score_random
from .snapkv import score_snapkv
from .streaming_llm import score_streaming_llm
from .tova import score_tova
from .triattention import score_triattention

_SNAPKV = Selector(
    "snapkv", score_snapkv, "window attention", "arXiv:2404.14469", "O(window x keys)", comparable=True
)

SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        _SNAPKV,
        Selector(
            "h2o",
            score_h2o,
            "whole attention",
            "arXiv:2306.14048",
            "O(queries x keys)",
            step="sum",
            comparable=True,
        ),
        Selector(
            "streaming_llm", score_streaming_llm, "nothing", "arXiv:2309.17453", "O(keys)", step="rescore"
        ),
        Selector(
            "tova",
            score_tova,
            "window attention",
            "arXiv:2401.06104",
            "O(keys)",
            step="rescore",
            comparable=True,
        ),
        Selector("knorm", score_knorm, "keys only", "arXiv:2406.11430", "O(keys)", step="rescore"),
        Selector("keydiff", score_keydiff, "keys only", "arXiv:2504.15364", "O(keys)", step="rescore"),
        Selector("lagkv", score_lagkv, "keys and values", "arXiv:2504.04704", "O(keys)", step="rescore"),
        Selector(
            "expected_attention",
            score_expected_attention,
            "queries",
            "arXiv:2510.00636",
            "O(queries x head_dim + keys x head_dim)",
            step="rescore",
            past_queries="unturned",
            comparable=True,
        ),
        Selector(
            "echo",
            score_echo,
            "queries",
            "this project",
            "O(chunk x queries + keys x head_dim)",
            step="max",
            past_queries="unturned",
            turns=True,
            whole_prompt=True,
            comparable=True,
            projection_option="value_norms",
            strategy="global",
        ),
        Selector(
            "qfilter",
            score_qfilter,
            "keys only",
            "arXiv:2503.02812",
            "O(keys)",
            step="rescore",
            past_queries="turned",
            fallback=("filters", "no filters given: the prompt's own queries stand in for calibration"),
        ),
        Selector("cur", score_cur, "keys and values", "arXiv:2509.15038", "O(keys)", step="rescore"),
        Selector(
            "lava", score_lava, "window attention", "arXiv:2509.09754", "O(window x keys)", comparable=True
        ),
        WrappingSelector.of(
            _SNAPKV,
            "criticalkv",
            refine_criticalkv,
            "arXiv:2502.03805",
            "O(window x keys + hidden x keys)",
            wraps=("window attention", "whole attention", "queries"),
            projection_option="projection",
        ),
        WrappingSelector.of(_SNAPKV, "chunkkv", refine_chunkkv, "arXiv:2502.00299", "O(window x keys)"),
        Selector(
            "kvzip",
            score_kvzip,
            REPLAY,
            "arXiv:2505.23416",
            "O(chunk x keys)",
            comparable=True,
            strategy="global",
        ),
        Selector(
            "kvzip_plus",
            score_kvzip_plus,
            REPLAY,
            "arXiv:2601.07891",
            "O(chunk x keys + keys x head_dim)",
            comparable=True,
            projection_option="",
            strategy="global",
        ),
        Selector(
            "kvgrad",
            score_kvgrad,
            REPLAY,
            "OpenReview:cg1wTCJjjk",
            "O(chunk x keys + keys x head_dim + backward pass)",
            comparable=True,
            projection_option="",
            strategy="global",
            gradient=True,
        ),
        Selector(
            "dropkv",
            score_dropkv,
            "window attention",
            "OpenReview:MqfNzH3TVH",
            "O(window x keys)",
            step="mean",
            comparable=True,
        ),
        Selector(
            "defensivekv",
            score_defensivekv,
            "window attention",
            "arXiv:2510.13334",
            "O(window x keys + hidden x keys)",
            step="max",
            comparable=True,
            projection_option="projection",
        ),
        Selector(
            "capkv",
            score_capkv,
            "queries",
            "arXiv:2604.25975",
            "O(queries x head_dim + keys x head_dim)",
            step="rescore",
            past_queries="unturned",
        ),
        Selector(
            "compactor",
            score_compactor,
            "queries",
            "arXiv:2507.08143",
            "O(chunk x queries + keys x sketch)",
            step="mean",
            turns=True,
            whole_prompt=True,
            comparable=True,
        ),
        WrappingSelector.of(
            _SNAPKV,
            "r_kv",
            refine_r_kv,
            "arXiv:2505.24133",
            "O(window x keys + keys^2)",
            wraps=("window attention", "whole attention"),
        ),
        Selector(
            "triattention",
            score_triattention,
            "keys only",
            "arXiv:2604.04921",
            "O(keys)",
            step="rescore",
            turns=True,
            required="centres",
        ),
        Selector("random", score_random, "nothing", "control", "O(keys)", step="rescore"),
    )
}
_BUILT_IN = frozenset(SELECTORS)


def get_selector(selector: str | Selector, **options: Any) -> Selector:
    """Return a registered selector, with options bound.

    Parameters
    ----------
    selector : str or Selector
        Registry key, or a selector, which is returned as it is if no options are given.  ``"auto"`` is SnapKV.
    **options
        Options of the method, such as ``pooling="avg"`` for SnapKV or ``recent_fraction=0.5`` for H2O.

    Raises
    ------
    UnknownNameError
        If no selector of that name, or of the name that ``base`` gives, is registered.
    ConfigError
        If the method has no option of that name, ``recent_fraction`` is outside [0, 1], or the method cannot refine
        the scores of ``base``.

    Examples
    --------
    >>> get_selector("h2o", recent_fraction=0.5).recent_fraction
    0.5
    """
    if not isinstance(selector, Selector):
        if selector == AUTO_SELECTOR:
            selector = _SNAPKV.name
        if selector not in SELECTORS:
            raise UnknownNameError.of("selector", selector, SELECTORS)
        selector = SELECTORS[selector]
    base = options.get("base")
    if isinstance(base, str) and isinstance(selector, WrappingSelector):
        bound = selector.with_options(**{**options, "base": get_selector(base)})
        # Keep the name as the option's value: it is what records and messages show.
        return replace(bound, options=MappingProxyType({**bound.options, "base": base}))
    return selector.with_options(**options) if options else selector


def register_selector(selector: Selector) -> Selector:
    """Add a selector to the registry, so that every option ``selector`` accepts its name.

    Parameters
    ----------
    selector : Selector
        Name, ``score(observation, **options)``, needs, source and cost of the method.

    Returns
    -------
    Selector
        The same selector.

    Raises
    ------
    ConfigError
        If it is not a `Selector`, its name is taken or not a Python name, or its ``needs`` are not in `NEEDS`.

    Examples
    --------
    >>> def score_oldest(observation):
    ...     return -observation.real_index.float()
    >>> oldest = register_selector(Selector("oldest", score_oldest, "nothing", "this example", "O(keys)"))
    >>> get_selector("oldest") is oldest
    True
    >>> unregister_selector("oldest")
    """
    if not isinstance(selector, Selector):
        raise ConfigError(f"{selector!r} is not a Selector: build one around your scoring function.")
    if selector.needs not in NEEDS:
        raise ConfigError(
            f"needs={selector.needs!r} of selector {selector.name!r} must be one of: {', '.join(NEEDS)}."
        )
    add_entry(SELECTORS, "selector", selector.name, selector)
    return selector


def unregister_selector(name: str) -> None:
    """Remove a selector that :func:`register_selector` added.

    Raises
    ------
    UnknownNameError
        If :func:`register_selector` added no selector of that name.
    """
    remove_entry(SELECTORS, "selector", name, _BUILT_IN)
