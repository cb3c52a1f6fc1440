"""What the site takes from elsewhere in the repository when it is built: measured records, README tables, pictures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import pictures  # noqa: E402

INSERT = re.compile(r"^<!-- (ablation|readme-block|readme-table|demo)(?:: (.+?))? -->$", re.MULTILINE)


def on_files(files, config):
    """Add the drawn pictures and the recorded figures to the site."""
    for name, draw in pictures.PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=draw()))
    for path in sorted((ROOT / "results" / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace each comment that names a record by the table that is recorded."""
    return INSERT.sub(lambda match: insert(match[1], match[2]), markdown)


def insert(kind: str, name: str | None) -> str:
    """Return one table of the repository as Markdown."""
    if kind == "demo":
        return write_demo_table()
    if kind == "ablation":
        text = (ROOT / "results" / "ablation" / "summary.md").read_text(encoding="utf-8")
        found = re.search(
            rf"^### {re.escape(name)} .*?\n\n(\|.*?)\n\n", text + "\n\n", re.MULTILINE | re.DOTALL
        )
    else:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        if kind == "readme-block":
            found = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
        else:
            found = re.search(rf"^(\| {re.escape(name)} \|.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise PluginError(f"there is no {kind} {name!r} to put into the documentation")
    return found[1]


def write_demo_table() -> str:
    """Return the rows of the recorded demo."""
    record = json.loads((ROOT / "results" / "demo.json").read_text(encoding="utf-8"))
    rows = ["| cache | KV bytes | fact given back | answer |", "| --- | --- | --- | --- |"]
    for run in record["runs"]:
        answer = " ".join(run["answer"].split()).replace("|", "\\|")
        rows.append(
            f"| {run['name']} | {run['cache_bytes']:,} | {'yes' if run['has_fact'] else 'no'} | {answer} |"
        )
    return "\n".join(rows)
