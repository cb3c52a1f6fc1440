"""Write `rankkv/cli/known.json`, the table of selectors, strategies and tasks that the command line reads early.

python tools/make_known_names.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "rankkv" / "cli" / "known.json"


def describe_known() -> dict[str, list[dict[str, Any]]]:
    """Describe what the registries hold."""
    from rankkv.cli.known import describe_methods
    from rankkv.evaluation.settings import NAMED_STRATEGIES
    from rankkv.evaluation.tasks import TASKS, list_options

    tasks = [
        {"name": task.name, "metric": task.metric, "options": dict(list_options(task)), "source": task.source}
        for task in TASKS.values()
    ]
    presets = [{"name": name, "options": options} for name, options in NAMED_STRATEGIES.items()]
    record = {**describe_methods(), "tasks": tasks, "presets": presets}
    return json.loads(json.dumps(record))


if __name__ == "__main__":
    PATH.write_text(json.dumps(describe_known(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
