"""Tensor parallelism: what the processes that hold a layer's heads between them have to tell each other.

Each process sees its own query and key/value heads. Scores of single heads need no other process; a rank, a measure or
a score that joins heads is summed over all of them, so that every process takes the same decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .compat import read_config


@dataclass(frozen=True, eq=False)
class HeadShards:
    """The processes that share the heads of a model's layers, each with the same number of consecutive ones.

    Parameters
    ----------
    group : ProcessGroup
        Of torch.distributed.
    rank : int
        Place of this process in it: it holds the ``rank``-th stretch of heads.
    size : int
        Number of processes.
    """

    group: Any
    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of every process' tensor; all must have the same shape."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of every process' tensor."""
        return self.sum(tensor) / self.size

    def gather_heads(self, tensor: Tensor) -> Tensor:
        """Return ``[batch, all heads, ...]`` from every process' ``[batch, head, ...]``."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def take_own(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this process' stretch of an axis of all heads."""
        return tensor.chunk(self.size, dim=dim)[self.rank]

    def of_layer(self, layer_idx: int, module: nn.Module, heads: int, kv_heads: int) -> HeadShards | None:
        """Return these shards if the heads that reached this layer's attention are one, None if they are all heads.

        Parameters
        ----------
        layer_idx : int
            Index of the layer.
        module : nn.Module
            Its attention module, whose config says how many heads there are in all.
        heads, kv_heads : int
            Query heads that reached it, and key/value heads of its cache.

        Raises
        ------
        UnsupportedModelError
            If the heads are no equal part of all heads.
        """
        config = getattr(module, "config", None)
        total, kv_total = (read_config(config, f"num_{name}_heads") for name in ("attention", "key_value"))
        if total == heads:
            return None
        if total == heads * self.size and kv_heads * self.size in (kv_total or total, total):
            return self
        raise UnsupportedModelError(
            f"layer {layer_idx} has {total} query and {kv_total} key/value heads, and one of {self.size} "
            f"tensor-parallel processes holds {heads} and {kv_heads}: that is no equal part of them, so decisions for "
            "whole layers cannot be joined. Use a number of processes that divides both, or device_map."
        )

    # A process group is one of a kind: a copy of a cache goes on with it.
    def __copy__(self) -> HeadShards:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadShards:
        return self


def find_head_shards(model: Any) -> HeadShards | None:
    """Find the processes that a model loaded with ``tp_plan="auto"`` is shared out to; None if it is whole.

    Parameters
    ----------
    model : PreTrainedModel
        Any model.
    """
    mesh, size = getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None) or 1
    if mesh is None or size == 1:
        return None
    # Its mesh has other axes too where transformers also knows pipelines and replicas.
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    return HeadShards(group, torch.distributed.get_rank(group), size)


def take_local(parameter: Any) -> Tensor:
    """Return what this process holds of a parameter: of a sharded one its part, else all of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def sample_parameter(parameter: Any, count: int) -> Tensor:
    """Take up to ``count`` evenly spread values of a parameter, of a sharded one those of the whole.

    Parameters
    ----------
    parameter : Tensor
        Of any shape; a DTensor must be asked for by all its processes together.
    count : int
        Most values.

    Returns
    -------
    Tensor
        ``[value]``, on the parameter's device.

    Examples
    --------
    >>> sample_parameter(torch.arange(12).view(3, 4), 3).tolist()
    [0, 4, 8]
    """
    parameter = parameter.detach()
    step = max(1, parameter.numel() // count)
    if not hasattr(parameter, "placements"):
        return parameter.reshape(-1)[::step][:count]
    from torch.distributed.tensor import Shard

    mesh, sharded = parameter.device_mesh, []
    for dim, placement in enumerate(parameter.placements):
        if not placement.is_replicate():
            sharded.append((dim, placement))
    local = parameter.to_local()
    if not sharded:
        return local.reshape(-1)[::step][:count]
    dim, placement = sharded[0]
    if len(sharded) > 1 or type(placement) is not Shard:
        return parameter.full_tensor().reshape(-1)[::step][:count]
    places = list(torch.unravel_index(torch.arange(0, parameter.numel(), step)[:count], parameter.shape))
    start = mesh.get_local_rank(dim) * -(-parameter.shape[placement.dim] // mesh.size(dim))
    places[placement.dim] = places[placement.dim] - start
    inside = (places[placement.dim] >= 0) & (places[placement.dim] < local.shape[placement.dim])
    sample = local.new_zeros(len(inside))
    sample[inside.to(local.device)] = local[tuple(place[inside].to(local.device) for place in places)]
    torch.distributed.all_reduce(sample, group=mesh.get_group(dim))
    return sample
