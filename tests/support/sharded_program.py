"""What one tensor-parallel process keeps and says: started by torchrun, or run as it is for the answer of one process.

``python sharded_program.py MODEL CASES OUT`` loads the model in the folder MODEL, over all processes where there are
several, runs every case of the JSON file CASES, and writes what came of it to the folder OUT, one file a process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from rankkv import RankKVCache, RankProfile
from rankkv.models.compat import cache_argument
from rankkv.models.placement import find_input_device
from rankkv.utils.processes import find_process_rank


def load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32}
    if find_process_rank().size > 1:
        try:
            from transformers.distributed import DistributedConfig

            options["distributed_config"] = DistributedConfig(tp_plan="auto")
        except (ImportError, TypeError):
            options["tp_plan"] = "auto"
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def describe(cache: RankKVCache) -> dict[str, Any]:
    """Return budgets, measures and, layer by layer, the tokens that each head of this process keeps."""
    kept = []
    for index in cache.layer_indices:
        layer = cache.layers[index]
        positions, valid = layer.compute_positions(), layer.compute_slot_valid()
        positions = positions.expand(-1, layer.keys.shape[1], -1)
        if valid is not None:
            positions = positions.masked_fill(~valid[:, None], -1)
        kept.append(positions.transpose(0, 1).tolist())
    return {
        "budgets": cache.budgets_per_row,
        "measures": cache.layer_measures_per_row,
        "kept": kept,
        "bytes": cache.cache_bytes(),
    }


def run(model: Any, case: dict[str, Any]) -> dict[str, Any]:
    options = dict(case["options"])
    if "selector_options" in case:
        from rankkv.selection import get_selector

        options["selector"] = get_selector(options["selector"], **case["selector_options"])
    if isinstance(options.get("profile"), str):
        options["profile"] = RankProfile.load(options["profile"])
    if find_process_rank().size == 1:
        # Over several processes the heads of a layer stay equal by themselves.
        options.setdefault("head_budgets", None)
    try:
        cache = RankKVCache(model, **options)
    except ValueError as error:
        return {"error": str(error)}
    ids = torch.tensor(case["input_ids"], device=find_input_device(model))
    more = (
        {"attention_mask": torch.tensor(case["attention_mask"], device=ids.device)}
        if "attention_mask" in case
        else {}
    )
    # What is sampled is the same in every process, and in every run.
    torch.manual_seed(0)
    output = model.generate(
        ids,
        **cache_argument(cache),
        **more,
        **{"do_sample": False, "max_new_tokens": 4, **case.get("generate", {})},
    )
    return {"text": output[:, ids.shape[1] :].tolist(), **describe(cache)}


def main(folder: str, cases: str, out: str) -> None:
    torch.set_num_threads(1)
    model = load(folder)
    found = [run(model, case) for case in json.loads(Path(cases).read_text())]
    (Path(out) / f"{find_process_rank().rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
