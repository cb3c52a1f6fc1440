"""Functions for ``model.generate(custom_generate=...)``, and an export of them as a folder."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import DynamicCache
from transformers.generation import GenerationMixin

from .._version import __version__
from ..cache.cache import RankKVCache
from ..cache.prefill import build_cache, check_same_prompt
from ..cache.saving import restore_selector, serialize_selector
from ..config import RankKVConfig, complete_options
from ..errors import CacheStateError, ConfigError, InputError
from ..models.compat import cache_argument
from ..profile.record import RankProfile
from ..selection import get_selector
from ..utils.files import write_text_atomically

_OPTIONS = {item.name: item for item in fields(RankKVConfig)}
_CACHE_NAMES = ("cache", "past_key_values")
# Inputs of a model that hold a prompt's images, videos, sounds or embeddings.
_MEDIA = re.compile(r"(pixel|image|video|audio|input_features|inputs_embeds)")
#: Decoding methods of transformers' GenerationMixin by generation mode; a custom_generate function has to call them.
_LOOPS = {
    "greedy_search": "_sample",
    "sample": "_sample",
    "beam_search": "_beam_search",
    "beam_sample": "_beam_search",
}

_FUNCTION = '''"""Generation from a KV cache that RankKV compresses; written by `rankkv export-generate`."""

import json

from rankkv.integrations.generate import generate_with

# Options of rankkv.RankKVConfig; options passed to generate() replace them.
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
only a part of the KV cache. It imports RankKV, which must be installed (`rankkv>={version}`). All arguments of
`generate()` work as usual. Options of RankKV are passed beside them, such as `compression_ratio` (the fraction of the
cache that is **kept**), `budget` or `selector`.

Options of this folder:

```json
{options}
```
"""


def generate(model: Any, inputs: Any = None, **arguments: Any) -> Any:
    """Generate like ``model.generate``, from a cache that is compressed after the prefill.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    inputs : Tensor, optional
        ``[batch, token]``, as for ``model.generate``; ``input_ids=`` works too.
    **arguments
        ``config=`` or options of :class:`~rankkv.RankKVConfig`, and all arguments of ``model.generate``.  Selectors
        that replay the prompt need ``tokenizer=``, see :func:`rankkv.compress`.

    Returns
    -------
    Tensor or GenerateOutput
        The result of ``model.generate``.

    Raises
    ------
    ConfigError
        If both a cache and options are given.
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
    """Generate like :func:`generate`, with preset options that the call may replace.

    Parameters
    ----------
    preset : mapping
        Options in the form that :func:`export_generate` writes.
    model : PreTrainedModel
        A causal language model.
    **arguments
        As for :func:`generate`.
    """
    given = _take_options(arguments)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    ids = arguments.get("input_ids", arguments.get("inputs"))
    cache = _choose_cache(model, _take_cache(arguments), given, preset, ids, arguments)
    if ids is not None:
        check_same_prompt(cache, ids, arguments.get("attention_mask"))
    # Not `model.generate`: a model loaded from such a folder has this very function there.
    return type(model).generate(model, **arguments, **cache_argument(cache))


def custom_generate(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    replay_tokenizer: Any = None,
    **arguments: Any,
) -> Any:
    """Decode from a compressed cache: pass this function to ``model.generate(custom_generate=custom_generate, ...)``.

    Options of :class:`~rankkv.RankKVConfig` are passed to ``model.generate`` beside it.  transformers prepares
    everything else, then calls this function.  It supports greedy, sampled and beam decoding.  transformers passes no
    streamer to such a function: to stream, pass ``cache=RankKVCache(model)`` instead.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : Tensor
        ``[batch, token]``, one row per beam.
    logits_processor, stopping_criteria, generation_config
        Prepared by transformers.
    replay_tokenizer : PreTrainedTokenizerBase or ReplayPrompt, optional
        The ``tokenizer`` of :func:`rankkv.compress`, for selectors that replay the prompt.  transformers does not pass
        an argument named ``tokenizer`` on.
    **arguments
        Options of RankKV, and arguments of the model's forward.

    Raises
    ------
    ConfigError
        If the way of decoding needs more than a cache, as assisted decoding does, or another kind of cache is
        requested.
    CacheStateError
        If the given cache is of another kind and already holds tokens.

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
    given = _take_options(arguments)
    mode = str(getattr(generation_config.get_generation_mode(), "value", ""))
    if mode not in _LOOPS:
        raise ConfigError(
            f"custom_generate does not decode by {mode.replace('_', ' ')}: pass cache=RankKVCache(model) to generate() "
            "instead, which supports more ways of decoding."
        )
    prepared = _take_cache(arguments)
    if not isinstance(prepared, RankKVCache):
        # If no cache is given, transformers makes an empty DynamicCache, which looks the same as a given one.
        if prepared is not None and type(prepared) is not DynamicCache:
            raise ConfigError(
                f"cache= or cache_implementation= requests a {type(prepared).__name__}, but custom_generate makes a "
                "RankKVCache: leave it out."
            )
        if prepared is not None and prepared.get_seq_length() > 0:
            raise CacheStateError(
                "the given cache already holds tokens that RankKV has not seen: give a RankKVCache, or no cache."
            )
        prepared = None
    cache = _choose_cache(
        model,
        prepared,
        given,
        {},
        input_ids,
        {**arguments, "tokenizer": replay_tokenizer},
        "replay_tokenizer",
    )
    check_same_prompt(cache, input_ids, arguments.get("attention_mask"), arguments.get("position_ids"))
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
    """Add RankKV's options to the signature, where transformers looks for accepted arguments."""
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

    The folder holds a short Python file that imports RankKV, its requirement, and a model card.  It works from disk or
    from a hub.  transformers runs its code only with ``trust_remote_code=True``.

    Parameters
    ----------
    folder : str or Path
        Path of the folder; existing files of the same names are replaced.
    **options
        Preset options of :class:`~rankkv.RankKVConfig`, such as ``compression_ratio``.

    Returns
    -------
    Path
        Path of the folder.

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
        raise ConfigError(
            f"unknown option of RankKVConfig: {', '.join(unknown)}; known: {', '.join(_OPTIONS)}."
        )
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
        raise InputError(
            f"cannot write to {str(folder)!r} ({error.strerror or error}): use another folder."
        ) from error
    return folder


