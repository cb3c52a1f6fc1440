"""Numbers on their way from the host to a device, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def send_numbers(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Send numbers to a device, ``[number]``; a GPU does not make the host wait for that.

    Examples
    --------
    >>> send_numbers([3, 1], torch.device("cpu")).tolist()
    [3, 1]
    """
    return send_tensor(torch.tensor(numbers, dtype=dtype), device)


def send_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the host to a device; a GPU does not make the host wait for that.

    Examples
    --------
    >>> send_tensor(torch.ones(2), torch.device("cpu")).tolist()
    [1.0, 1.0]
    """
    if device.type != "cuda":
        return tensor.to(device)
    try:
        # From pinned memory the copy runs behind the host's back.
        return tensor.pin_memory().to(device, non_blocking=True)
    except RuntimeError:
        # No memory can be pinned: then the host waits.
        return tensor.to(device)


def spread_numbers(numbers: Sequence[int], device: torch.device) -> Any:
    """Return one number if all rows have the same, else ``[row, 1, 1]`` int64 on the device.

    Examples
    --------
    >>> spread_numbers([2, 2], torch.device("cpu"))
    2
    >>> spread_numbers([2, 3], torch.device("cpu")).shape
    torch.Size([2, 1, 1])
    """
    return spread_tables([numbers], device)[0]


def spread_tables(tables: Sequence[Sequence[int]], device: torch.device) -> list[Any]:
    """Return what :func:`spread_numbers` returns for each table, with one copy to the device for all of them.

    Examples
    --------
    >>> spread_tables([[2, 2], [3, 4]], torch.device("cpu"))[0]
    2
    """
    uneven = [numbers for numbers in tables if len(set(numbers)) > 1]
    joined = send_numbers([number for numbers in uneven for number in numbers], device) if uneven else None
    sent = iter(() if joined is None else joined.view(len(uneven), -1, 1, 1).unbind())
    return [next(sent) if len(set(numbers)) > 1 else numbers[0] for numbers in tables]


def takes_halves(tensor: Tensor) -> bool:
    """Return True if the device multiplies such tensors in bfloat16 and adds the products up in float32.

    A float32 product of the same numbers takes a GPU many times as long: its fast units know no float32.

    Examples
    --------
    >>> takes_halves(torch.ones(2))
    False
    """
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cuda" and _try_halves(tensor.device)


@functools.cache
def _try_halves(device: torch.device) -> bool:
    ones = torch.ones(1, 8, 8, dtype=torch.bfloat16, device=device)
    try:
        return multiply_halves(ones, ones).dtype == torch.float32
    except (NotImplementedError, TypeError, RuntimeError):
        # An older torch, or a card without bfloat16.
        return False


def multiply_halves(left: Tensor, right: Tensor) -> Tensor:
    """Multiply ``[matrix, m, k]`` and ``[matrix, k, n]`` of bfloat16; the sums are float32."""
    return torch.bmm(left, right, out_dtype=torch.float32)


def split_into_halves(tensor: Tensor) -> Tensor:
    """Split float32 numbers into the sum of two bfloat16 numbers: ``[..., m, k]`` to ``[..., 2, m, k]``.

    The sum is right to about five digits.  The tensor is used up: it holds nothing of use afterwards.

    Examples
    --------
    >>> split_into_halves(torch.tensor([[1.0, 1.00390625]])).tolist()
    [[[1.0, 1.0]], [[0.0, 0.00390625]]]
    """
    halves = tensor.new_empty((*tensor.shape[:-2], 2, *tensor.shape[-2:]), dtype=torch.bfloat16)
    first, second = halves.unbind(dim=-3)
    first.copy_(tensor)
    second.copy_(tensor.sub_(first))
    return halves


class Reader:
    """Bring tensors of a device to the host in one transfer; the host waits only when it reads one of them.

    Parameters
    ----------
    device : torch.device
        Where the tensors are.  Only a GPU's come later; others are on the host at once.

    Examples
    --------
    >>> reader = Reader(torch.device("cpu"))
    >>> ones, zeros = reader.send(torch.ones(2)), reader.send(torch.zeros(1, 1, dtype=torch.float64))
    >>> reader.start()
    >>> ones.read().tolist(), zeros.read().tolist()
    ([1.0, 1.0], [[0.0]])
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # What was sent, and where it comes to; on a GPU until it has come.
        self._sources: list[Tensor] = []
        self._sent: list[Sent] = []
        self._joined: Tensor | None = None
        self._arrived: Any = None

    def send(self, tensor: Tensor) -> Sent:
        """Send a float32 or float64 tensor; one that was sent before is not sent again."""
        for source, sent in zip(self._sources, self._sent, strict=True):
            if source is tensor:
                return sent
        self._sources.append(tensor)
        self._sent.append(Sent(self, tensor if self._on_gpu else tensor.cpu()))
        return self._sent[-1]

    @property
    def is_late(self) -> bool:
        """True if something was sent that the host would have to wait for."""
        return self._on_gpu and bool(self._sent)

    def start(self) -> None:
        """Start the transfer of all that was sent."""
        if not self.is_late:
            return
        # As bits, so that nothing is converted.
        bits = torch.cat([source.flatten().view(torch.int32) for source in self._sources])
        # To pinned memory, which the device fills behind the host's back.
        self._joined = bits.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(bits.device))

    def finish(self) -> None:
        """Wait until all has come."""
        if not self._on_gpu:
            return
        if self._joined is None:
            self.start()
        joined, self._joined = self._joined, None
        if joined is None:
            return
        self._arrived.synchronize()
        sizes = [source.numel() * source.element_size() // 4 for source in self._sources]
        for sent, part in zip(self._sent, joined.split(sizes), strict=True):
            # Copied, because a float64 cannot start at every int32.
            sent.tensor = part.clone().view(sent.tensor.dtype).view(sent.tensor.shape)
        self._sources, self._sent = [], []


class Sent:
    """A tensor on its way to the host; see :class:`Reader`."""

    def __init__(self, reader: Reader, tensor: Tensor) -> None:
        self.tensor = tensor
        self._reader = reader
        self._known: dict[Any, Tensor] = {}

    def read(self) -> Tensor:
        """Return the tensor on the host, once it has come."""
        self._reader.finish()
        return self.tensor

    def compute(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``function`` of the tensor on the host, computed once for each function."""
        if function not in self._known:
            self._known[function] = function(self.read())
        return self._known[function]
