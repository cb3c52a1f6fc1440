"""Programs started in several processes, as a user starts them, and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import rankkv

#: What a program prints before the one line of JSON that a test reads.
MARK = "result: "


def launch(
    program: list[str], processes: int, launcher: str = "torchrun", timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``program`` (a script or ``-m module``, with its arguments) in several processes on this machine's CPU."""
    starters = {
        # A port of its own, whatever else runs here.
        "torchrun": ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"],
        # Its launcher of several processes is named after GPUs, and starts them without any too.
        "accelerate": [
            "accelerate.commands.launch",
            "--multi_gpu",
            f"--num_processes={processes}",
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
            "--main_process_port=0",
        ],
    }
    return run([sys.executable, "-m", *starters[launcher], *program], timeout, **environment)


def run(command: list[str], timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this checkout's package, one thread, and no GPU."""
    paths = [str(Path(rankkv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **own, **environment}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done


def read_results(done: subprocess.CompletedProcess[str]) -> list[Any]:
    """Read what each process printed, in the order of their ranks."""
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    return [record for _, record in sorted((json.loads(line) for line in lines), key=lambda pair: pair[0])]
