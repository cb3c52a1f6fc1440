"""The documentation site: mkdocs builds it, it asks nothing of the network, and every code block on it runs."""

from __future__ import annotations

import ast
import html.parser
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

import rankkv

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
#: Pages whose blocks take long together; the others show the same calls.
SLOW = {"recipes/batch.md", "recipes/chat.md", "recipes/rag.md", "recipes/reasoning.md", "choosing.md"}


def find_blocks(page, language):
    text = (DOCS / page).read_text(encoding="utf-8")
    return [code for _, found, code in FENCE.findall(text) if found == language]


WITH_CODE = [page for page in PAGES if find_blocks(page, "python")]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in WITH_CODE]
)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    program = "\n".join(find_blocks(page, "python"))
    if Version(transformers.__version__) < Version("5.24"):
        # What the quick start says to do there.
        program = re.sub(r"\bcache=(?=\w)", "past_key_values=", program)
    exec(compile(program, page, "exec"), {"__name__": "docs"})
    from rankkv.integrations.pipeline import unregister

    unregister()


def test_every_page_with_slow_blocks_is_there_and_has_blocks():
    assert set(WITH_CODE) >= SLOW
    assert len(WITH_CODE) > len(SLOW)


@pytest.mark.parametrize("page", WITH_CODE)
def test_blocks_import_only_what_is_public(page):
    """A name from `rankkv` itself is one of its public names, so that it follows semantic versioning."""
    for node in ast.walk(ast.parse("\n".join(find_blocks(page, "python")))):
        if isinstance(node, ast.ImportFrom) and node.module == "rankkv":
            assert {alias.name for alias in node.names} <= set(rankkv.__all__)


def test_commands_exist():
    import typer

    from rankkv.cli import app

    group = typer.main.get_command(app)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for page in PAGES:
        for line in "".join(find_blocks(page, "bash")).splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["rankkv"]:
                # Parses the options with their types, and runs nothing.
                group.commands[words[1]].make_context(words[1], words[2:])
                seen.add(words[1])
            elif words[:1] == ["make"]:
                assert set(words[1:]) <= targets
            else:
                started = words[0] if words else ""
                assert words[:2] in ([], ["pip", "install"], ["accelerate", "launch"]) or started in (
                    "python",
                    "torchrun",
                )
    assert seen >= {"check", "methods", "demo", "analyze", "generate", "export-generate"}


def test_quoted_messages_are_those_of_the_code():
    """What troubleshooting explains can really be said."""
    code = "".join(
        # A long message is several literals, one a line.
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for path in (ROOT / "rankkv").rglob("*.py")
    )
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) >= 8
    for message in rows:
        assert message in code


class Links(html.parser.HTMLParser):
    """Addresses of what a page loads, and all ids and links on it."""

    def __init__(self):
        super().__init__()
        self.loaded, self.ids, self.links = [], set(), []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if given.get("id"):
            self.ids.add(given["id"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(given["href"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip('mkdocs is not installed: pip install "rankkv[docs]"')
    folder = tmp_path_factory.mktemp("site")
    # No proxy, no address: whatever asked for the network would fail.
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    parsed = {}
    for path in site.rglob("*.html"):
        parser = Links()
        parser.feed(path.read_text(encoding="utf-8"))
        parsed[path.relative_to(site).as_posix()] = parser
    return parsed


def test_every_page_is_built(pages):
    assert {page.replace(".md", ".html") for page in PAGES} | {"404.html"} == set(pages)


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for page in pages.values():
        for address in page.loaded:
            assert not re.match(r"(https?:)?//", address), address
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\"?https?://", path.read_text(encoding="utf-8")), path


def test_every_link_and_picture_leads_somewhere(site, pages):
    count = 0
    for name, page in pages.items():
        if name == "404.html":
            continue
        for address in [*page.links, *page.loaded]:
            if re.match(r"(https?:|mailto:)", address):
                continue
            path, _, anchor = address.partition("#")
            target = (site / name).parent / path if path else site / name
            assert target.resolve().exists(), f"{name}: {address}"
            if anchor and target.suffix == ".html":
                found = pages[target.resolve().relative_to(site.resolve()).as_posix()]
                assert anchor in found.ids, f"{name}: {address}"
            count += 1
    assert count > 500


def test_the_reference_shows_every_public_name(site):
    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    for name in set(rankkv.__all__) - {"__version__"}:
        assert f'id="{rankkv._HOME_OF[name]}.{name}"' in reference or re.search(
            rf'id="rankkv\.[\w.]+\.{name}"', reference
        )
    assert ":class:" not in reference
    assert ":func:" not in reference


def test_tables_are_those_of_the_records(site):
    record = (ROOT / "results" / "ablation" / "summary.md").read_text(encoding="utf-8")
    row = re.search(r"^\| uniform \| ([\d.]+ \[[^|]+\]) \|", record, re.MULTILINE)[1]
    assert row in (site / "results.html").read_text(encoding="utf-8")
    import typer

    from rankkv.cli import app

    commands = (site / "command-line.html").read_text(encoding="utf-8")
    for name in typer.main.get_command(app).commands:
        assert f"<code>rankkv {name}</code>" in commands
    choosing = (site / "choosing.html").read_text(encoding="utf-8")
    from rankkv.cli.known import describe_methods

    for methods in describe_methods().values():
        for method in methods:
            assert f"<code>{method['name']}</code>" in choosing


def test_what_is_taken_from_the_repository(monkeypatch):
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(hooks)
    from mkdocs.exceptions import PluginError

    with pytest.raises(PluginError, match="no readme-block 'nothing'"):
        hooks.insert("readme-block", "nothing")
    assert hooks.insert("demo", None).count("\n| ") == 4
    written = (
        "[the log](../experiments/LOG.md), [limits](../docs/limits.md), [bench.json](../results/bench.json)"
    )
    told = "the log (`experiments/LOG.md`), [limits](../docs/limits.md), `results/bench.json`"
    assert hooks.LINK.sub(lambda match: hooks.name_outside(match, DOCS), written) == told
