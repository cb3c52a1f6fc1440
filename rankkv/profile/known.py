"""Known profiles: those shipped with the package, those in the user's cache folder, and the search for a model's."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from pathlib import Path
from typing import Any

import torch

from ..errors import RankKVError
from ..models.compat import read_config
from ..models.placement import list_weights, read_weight
from ..models.tensor_parallel import sample_parameter
from ..utils.files import find_cache_folder
from .record import RankProfile, compute_shape_key

# Entries of a model's configuration that must agree with those of its profile.
_SHAPE = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
)
# Parameters sampled, spread over the model, and values of each: enough to recognise the weights.
_SAMPLED_PARAMETERS, _SAMPLED_VALUES = 16, 4


def describe_shape(model: Any) -> dict[str, Any]:
    """Return the entries of a model's configuration that describe its shape.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.

    Returns
    -------
    dict
        Integers and strings, such as ``num_hidden_layers`` and ``model_type``.
    """
    config = model.config.get_text_config(decoder=True)
    found = {name: read_config(config, name) for name in _SHAPE}
    return {name: value for name, value in found.items() if isinstance(value, int | str)}


def sample_weights(model: Any) -> list[float]:
    """Read a few weights that tell the model from another of the same shape.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, on any device and in any floating-point dtype.

    Returns
    -------
    list of float
        Values of up to 16 parameters spread over the model, 4 each, fetched if they are offloaded. Parameters that are
        not floating-point or have no stored values are left out.
    """
    names = list(list_weights(model))
    count = min(_SAMPLED_PARAMETERS, len(names))
    places = [round(i * (len(names) - 1) / max(1, count - 1)) for i in range(count)]
    sample: list[float] = []
    for place in places:
        weight = read_weight(model, names[place])
        if weight is not None and weight.is_floating_point() and weight.numel():
            sample += sample_parameter(weight, _SAMPLED_VALUES).to("cpu", torch.float32).tolist()
    return sample


def list_known_profiles(key: str) -> list[Path]:
    """List the files of known profiles for a shape, the user's own first.

    Parameters
    ----------
    key : str
        Digest from `compute_shape_key`.
    """
    own = sorted(_own_folder().glob(f"*{key}*.json")) if _own_folder().is_dir() else []
    with importlib.resources.as_file(importlib.resources.files("rankkv.profile") / "shipped") as folder:
        return own + sorted(folder.glob(f"*{key}*.json"))


def save_known_profile(profile: RankProfile) -> Path:
    """Save a profile in the user's cache folder, where `find_profile` looks, and return the path."""
    # The digest keeps models of one shape apart.
    digest = hashlib.sha256(repr(profile.weight_sample).encode()).hexdigest()[:8]
    return profile.save(_own_folder() / f"{profile.key}-{digest}.json")


def find_profile(
    model: Any,
    layer_indices: list[int],
    with_heads: bool = False,
    weighs: str | None = None,
    predicts: str | None = None,
) -> RankProfile | None:
    """Find the known profile of a model; None if none is known.

    Weights are read only if a profile of the same shape is known.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    layer_indices : list of int
        Model indices of its compressible layers.
    with_heads : bool, default False
        Prefer a profile with heads over an earlier one that holds layers only.
    weighs : str, optional
        Only find a profile that weighs the scores of this selector.
    predicts : str, optional
        Only find a profile that has the loss curve of this selector.
    """
    shape = describe_shape(model)
    first = None
    for path in list_known_profiles(compute_shape_key(shape)):
        try:
            profile = _load(path, path.stat().st_mtime_ns)
            if weighs is not None and profile.score_weights.get("selector") != weighs:
                continue
            if predicts is not None and predicts not in profile.loss_curves:
                continue
            profile.check_model(shape, sample_weights(model), layer_indices)
        except (RankKVError, OSError):
            # A damaged file or another model's profile must not stop a user who named no profile.
            continue
        if profile.head_gain_divergence or not with_heads:
            return profile
        first = first or profile
    return first


@functools.lru_cache(maxsize=8)
def _load(path: Path, changed_at: int) -> RankProfile:
    # `changed_at` is part of the cache's key: a file written again is read again.
    return RankProfile.load(path)


def _own_folder() -> Path:
    return find_cache_folder() / "profiles"
