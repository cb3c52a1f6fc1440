"""Hooks of the site: recorded figures, the page for contributors, the repository's address, labels of table cells."""

from __future__ import annotations

import html
import os
import posixpath
import re
import subprocess
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "results" / "figures"

IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)#\s]+\.(?:png|svg))\)(\{[^}]*\})?")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]+)?\)")
ROW = re.compile(r"<tr>(.*?)</tr>", re.DOTALL)
HEAD = re.compile(r"<th[^>]*>(.*?)</th>", re.DOTALL)


def on_config(config):
    """Take the repository's address from ``REPOSITORY_URL``, else from the clone's remote ``origin``."""
    config.repo_url = config.repo_url or os.environ.get("REPOSITORY_URL") or read_remote()
    return config


def read_remote() -> str | None:
    """Return the web address of the remote ``origin``; None where there is none or it is a path."""
    try:
        done = subprocess.run(
            ["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.match(r"(?:https://|git@)(?:[^@/]*@)?([\w.-]+)[/:](.+?)(?:\.git)?$", done.stdout.strip())
    return f"https://{found[1]}/{found[2]}" if found else None


def on_files(files, config):
    """Add the recorded figures and the page for contributors."""
    for path in sorted(FIGURES.glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "contributing.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point figures and links that leave docs/ to what the site has; show each figure for the light or dark scheme."""
    # The page for contributors is written as a file of the root.
    folder = ROOT if page.file.src_uri == "contributing.md" else (ROOT / "docs" / page.file.src_uri).parent
    place = posixpath.dirname(page.file.src_uri)
    markdown = IMAGE.sub(lambda match: pair_image(match, folder, place), markdown)
    if folder == ROOT:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    return LINK.sub(lambda match: point_outside(match, folder, config.repo_url), markdown)


def pair_image(image: re.Match[str], folder: Path, place: str) -> str:
    """Return an image as Markdown, with its dark variant beside it if there is one."""
    words, address, attributes = image[1], image[2], image[3] or ""
    target = (folder / address).resolve()
    if target.parent == FIGURES:
        address = posixpath.relpath(f"figures/{target.name}", place or ".")
    dark = target.with_name(f"{target.stem}-dark{target.suffix}")
    if not dark.exists():
        return f"[![{words}]({address})]({address}){attributes}"
    other = posixpath.join(posixpath.dirname(address), dark.name)
    # Each is a link to itself, so that a phone can show it whole.
    return (
        f"[![{words}]({address}#only-light)]({address}){attributes}"
        f"[![{words}]({other}#only-dark)]({other}){attributes}"
    )


def point_outside(link: re.Match[str], folder: Path, repository: str | None) -> str:
    """Return a link to a file that is not a page: to the repository where its address is known, else as a path."""
    target = (folder / link[2]).resolve()
    if not target.exists() or target.is_relative_to(ROOT / "docs"):
        return link[0]
    path = target.relative_to(ROOT).as_posix()
    if path == "CONTRIBUTING.md":
        return f"[{link[1]}]({posixpath.relpath('contributing.md', folder.relative_to(ROOT / 'docs'))}{link[3] or ''})"
    if repository:
        kind = "tree" if target.is_dir() else "blob"
        return f"[{link[1]}]({repository}/{kind}/main/{path}{link[3] or ''})"
    return (
        f"`{path}`"
        if path.startswith(link[1].strip("`")) or link[1] == target.name
        else f"{link[1]} (`{path}`)"
    )


def on_page_content(content, page, config, files):
    """Name each cell's column in the cell, so that a narrow screen can show a row as a list."""
    return re.sub(r"<table>.*?</table>", lambda match: label_cells(match[0]), content, flags=re.DOTALL)


def label_cells(table: str) -> str:
    """Return a table whose cells carry their column's head as ``data-label``."""
    heads = [html.escape(re.sub(r"<[^>]+>", "", head).strip(), quote=True) for head in HEAD.findall(table)]

    def label_row(row: re.Match[str]) -> str:
        columns = iter(heads)
        return re.sub(r"<td(?=[ >])", lambda cell: f'<td data-label="{next(columns, "")}"', row[0])

    wide = ' class="wide"' if len(heads) > 2 else ""
    return ROW.sub(label_row, table).replace("<table>", f"<table{wide}>", 1)
