"""The projection behind a layer's attention: found by shape and name, whatever the architecture."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..models.tensor_parallel import take_local

# What makes queries, keys, values or a gate, alone or fused, as models name it.
_INPUT = re.compile(r"^(w?(q|k|v|kv|qk|qkv)|query|key|value|gate|g|c_attn|q_attn)(_|$)", re.IGNORECASE)


def find_output_projection(module: nn.Module | None, width: int, parts: int = 1) -> nn.Module | None:
    """Find the projection that an attention module applies to its heads' joined outputs.

    Of the module's children it is the one matrix with ``width`` inputs whose name does not say that it makes queries,
    keys, values or a gate.

    Parameters
    ----------
    module : nn.Module, optional
        The attention module.
    width : int
        Query heads times the values' head_dim.
    parts : int, default 1
        Processes over which the heads, and so its inputs, are split (tensor parallelism).

    Returns
    -------
    nn.Module or None
        None if no child fits, or several do.

    Examples
    --------
    >>> attention = nn.Module()
    >>> attention.q_proj, attention.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)
    >>> find_output_projection(attention, 8) is attention.o_proj
    True
    """
    if module is None:
        return None
    found = [
        child
        for name, child in module.named_children()
        if not _INPUT.match(name) and _count_inputs(child) == width * parts
    ]
    return found[0] if len(found) == 1 else None


def compute_projection_matrix(projection: nn.Module, width: int, like: Tensor, parts: int = 1) -> Tensor:
    """Compute the matrix ``W [width, hidden]`` with ``projection(x) = x W + b``.

    Parameters
    ----------
    projection : nn.Module
        Any module that is linear but for a bias: a plain matrix is read; what stores it in another way (transposed,
        quantized, with an adapter, elsewhere) is applied to the identity.
    width : int
        Number of inputs; of one split over processes, those of this process' heads.
    like : Tensor
        Says device and dtype.
    parts : int, default 1
        Processes over which its inputs are split.

    Returns
    -------
    Tensor
        ``[width, hidden]``, on the device and in the dtype of ``like``.

    Raises
    ------
    UnsupportedModelError
        If it is split over processes and no plain matrix, so that this process' part of it cannot be read.
    """
    weight = getattr(projection, "weight", None)
    if type(projection) is nn.Linear and isinstance(weight, Tensor) and not weight.is_meta:
        weight = take_local(weight.detach())
        if parts == 1 or weight.shape[1] == width:
            return weight.T.to(device=like.device, dtype=like.dtype)
    if parts > 1:
        raise UnsupportedModelError(
            f"the output projection, a {type(projection).__name__}, is split over {parts} tensor-parallel processes "
            "and its weights are no plain matrix: use a selector or strategy that does not read it."
        )
    with torch.no_grad():
        identity = torch.eye(width, device=like.device, dtype=like.dtype)
        outputs = projection(torch.cat([identity, torch.zeros_like(identity[:1])])[None])[0]
    return (outputs[:-1] - outputs[-1]).to(like.dtype)


def _count_inputs(module: nn.Module) -> int | None:
    for name in ("in_features", "nx"):
        count = getattr(module, name, None)
        if isinstance(count, int):
            return count
    weight = getattr(module, "weight", None)
    # transformers' Conv1D holds its matrix transposed, and older ones do not say its number of inputs.
    is_conv = type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2
    return weight.shape[0] if is_conv and weight is not None else None
