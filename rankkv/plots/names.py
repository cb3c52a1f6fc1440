"""Names of methods as papers and readers write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

SELECTORS = {
    "snapkv": "SnapKV",
    "h2o": "H2O",
    "streaming_llm": "StreamingLLM",
    "tova": "TOVA",
    "knorm": "Key norm",
    "keydiff": "KeyDiff",
    "expected_attention": "Expected Attention",
    "lagkv": "LagKV",
    "qfilter": "Q-Filters",
    "cur": "CurDKV",
    "lava": "LAVa",
    "criticalkv": "CriticalKV",
    "chunkkv": "ChunkKV",
    "echo": "Echo",
    "kvzip": "KVzip",
    "kvzip_plus": "KVzip+",
    "kvgrad": "KVgrad",
    "dropkv": "DropKV",
    "defensivekv": "DefensiveKV",
    "capkv": "CapKV",
    "compactor": "Compactor",
    "r_kv": "R-KV",
    "triattention": "TriAttention",
    "random": "Random tokens",
}
BUDGETS = {
    "uniform": "Uniform",
    "pyramid": "PyramidKV",
    "cake": "CAKE",
    "lava": "LAVa",
    "default": "RankKV (default)",
    "distortion": "RankKV (default)",
    "RankKV": "RankKV (default)",
    "auto": "RankKV (with profile)",
    "blend": "RankKV (with profile)",
    "RankKV, profile": "RankKV (with profile)",
    "layers": "RankKV (equal heads)",
    "RankKV, layers": "RankKV (equal heads)",
    "layers-profile": "RankKV (profile, equal heads)",
    "proportional": "Proportional to rank",
    "softmax": "Softmax of rank",
    "adaptive": "Adaptive",
    "power": "Power of rank",
    "whole": "Rank of all attention",
    "inverse": "Inverse rank",
    "global": "One top-k over all layers",
    "kvcompose": "KVCompose",
    "random": "Random budgets",
}
_CACHES = {"full": "Full cache", "blank": "Full cache, no answer in it"}


def name_model(model: str) -> str:
    """Return a model's name for readers; the embedded model is SmolLM2.

    Examples
    --------
    >>> name_model("embedded"), name_model("some/model")
    ('SmolLM2-135M-Instruct', 'some/model')
    """
    return "SmolLM2-135M-Instruct" if model == "embedded" else model


def name_selector(selector: str) -> str:
    """Return a selector's name for readers; of an unknown one, the name itself.

    Examples
    --------
    >>> name_selector("streaming_llm"), name_selector("mine")
    ('StreamingLLM', 'mine')
    """
    return SELECTORS.get(selector, selector)


def name_budgets(strategy: str) -> str:
    """Return a budget strategy's name for readers; of an unknown one, the name itself.

    Examples
    --------
    >>> name_budgets("pyramid"), name_budgets("default")
    ('PyramidKV', 'RankKV (default)')
    """
    return BUDGETS.get(strategy, strategy)


def name_method(method: str) -> str:
    """Return the name for readers of a method, ``"selector + strategy"``; other names stay as they are.

    Examples
    --------
    >>> name_method("snapkv + default"), name_method("full"), name_method("my own")
    ('SnapKV + RankKV (default)', 'Full cache', 'my own')
    """
    selector, plus, strategy = method.partition(" + ")
    if plus and selector in SELECTORS and strategy in BUDGETS:
        return f"{name_selector(selector)} + {name_budgets(strategy)}"
    return _CACHES.get(method, method)


def name_methods(methods: Iterable[str]) -> dict[str, str]:
    """Return methods to their names for readers; two that would share a name keep their own.

    Examples
    --------
    >>> list(name_methods(["snapkv + uniform", "snapkv + default", "snapkv + distortion"]).values())
    ['SnapKV + Uniform', 'snapkv + default', 'snapkv + distortion']
    """
    named = {method: name_method(method) for method in methods}
    uses = Counter(named.values())
    return {method: name if uses[name] == 1 else method for method, name in named.items()}
