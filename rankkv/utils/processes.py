"""Work split over the processes that `accelerate launch` or `torchrun` starts, and its results gathered once."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from ..errors import ProcessGroupError

Sample = TypeVar("Sample")

#: How rank and number of processes are called by torchrun (and so by accelerate), and by the two MPIs it starts.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
# A process that is done waits for one that still measures; a dead one is the launcher's to notice, which ends all.
_PATIENCE = timedelta(days=7)
_group: Any = None


class ProcessRank(NamedTuple):
    """Which of the launched processes this is.

    Parameters
    ----------
    rank : int
        Number of this process, from 0.
    size : int
        Processes in all; 1 where none was launched beside this one.
    """

    rank: int
    size: int


def find_process_rank() -> ProcessRank:
    """Return the rank of this process and how many there are, as the launcher's environment says; (0, 1) without one.

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
        # Cluster managers set such names for single processes too; a launcher also says where to meet.
        if rank in os.environ and size in os.environ and "MASTER_ADDR" in os.environ:
            place = ProcessRank(int(os.environ[rank]), int(os.environ[size]))
            if not 0 <= place.rank < place.size:
                raise ProcessGroupError(
                    f"{rank}={place.rank} is outside 0 to {size} - 1 = {place.size - 1}: start the processes with "
                    "`accelerate launch` or `torchrun`, which set both."
                )
            return place
    return ProcessRank(0, 1)


def is_main_process() -> bool:
    """Tell whether this process is the one that prints and writes."""
    return find_process_rank().rank == 0


def find_own_device() -> str | None:
    """Return the GPU that belongs to this process among several of one machine; None without GPUs or other processes.

    Raises
    ------
    ProcessGroupError
        If there are fewer GPUs than processes on this machine.
    """
    import torch

    if find_process_rank().size == 1 or not torch.cuda.is_available():
        return None
    local = int(os.environ.get("LOCAL_RANK", find_process_rank().rank))
    if local >= torch.cuda.device_count():
        raise ProcessGroupError(
            f"process {local} of this machine finds {torch.cuda.device_count()} GPUs: launch as many processes as "
            "there are GPUs, or hide all of them (CUDA_VISIBLE_DEVICES=) to run on the CPU."
        )
    return f"cuda:{local}"


def split_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Return this process's share of the samples: every ``size``-th one, from its rank on.

    Parameters
    ----------
    samples : sequence
        The same in all processes.

    Returns
    -------
    list
        All of them where no other process was launched.

    Examples
    --------
    >>> split_samples(["a", "b", "c"])
    ['a', 'b', 'c']
    """
    rank, size = find_process_rank()
    return list(samples[rank::size])


def gather(results: Sequence[Any]) -> list[Any]:
    """Return the results of all processes, in the order of the samples that `split_samples` split; called once, by all.

    They travel as JSON, which gives every float back bit by bit. A process that has nothing waits until all others are
    there, so ``gather([])`` is a barrier.

    Parameters
    ----------
    results : sequence
        JSON-ready; one result a sample of this process's share, in its order.

    Returns
    -------
    list
        The same in every process.

    Raises
    ------
    ProcessGroupError
        If the processes gave numbers of results that no split of samples gives.

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
            f"the processes gathered {counts} results, which is no split of {total} samples: each process must give "
            "one result for each sample of split_samples()."
        )
    return [parts[place % size][place // size] for place in range(total)]


def _exchange(message: bytes) -> list[bytes]:
    """Send bytes to all processes, and return those of each in the order of their ranks."""
    import torch
    from torch import distributed

    group, size = _join_group(), find_process_rank().size
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    distributed.all_gather(lengths, torch.tensor([len(message)]), group=group)
    counts = [int(length) for length in lengths]
    own = torch.zeros(max(counts), dtype=torch.uint8)
    own[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    received = [torch.empty_like(own) for _ in range(size)]
    distributed.all_gather(received, own, group=group)
    return [part[:count].numpy().tobytes() for part, count in zip(received, counts, strict=True)]


def _join_group() -> Any:
    """Return a group of all processes whose messages go from CPU to CPU."""
    global _group
    if _group is None:
        from torch import distributed

        rank, size = find_process_rank()
        if distributed.is_initialized():
            # The user's own group may be one of GPUs.
            _group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        else:
            distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=_PATIENCE)
            atexit.register(_leave_group)
            _group = distributed.group.WORLD
    return _group


def _leave_group() -> None:
    """End the group's threads, which else abort the process as it ends."""
    global _group
    from torch import distributed

    # The last reference keeps them alive.
    _group = None
    distributed.destroy_process_group()
