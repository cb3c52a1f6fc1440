"""How a layer holds its kept keys and values between two forwards: as they are, as int8, or in CPU memory."""

from __future__ import annotations

import torch
from torch import Tensor


class PlainStorage:
    """Holds a tensor as it is."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor [batch, kv_head, slot, head_dim]``, in full until :meth:`rest`."""
        self._tensor = tensor

    def get(self) -> Tensor | None:
        """Return the tensor, on its device and in its dtype."""
        return self._tensor

    def rest(self) -> None:
        """Go over to the form in which the tensor waits for the next forward."""

    def held(self) -> list[Tensor]:
        """Return the tensors that take memory now."""
        return [] if self._tensor is None else [self._tensor]


class Int8Storage(PlainStorage):
    """Holds a tensor at rest as int8 with one float32 scale a token and head: ``x ~ q * max|x| / 127``.

    Going to rest again changes nothing: the largest entry of a token gives back the same scale.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packed: tuple[Tensor, Tensor] | None = None
        self._dtype = torch.float32

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor`` in full until :meth:`rest`."""
        super().put(tensor)
        self._packed = None

    def get(self) -> Tensor | None:
        """Return the tensor, computed back from int8 where it rests."""
        if self._packed is None:
            return self._tensor
        quantized, scale = self._packed
        return (quantized * scale).to(self._dtype)

    def rest(self) -> None:
        """Quantize what is held in full."""
        if self._tensor is None:
            return
        scale = (
            self._tensor.abs().amax(dim=-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny)
            / 127
        )
        self._dtype = self._tensor.dtype
        self._packed = ((self._tensor / scale).round().to(torch.int8), scale)
        self._tensor = None

    def held(self) -> list[Tensor]:
        """Return the tensors that take memory now."""
        return super().held() if self._packed is None else list(self._packed)


class OffloadStorage(PlainStorage):
    """Holds a tensor at rest in CPU memory, and brings it back to its device when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._device: torch.device | None = None

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor`` where it is until :meth:`rest`."""
        super().put(tensor)
        self._device = None if tensor is None else tensor.device

    def get(self) -> Tensor | None:
        """Return the tensor on the device it came from."""
        return self._tensor if self._tensor is None else self._tensor.to(self._device)

    def rest(self) -> None:
        """Move the tensor to the CPU."""
        if self._tensor is not None:
            self._tensor = self._tensor.to("cpu")


STORAGES: dict[str, type[PlainStorage]] = {
    "full": PlainStorage,
    "int8": Int8Storage,
    "offload": OffloadStorage,
}
