"""For ``model.generate(custom_generate=...)``: as a function, or as a folder that asks for no line of RankKV's own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import DynamicCache
from transformers.generation import GenerationMixin

from .._version import __version__
from ..cache.cache import RankKVCache
from ..cache.saving import describe_selector, restore_selector
from ..config import RankKVConfig, complete_options
from ..errors import CacheStateError, ConfigError, InputError
from ..models.compat import cache_argument
from ..profile.record import RankProfile
from ..selection import get_selector
from ..utils.files import write_text_atomically

_OPTIONS = {item.name: item for item in fields(RankKVConfig)}
_CACHE_NAMES = ("cache", "past_key_values")
#: The methods of transformers' GenerationMixin for each way of decoding; they are what a callable is told to use.
_LOOPS = {
    "greedy_search": "_sample",
    "sample": "_sample",
    "beam_search": "_beam_search",
    "beam_sample": "_beam_search",
}

_FUNCTION = '''"""Generation from a KV cache that RankKV compresses; written by `rankkv export-generate`."""

import json

from rankkv.integrations.generate import generate_with

# Options of rankkv.RankKVConfig; what generate() is given by name replaces them.
OPTIONS = json.loads({options!r})


def generate(inputs=None, *, model, **arguments):
    """Generate as model.generate() does, from a compressed cache."""
    return generate_with(OPTIONS, model, inputs=inputs, **arguments)
'''

_CARD = """---
library_name: transformers
tags:
  - custom_generate
---

# Generation from a compressed KV cache

`model.generate(..., custom_generate="FOLDER", trust_remote_code=True)` with the path or the hub id of this folder keeps
a part of the KV cache only. It imports RankKV, which must be installed (`rankkv>={version}`). All arguments of
`generate()` work as always; options of RankKV, such as `compression_ratio` (the fraction of the cache that is
**kept**), `budget` or `selector`, are given beside them.

Options of this folder:

```json
{options}
```
"""


def generate(model: Any, inputs: Any = None, **arguments: Any) -> Any:
    """Generate as ``model.generate`` does, from a cache that is compressed after the prefill.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    inputs : Tensor, optional
        ``[batch, token]``, as for ``model.generate``; ``input_ids=`` works too.
    **arguments
        Options of :class:`~rankkv.RankKVConfig` or ``config=``, and all arguments of ``model.generate``.

    Returns
    -------
    Tensor or GenerateOutput
        What ``model.generate`` returns.

    Raises
    ------
    ConfigError
        If a cache is given and options too.
    RankKVError
        As :class:`~rankkv.RankKVCache`.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> generate(model, torch.arange(40)[None], compression_ratio=0.5, max_new_tokens=2, eos_token_id=None).shape
    torch.Size([1, 42])
    """
    return generate_with({}, model, inputs=inputs, **arguments)


def generate_with(preset: Mapping[str, Any], model: Any, **arguments: Any) -> Any:
    """Generate as :func:`generate` does, with options that those of the call replace.

    Parameters
    ----------
    preset : mapping
        Options as :func:`export_generate` writes them.
    model : PreTrainedModel
        A causal language model.
    **arguments
        As for :func:`generate`.
    """
    given = {name: arguments.pop(name) for name in (*_OPTIONS, "config") if name in arguments}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    cache = _take_cache(arguments)
    cache = _choose_cache(model, cache, given, preset)
    # The class' own method: a model loaded from such a folder carries this function under the name `generate`.
    return type(model).generate(model, **arguments, **cache_argument(cache))


def custom_generate(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **arguments: Any,
) -> Any:
    """Decode from a compressed cache: the function for ``model.generate(custom_generate=custom_generate, ...)``.

    Options of :class:`~rankkv.RankKVConfig` are given to ``model.generate`` beside it; everything else is prepared by
    transformers, which then calls this function.  Greedy, sampled and beam decoding; transformers hands no streamer to
    such a function, so to stream pass ``cache=RankKVCache(model)`` instead.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : Tensor
        ``[batch, token]``, one row a beam.
    logits_processor, stopping_criteria, generation_config
        As transformers prepared them.
    **arguments
        RankKV's options and the arguments of the model's forward.

    Raises
    ------
    ConfigError
        If this way of decoding needs more than a cache, such as assisted decoding, or another kind of cache is asked
        for.
    CacheStateError
        If a cache of another kind that already holds tokens is given.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> model.generate(torch.arange(40)[None], custom_generate=custom_generate, compression_ratio=0.5,
    ...     max_new_tokens=2, eos_token_id=None).shape
    torch.Size([1, 42])
    """
    given = {name: arguments.pop(name) for name in (*_OPTIONS, "config") if name in arguments}
    mode = str(getattr(generation_config.get_generation_mode(), "value", ""))
    if mode not in _LOOPS:
        raise ConfigError(
            f"custom_generate does not decode by {mode.replace('_', ' ')}: pass cache=RankKVCache(model) to generate() "
            "instead, which takes every way of decoding that RankKV supports."
        )
    prepared = _take_cache(arguments)
    if not isinstance(prepared, RankKVCache):
        # transformers makes a plain one where none is given, which cannot be told from one that is given.
        if prepared is not None and type(prepared) is not DynamicCache:
            raise ConfigError(
                f"a {type(prepared).__name__} is asked for, by cache= or by cache_implementation=, and custom_generate "
                "makes a RankKVCache: leave it out."
            )
        if prepared is not None and prepared.get_seq_length() > 0:
            raise CacheStateError(
                "the cache given already holds tokens that RankKV has not seen: give a RankKVCache, or none."
            )
        prepared = None
    cache = _choose_cache(model, prepared, given, {})
    decode = getattr(GenerationMixin, _LOOPS[mode])
    return decode(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **arguments,
        **cache_argument(cache),
    )


def _name_options(function: Callable[..., Any]) -> None:
    """Put RankKV's options into the signature, where transformers looks for what it may hand on."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if item.default is MISSING else item.default,
            annotation=item.type,
        )
        for name, item in _OPTIONS.items()
    ]
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None)
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:-1], *options, config, parameters[-1]]
    )


