"""Work over several processes, as accelerate and torchrun start them."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch, read_results

from rankkv.errors import ProcessGroupError
from rankkv.utils.processes import ProcessRank, find_process_rank, gather, split_samples

SPLIT_AND_GATHER = """
import json
from rankkv.utils.processes import find_process_rank, gather, split_samples

samples = [1, 2, 3, 5, 7]
own = split_samples(samples)
found = [gather([{"third": sample / 3} for sample in own]), gather([]), gather(split_samples(["only"]))]
print("result: " + json.dumps([find_process_rank().rank, [own, *found]]) + chr(10), end="", flush=True)
"""


@pytest.mark.parametrize(("launcher", "processes"), [("accelerate", 2), ("torchrun", 3)])
def test_samples_are_split_and_results_gathered(tmp_path: Path, launcher: str, processes: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(SPLIT_AND_GATHER)
    results = read_results(launch([str(program)], processes, launcher))
    samples = [1, 2, 3, 5, 7]
    assert [shares[0] for shares in results] == [samples[rank::processes] for rank in range(processes)]
    for _, gathered, nothing, one in results:
        # Every float comes back bit by bit.
        assert gathered == [{"third": sample / 3} for sample in samples]
        assert (nothing, one) == ([], ["only"])


def test_without_a_launcher_there_is_one_process() -> None:
    assert find_process_rank() == ProcessRank(0, 1)
    assert split_samples(range(4)) == gather(range(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, ProcessRank(1, 4)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "MASTER_ADDR": "localhost"}, ProcessRank(2, 3)),
        # A cluster manager's names without a place to meet: this process is on its own.
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, ProcessRank(0, 1)),
    ],
)
def test_the_environment_says_which_process_this_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: ProcessRank
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_process_rank() == place
    assert split_samples(range(7)) == list(range(7))[place.rank :: place.size]


def test_an_impossible_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessGroupError, match="RANK=4 is outside 0 to"):
        find_process_rank()


WRONG_NUMBER = """
import json
from rankkv.errors import ProcessGroupError
from rankkv.utils.processes import find_process_rank, gather

try:
    gather(["a"] * find_process_rank().rank)
except ProcessGroupError as error:
    print("result: " + json.dumps([find_process_rank().rank, str(error)]) + chr(10), end="", flush=True)
"""


def test_results_that_fit_no_split_are_refused_everywhere(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WRONG_NUMBER)
    messages = read_results(launch([str(program)], 2))
    assert len(messages) == 2
    assert all(
        "gathered [0, 1] results, which does not match a split of 1 samples" in message
        for message in messages
    )
