"""One call of a layer's attention function, as the model made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one attention call, and the function they are for.

    Parameters
    ----------
    inner : callable
        transformers' own attention function, or the model module's.
    module : nn.Module
        The attention module that calls.
    query, key, value : Tensor
        ``[batch, head or kv_head, query or key, head_dim]``.
    mask : Tensor, BlockMask or None
        What transformers made for the layer.
    options : dict
        The call's keyword arguments.
    """

    inner: Callable[..., Any]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]

    @property
    def steps(self) -> int:
        """Number of queries."""
        return self.query.shape[-2]

    @property
    def arguments(self) -> tuple[nn.Module, Tensor, Tensor, Tensor, Any, dict[str, Any]]:
        """Everything but the function: module, query, key, value, mask, options."""
        return self.module, self.query, self.key, self.value, self.mask, self.options

    def run(self) -> Any:
        """Call the function."""
        return self.inner(self.module, self.query, self.key, self.value, self.mask, **self.options)
