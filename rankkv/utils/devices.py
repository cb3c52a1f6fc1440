"""Numbers on their way from the host to a device."""

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
    if len(set(numbers)) == 1:
        return numbers[0]
    return send_numbers(numbers, device).view(-1, 1, 1)
