"""Tests of the documentation: its blocks run, its tables are those of the records, and the site is built and whole."""

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

import make_record_tables
import pytest
import transformers
from packaging.version import Version

import rankkv

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
#: Pages whose blocks take long together; the others show the same calls.
SLOW = {
    "recipes/batch.md",
    "recipes/chat.md",
    "recipes/rag.md",
    "recipes/reasoning.md",
    "choosing.md",
    "analysis.md",
}
#: A page that is written from a file beside docs/.
GENERATED = {"contributing.html"}


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
    assert {page.replace(".md", ".html") for page in PAGES} | GENERATED | {"404.html"} == set(pages)


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


@pytest.mark.parametrize("page", [page for page in make_record_tables.TABLES if page.startswith("docs/")])
def test_tables_are_those_of_the_records(page):
    text, made = make_record_tables.make_page(page)
    assert text == made, "run python tools/make_record_tables.py"


def test_another_record_gives_another_table(monkeypatch):
    """What the test above compares with is read from the record, not from the page."""
    before = make_record_tables.make_parity()
    record = {"total": dict.fromkeys(("sets", "equal", "tie", "stated", "different"), 1)}
    monkeypatch.setattr(make_record_tables, "read_record", lambda name: record)
    assert make_record_tables.make_parity() != before


def test_every_record_is_told_of():
    """The results page names command and commit of every record."""
    results = ROOT / "results"
    there = {path.name for path in results.glob("*.json")}
    there |= {path.relative_to(results).as_posix() for path in (results / "gpu").glob("*.json")}
    there |= {path.parent.relative_to(results).as_posix() for path in results.rglob("manifest.json")}
    told = set(make_record_tables.read_records())
    assert told == there


def test_the_pictures_are_those_that_are_drawn():
    pictures = load_script("pictures")
    drawn = pictures.draw_all()
    folder = DOCS / "pictures"
    assert {path.name for path in folder.iterdir()} == set(drawn)
    for name, svg in drawn.items():
        assert (folder / name).read_text(encoding="utf-8") == svg, "run python docs/pictures.py"


def load_script(name):
    """Import a file of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_follow_the_scheme(site):
    """Each figure stands on its page once for a light and once for a dark ground."""
    count = 0
    for path in site.rglob("*.html"):
        found = re.findall(r'<img [^>]*src="([^"]+)"', path.read_text(encoding="utf-8"))
        light = [source.removesuffix("#only-light") for source in found if source.endswith("#only-light")]
        dark = [source.removesuffix("#only-dark") for source in found if source.endswith("#only-dark")]
        assert len(light) + len(dark) == len(found), found
        assert [re.sub(r"-dark(?=\.\w+$)", "", source) for source in dark] == light
        count += len(light)
    assert count > 10


def test_cells_are_labelled_for_narrow_screens(site):
    """On a phone a row is a list, so each cell of a wide table names its column."""
    text = (site / "results.html").read_text(encoding="utf-8")
    tables = re.findall(r'<table class="wide">.*?</table>', text, re.DOTALL)
    assert len(tables) > 8
    for table in tables:
        assert "<td>" not in table
        assert 'data-label="' in table


def test_the_home_page_shows_result_picture_and_repository(site, pages):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert text.index("figures/allocation_ablation.png") < text.index('id="install"')
    assert text.index("<table") < text.index('id="install"')
    assert "contributing.html" in pages["index.html"].links
    navigation = text[text.index("md-nav--primary") :]
    assert "What an 8B model needs" in navigation


def test_troubleshooting_covers_its_subjects():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    for heading in ("CUDA", "Out of memory", "Dtype", "Quantised weights"):
        assert f"\n## {heading}\n" in text


def test_quantised_weights_work_as_troubleshooting_says(tiny_llama):
    """torch's int8 linear layers: equal to plain at ratio 1.0, compressed below."""
    import warnings

    import torch

    from rankkv import RankKVCache
    from rankkv.models import cache_argument

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny_llama(), {torch.nn.Linear}, dtype=torch.qint8)
    assert type(model.model.layers[0].self_attn.o_proj) is not torch.nn.Linear
    ids = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, **options)
    assert plain.equal(model.generate(ids, **cache_argument(RankKVCache(model, 1.0)), **options))
    cache = RankKVCache(model, 0.3)
    model.generate(ids, **cache_argument(cache), **options)
    assert sum(cache.budgets) == round(0.3 * 90 * len(cache.budgets))


def test_a_streamer_gets_the_tokens(tiny_llama):
    import torch
    from transformers.generation.streamers import BaseStreamer

    from rankkv import RankKVCache
    from rankkv.models import cache_argument

    class Collect(BaseStreamer):
        def __init__(self):
            self.parts = []

        def put(self, value):
            self.parts.append(value.reshape(-1))

        def end(self):
            pass

    ids = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))
    model, streamer = tiny_llama(), Collect()
    cache = cache_argument(RankKVCache(model, 0.3))
    output = model.generate(ids, **cache, streamer=streamer, max_new_tokens=5, do_sample=False)
    assert torch.cat(streamer.parts).equal(output[0])


def test_links_out_of_the_site(monkeypatch):
    pytest.importorskip("mkdocs")
    hooks = load_script("hooks")
    written = (
        "[the log](../experiments/LOG.md), [limits](../docs/limits.md), [bench.json](../results/bench.json)"
    )

    def rewrite(repository):
        return hooks.LINK.sub(lambda match: hooks.point_outside(match, DOCS, repository), written)

    assert rewrite(None) == (
        "the log (`experiments/LOG.md`), [limits](../docs/limits.md), `results/bench.json`"
    )
    assert rewrite("https://example.org/a/b") == (
        "[the log](https://example.org/a/b/blob/main/experiments/LOG.md), [limits](../docs/limits.md), "
        "[bench.json](https://example.org/a/b/blob/main/results/bench.json)"
    )