_name_options(custom_generate)


def export_generate(folder: str | Path, **options: Any) -> Path:
    """Write a folder for ``model.generate(custom_generate=folder, trust_remote_code=True)``.

    The folder holds one short Python file that imports RankKV, its requirement, and a model card, so it can be used
    from disk or uploaded to a hub; transformers runs its code only where the user says ``trust_remote_code=True``.

    Parameters
    ----------
    folder : str or Path
        Where it goes; files of these names are replaced.
    **options
        Options of :class:`~rankkv.RankKVConfig` that the folder starts from, such as ``compression_ratio``.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ConfigError, UnknownNameError
        If an option is unknown or outside its range.
    InputError
        If the folder cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> folder = export_generate(tempfile.mkdtemp(), compression_ratio=0.2)
    >>> sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    ['README.md', 'custom_generate/generate.py', 'custom_generate/requirements.txt']
    """
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise ConfigError(f"no option of RankKVConfig: {', '.join(unknown)}. Known: {', '.join(_OPTIONS)}.")
    config = RankKVConfig(**options)
    record = {name: _to_plain(name, getattr(config, name)) for name in options}
    folder = Path(folder).expanduser()
    text = json.dumps(record, sort_keys=True)
    is_long = isinstance(record.get("profile"), dict)
    shown = json.dumps(record | ({"profile": "..."} if is_long else {}), sort_keys=True, indent=2)
    try:
        write_text_atomically(folder / "custom_generate" / "generate.py", _FUNCTION.format(options=text))
        write_text_atomically(folder / "custom_generate" / "requirements.txt", f"rankkv>={__version__}\n")
        write_text_atomically(folder / "README.md", _CARD.format(version=__version__, options=shown))
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r}: {error.strerror or error}.") from error
    return folder


def _to_plain(name: str, value: Any) -> Any:
    if isinstance(value, RankProfile):
        return value.to_dict()
    if isinstance(value, Mapping):
        return dict(value)
    if name == "selector":
        return describe_selector(get_selector(value))
    return value


def _take_cache(arguments: dict[str, Any]) -> Any:
    found = [arguments.pop(name) for name in _CACHE_NAMES if name in arguments]
    return next((cache for cache in found if cache is not None), None)


def _choose_cache(model: Any, cache: Any, given: Mapping[str, Any], preset: Mapping[str, Any]) -> Any:
    """Return the cache that was given, else a new one with the options of the call over those preset."""
    if cache is not None:
        if given:
            raise ConfigError(
                f"a cache is given, and {', '.join(given)} too, which only a new cache could follow: leave one of them "
                "out."
            )
        return cache
    if given.get("config") is not None:
        return RankKVCache(model, **given)
    options = {**preset, **complete_options(given)}
    options.pop("config", None)
    if isinstance(options.get("selector"), Mapping):
        options["selector"] = restore_selector(options["selector"])
    return RankKVCache(model, config=RankKVConfig(**options))
