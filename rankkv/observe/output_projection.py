"""The output projection of an attention module, found by shape and name in any architecture."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..models.tensor_parallel import take_local

# Names of projections to queries, keys, values or a gate, alone or fused.
_INPUT_NAME = re.compile(r"^(w?(q|k|v|kv|qk|qkv)|query|key|value|gate|g|c_attn|q_attn)(_|$)", re.IGNORECASE)


def find_output_projection(module: nn.Module | None, width: int, parts: int = 1) -> nn.Module | None:
    """Find the projection that an attention module applies to its heads' joined outputs.

    It is the only child with ``width`` inputs whose name does not mark it as a projection to queries, keys, values or a
    gate.

    Parameters
    ----------
    module : nn.Module, optional
        The attention module.
    width : int
        Query heads times the values' head_dim.
    parts : int, default 1
        Number of tensor-parallel processes that share the heads, and so the projection's inputs.

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
        if not _INPUT_NAME.match(name) and _count_inputs(child) == width * parts
    ]
    return found[0] if len(found) == 1 else None


def compute_projection_matrix(projection: nn.Module, width: int, like: Tensor, parts: int = 1) -> Tensor:
    """Compute the matrix ``W [width, hidden]`` with ``projection(x) = x W + b``.

    Parameters
    ----------
    projection : nn.Module
        A linear module, with or without bias. The weight of a plain ``nn.Linear`` is read. Any other module
        (transposed, quantized, with an adapter, offloaded) is applied to the identity.
    width : int
        Number of inputs; if they are split over processes, those of this process's heads.
    like : Tensor
        Gives device and dtype.
    parts : int, default 1
        Number of processes that share the inputs.

    Returns
    -------
    Tensor
        ``[width, hidden]``, on the device and in the dtype of ``like``.

    Raises
    ------
    UnsupportedModelError
        If the projection is split over processes and is not a plain matrix, so that this process's part cannot be read.
    """
    weight = getattr(projection, "weight", None)
    if type(projection) is nn.Linear and isinstance(weight, Tensor) and not weight.is_meta:
        weight = take_local(weight.detach())
        if parts == 1 or weight.shape[1] == width:
            return weight.T.to(device=like.device, dtype=like.dtype)
    if parts > 1:
        raise UnsupportedModelError(
            f"the output projection, a {type(projection).__name__}, is split over {parts} tensor-parallel processes "
            "and is not a plain matrix: use a selector or strategy that does not read it."
        )
    with torch.no_grad():
        # The zero row gives the bias.
        identity = torch.eye(width, device=like.device, dtype=like.dtype)
        outputs = projection(torch.cat([identity, torch.zeros_like(identity[:1])])[None])[0]
    return (outputs[:-1] - outputs[-1]).to(like.dtype)


def _count_inputs(module: nn.Module) -> int | None:
    """Return the number of inputs of a linear module; None for other modules."""
    for name in ("in_features", "nx"):
        count = getattr(module, name, None)
        if isinstance(count, int):
            return count
    weight = getattr(module, "weight", None)
    # transformers' Conv1D stores its matrix transposed; older versions have no attribute `nx`.
    is_conv = type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2
    return weight.shape[0] if is_conv and weight is not None else None
