"""Work split over the processes of `accelerate launch` or `torchrun`, and its results gathered."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from ..errors import ProcessGroupError

Sample = TypeVar("Sample")

# Names of rank and number of processes: torchrun's (also accelerate's), then those of two MPIs that accelerate starts.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
# A finished process waits for a slow one. The launcher notices a dead process and ends all of them.
_TIMEOUT = timedelta(days=7)
_group: Any = None


class ProcessRank(NamedTuple):
    """Number of this process among the launched ones.

    Parameters
    ----------
    rank : int
        Number of this process, from 0.
    size : int
        Number of processes; 1 if this one runs alone.
    """

    rank: int
    size: int


def find_process_rank() -> ProcessRank:
    """Return this process's rank and the number of processes, from the launcher's environment.

    Returns
    -------
    ProcessRank
        (0, 1) without a launcher.

    Raises
    ------
    ProcessGroupError
        If the environment names a rank outside the number of processes.

    Examples
    --------
    >>> find_process_rank()
    ProcessRank(rank=0, size=1)
    """
    for rank, size in _LAUNCHERS:
        # Cluster managers set these names for single processes too; only a launcher also sets MASTER_ADDR.
        if rank in os.environ and size in os.environ and "MASTER_ADDR" in os.environ:
            found = ProcessRank(int(os.environ[rank]), int(os.environ[size]))
            if not 0 <= found.rank < found.size:
                raise ProcessGroupError(
                    f"{rank}={found.rank} is outside 0 to {size} - 1 = {found.size - 1}: start the processes with "
                    "`accelerate launch` or `torchrun`, which set both."
                )
            return found
    return ProcessRank(0, 1)


def is_main_process() -> bool:
    """Tell whether this process is the one that prints and writes."""
    return find_process_rank().rank == 0


def find_own_device() -> str | None:
    """Return the GPU of this process; None without GPUs or without other processes.

    Raises
    ------
    ProcessGroupError
        If this machine has fewer GPUs than processes.
    """
    import torch

    if find_process_rank().size == 1 or not torch.cuda.is_available():
        return None
    local = int(os.environ.get("LOCAL_RANK", find_process_rank().rank))
    if local >= torch.cuda.device_count():
        raise ProcessGroupError(
            f"process {local} of this machine finds only {torch.cuda.device_count()} GPUs: launch one process per GPU, "
            "or hide all GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU."
        )
    return f"cuda:{local}"


def split_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Return this process's share of the samples: every ``size``-th one, starting at its rank.

    Parameters
    ----------
    samples : sequence
        The same in all processes.

    Returns
    -------
    list
        All samples if no other process was launched.

    Examples
    --------
    >>> split_samples(["a", "b", "c"])
    ['a', 'b', 'c']
    """
    rank, size = find_process_rank()
    return list(samples[rank::size])


def gather(results: Sequence[Any]) -> list[Any]:
    """Return the results of all processes, in the order of the samples before `split_samples`.

    All processes must call it, once each. Results travel as JSON, which restores every float bit by bit. A process with
    no results waits until all others arrive, so ``gather([])`` is a barrier.

    Parameters
    ----------
    results : sequence
        JSON-ready; one result per sample of this process's share, in its order.

    Returns
    -------
    list
        The same in every process.

    Raises
    ------
    ProcessGroupError
        If the numbers of results do not match any split of samples.

    Examples
    --------
    >>> gather([0.1, 0.2])
    [0.1, 0.2]
    """
    size = find_process_rank().size
    if size == 1:
        return list(results)
    parts = [json.loads(part) for part in _exchange(json.dumps(list(results)).encode())]
    counts = [len(part) for part in parts]
    total = sum(counts)
    if counts != [len(range(first, total, size)) for first in range(size)]:
        raise ProcessGroupError(
            f"the processes gathered {counts} results, which does not match a split of {total} samples: each process "
            "must give one result for each sample of split_samples()."
        )
    return [parts[index % size][index // size] for index in range(total)]


def _exchange(message: bytes) -> list[bytes]:
    """Send bytes to all processes, and return every process's bytes in the order of ranks."""
    import torch
    from torch import distributed

    group, size = _join_group(), find_process_rank().size
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    distributed.all_gather(lengths, torch.tensor([len(message)]), group=group)
    counts = [int(length) for length in lengths]
    # all_gather needs equal sizes: pad to the longest message.
    own = torch.zeros(max(counts), dtype=torch.uint8)
    own[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    received = [torch.empty_like(own) for _ in range(size)]
    distributed.all_gather(received, own, group=group)
    return [part[:count].numpy().tobytes() for part, count in zip(received, counts, strict=True)]


def _join_group() -> Any:
    """Return the group of all processes that exchanges CPU tensors, creating it on first use."""
    global _group
    if _group is None:
        from torch import distributed

        rank, size = find_process_rank()
        if distributed.is_initialized():
            # The user's default group may only exchange GPU tensors.
            _group = distributed.new_group(backend="gloo", timeout=_TIMEOUT)
        else:
            distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=_TIMEOUT)
            atexit.register(_leave_group)
            _group = distributed.group.WORLD
    return _group


def _leave_group() -> None:
    """End the group's threads, which would otherwise abort the process at exit."""
    global _group
    from torch import distributed

    # A remaining reference would keep the threads alive.
    _group = None
    distributed.destroy_process_group()
