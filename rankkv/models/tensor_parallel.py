"""Tensor parallelism: the exchange between the processes that share a layer's heads.

Each process holds its own query and key/value heads.  Scores of single heads need no exchange.  A rank, measure or
score over several heads is summed over all processes, so that every process makes the same decision.
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
    """The processes that share the heads of a model's layers, each with equally many consecutive heads.

    Parameters
    ----------
    group : ProcessGroup
        Of torch.distributed.
    rank : int
        Number of this process in the group; it holds the ``rank``-th block of heads.
    size : int
        Number of processes.
    """

    group: Any
    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of every process's tensor; all must have the same shape."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of every process's tensor."""
        return self.sum(tensor) / self.size

    def gather_heads(self, tensor: Tensor) -> Tensor:
        """Return ``[batch, all heads, ...]`` from every process's ``[batch, head, ...]``."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def take_own(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this process's block of an axis over all heads."""
        return tensor.chunk(self.size, dim=dim)[self.rank]

    def of_layer(self, layer_idx: int, module: nn.Module, heads: int, kv_heads: int) -> HeadShards | None:
        """Return these shards if this process holds one part of the layer's heads, None if it holds all.

        Parameters
        ----------
        layer_idx : int
            Index of the layer.
        module : nn.Module
            Its attention module, whose config gives the total numbers of heads.
        heads, kv_heads : int
            Query heads and key/value heads in this process.

        Raises
        ------
        UnsupportedModelError
            If the heads are not an equal part of all heads.
        """
        config = getattr(module, "config", None)
        total, kv_total = (read_config(config, f"num_{name}_heads") for name in ("attention", "key_value"))
        if total == heads:
            return None
        if total == heads * self.size and kv_heads * self.size in (kv_total or total, total):
            return self
        raise UnsupportedModelError(
            f"layer {layer_idx} has {total} query and {kv_total} key/value heads, but one of {self.size} "
            f"tensor-parallel processes holds {heads} and {kv_heads}, not an equal part: use a number of processes "
            "that divides both, or device_map."
        )

    # A process group cannot be copied: copies of a cache share it.
    def __copy__(self) -> HeadShards:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadShards:
        return self


def find_head_shards(model: Any) -> HeadShards | None:
    """Find the processes that share a model loaded with ``tp_plan="auto"``; None if the model is not split.

    Parameters
    ----------
    model : PreTrainedModel
        Any model.
    """
    mesh, size = getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None) or 1
    if mesh is None or size == 1:
        return None
    # Newer transformers may add axes for pipelines and replicas to the mesh.
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    return HeadShards(group, torch.distributed.get_rank(group), size)


def take_local(parameter: Any) -> Tensor:
    """Return this process's part of a sharded parameter, or the whole of another one."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def sample_parameter(parameter: Any, count: int) -> Tensor:
    """Take up to ``count`` evenly spread values of a parameter; of a sharded one, over all its parts.

    Parameters
    ----------
    parameter : Tensor
        Of any shape. All processes of a DTensor must call this together.
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
    # Each process fills in the sampled values that it holds; the sum over processes has all of them.
    places = list(torch.unravel_index(torch.arange(0, parameter.numel(), step)[:count], parameter.shape))
    start = mesh.get_local_rank(dim) * -(-parameter.shape[placement.dim] // mesh.size(dim))
    places[placement.dim] = places[placement.dim] - start
    inside = (places[placement.dim] >= 0) & (places[placement.dim] < local.shape[placement.dim])
    sample = local.new_zeros(len(inside))
    sample[inside.to(local.device)] = local[tuple(place[inside].to(local.device) for place in places)]
    torch.distributed.all_reduce(sample, group=mesh.get_group(dim))
    return sample