def _to_plain(name: str, value: Any) -> Any:
    if isinstance(value, RankProfile):
        return value.to_dict()
    if isinstance(value, Mapping):
        return dict(value)
    if name == "selector":
        return serialize_selector(get_selector(value))
    return value


def _take_options(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments.pop(name) for name in (*_OPTIONS, "config") if name in arguments}


def _take_cache(arguments: dict[str, Any]) -> Any:
    # The argument was renamed in transformers 5.24; an explicit None counts as not given.
    found = [arguments.pop(name) for name in _CACHE_NAMES if name in arguments]
    return next((cache for cache in found if cache is not None), None)


def _choose_cache(
    model: Any,
    cache: Any,
    given: Mapping[str, Any],
    preset: Mapping[str, Any],
    input_ids: Any,
    arguments: Mapping[str, Any],
    tokenizer_name: str = "tokenizer",
) -> Any:
    """Return the given cache, or a new one with the options of the call over the preset ones."""
    if cache is not None:
        if given:
            raise ConfigError(
                f"a cache is given, but {', '.join(given)} can only apply to a new one: leave one of them out."
            )
        return cache
    config = given.get("config")
    if config is None:
        options = {**preset, **complete_options(given)}
        options.pop("config", None)
        if isinstance(options.get("selector"), Mapping):
            options["selector"] = restore_selector(options["selector"])
        config = RankKVConfig(**options)
    elif len(given) > 1:
        # The cache's own message: either the config or single options.
        return RankKVCache(model, **given)
    if not get_selector(config.selector).replays:
        return RankKVCache(model, config=config)
    if input_ids is None:
        raise InputError(
            f"selector {str(config.selector)!r} repeats the token ids of the prompt, and none are given: give "
            "input_ids."
        )
    media = [name for name in arguments if _MEDIA.match(name) and arguments[name] is not None]
    tokenizer = arguments.get("tokenizer")
    if tokenizer is None:
        raise ConfigError(
            f"selector {str(config.selector)!r} asks the model to repeat the prompt, and needs the tokenizer for that: "
            f"give {tokenizer_name}=tokenizer."
        )
    return build_cache(model, input_ids, tokenizer, media, config=config)
