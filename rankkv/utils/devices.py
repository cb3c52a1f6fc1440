"""Numbers on their way from the host to a device, and back."""

from __future__ import annotations

from collections.abc import Sequence
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
    made = torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return made.to(device)
    try:
        # From pinned memory the copy runs behind the host's back.
        return made.pin_memory().to(device, non_blocking=True)
    except RuntimeError:
        # No memory can be pinned: then the host waits.
        return made.to(device)


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


def read_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return float32 and float64 tensors on the CPU; the host waits for a GPU only once.

    Examples
    --------
    >>> [part.tolist() for part in read_together([torch.ones(2), torch.zeros(1, 1, dtype=torch.float64)])]
    [[1.0, 1.0], [[0.0]]]
    """
    if tensors[0].device.type != "cuda":
        return [tensor.cpu() for tensor in tensors]
    # As bits, so that nothing is converted.
    bits = [tensor.flatten().view(torch.int32) for tensor in tensors]
    parts = torch.cat(bits).cpu().split([len(part) for part in bits])
    # Copied, because a float64 cannot start at every int32.
    return [
        part.clone().view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
