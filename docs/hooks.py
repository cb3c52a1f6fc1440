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

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")
INSERT = re.compile(
    r"^<!-- (ablation|readme-block|readme-table|demo|commands)(?:: (.+?))? -->$", re.MULTILINE
)


def on_config(config):
    """Put a page that the list of mkdocs.yml does not name yet behind the last page of its own level."""
    named = str(config.nav)
    places = [place for place, entry in enumerate(config.nav) if isinstance(next(iter(entry.values())), str)]
    for path in sorted((ROOT / "docs").glob("*.md")):
        if path.name not in named:
            config.nav.insert(places[-1] + 1, path.name)
    return config


def on_files(files, config):
    """Add the drawn pictures and the recorded figures to the site."""
    for name, draw in pictures.PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=draw()))
    for path in sorted((ROOT / "results" / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace each comment that names a record by the table that is recorded, and links out of the site by paths."""
    folder = (ROOT / "docs" / page.file.src_uri).parent
    markdown = LINK.sub(lambda match: name_outside(match, folder), markdown)
    return INSERT.sub(lambda match: insert(match[1], match[2]), markdown)


def name_outside(link: re.Match[str], folder: Path) -> str:
    """Return a link to a file of the repository that is no page as its words and its path; others as they are."""
    target = (folder / link[2]).resolve()
    if not target.exists() or target.is_relative_to(ROOT / "docs"):
        return link[0]
    path = target.relative_to(ROOT).as_posix()
    return f"`{path}`" if link[1] in (path, target.name) else f"{link[1]} (`{path}`)"


def insert(kind: str, name: str | None) -> str:
    """Return one table of the repository as Markdown."""
    if kind == "demo":
        return write_demo_table()
    if kind == "commands":
        return write_command_table()
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


def write_command_table() -> str:
    """Return every subcommand with the first sentence of its help."""
    import typer

    from rankkv.cli import app

    rows = ["| command | what it does |", "| --- | --- |"]
    for name, command in typer.main.get_command(app).commands.items():
        first = " ".join((command.help or "").split("\n\n")[0].split())
        rows.append(f"| `rankkv {name}` | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)
