"""The page at `/`: what a person does and sees in a real browser, and what the server sends with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import open_url, read_complaints, require_chromium, take_screenshot
from live import get_text, run_live

from rankkv import RankKVCache
from rankkv.serving.page import count_layers, list_pieces

KEY = "key-of-alice-1"
# Markup in every place where the page shows text of others.
NASTY = (
    '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script> & "quotes" é 漢字'
)


def test_the_page_needs_no_key_but_its_requests_do(tiny, tmp_path):
    with run_live(*tiny, tmp_path, api_keys=(KEY,)) as live:
        page = live.send("GET", "/", Authorization="")
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert live.send("GET", "/v1/contexts/doc/tokens", Authorization="").status == 401
        assert live.send("GET", "/v1/contexts/doc/tokens").status == 404
        assert live.metric('rankkv_requests_total{route="/",status="200"}') == 1


def test_the_policy_lets_only_the_pages_own_program_run(live):
    pages = [live.send("GET", "/") for _ in range(2)]
    nonces = []
    for page in pages:
        policy, text = page.headers["content-security-policy"], page.data.decode()
        assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))
        (nonce,) = set(re.findall(r'nonce[-=]"?([\w-]+)', policy + text))
        nonces.append(nonce)
        assert "@" not in re.sub(r"@media", "", text)
        # Nothing comes from anywhere else.
        assert not re.search(r'(?:src|href)="(?!data:,")', text)
        assert not re.search(r"https?://", text)
    assert nonces[0] != nonces[1]
    assert live.send("GET", "/", Host="evil.example").status == 403
    assert live.send("POST", "/", {}).status == 405


def test_tokens_and_their_layers(live, tiny, document):
    model, tokenizer = tiny
    made = live.post("/v1/contexts", {"text": NASTY + document, "compression_ratio": 0.2, "name": "doc"}).json
    told = live.send("GET", "/v1/contexts/doc/tokens").json
    assert NASTY + document[:-40] in "".join(text for text, _ in told["pieces"])
    (path,) = live.service.settings.folder.rglob("*.safetensors")
    cache = RankKVCache.load(path, model)
    # The same counted token by token.
    counts = [0] * made["tokens"]
    for layer in cache.layers:
        positions, valid = layer.compute_positions()[0].tolist(), layer.compute_slot_valid()
        held = None if valid is None else valid[0].tolist()
        kept = set()
        for head, row in enumerate(positions):
            for slot, position in enumerate(row):
                flags = held and (held if isinstance(held[0], bool) else held[head])
                if not flags or flags[slot]:
                    kept.add(position)
        for position in kept:
            counts[position] += 1
    assert count_layers(cache) == counts
    assert told["layers"] == len(cache.layers)
    assert max(counts) == told["layers"] > min(counts)
    ids = live.service.store.get("public", "doc").ids.tolist()
    assert [tuple(piece) for piece in told["pieces"]] == list_pieces(tokenizer, ids, counts)
    # The first and the newest tokens are kept everywhere.
    assert [counts[0], counts[-1]] == [told["layers"]] * 2


def test_everything_kept_is_kept_by_all_layers(live, document):
    live.post("/v1/contexts", {"text": document, "compression_ratio": 1.0, "name": "doc"})
    told = live.send("GET", "/v1/contexts/doc/tokens").json
    assert {count for _, count in told["pieces"]} == {told["layers"]}


def test_characters_of_several_tokens_are_one_piece(tiny):
    ids = tiny[1]("漢é😀 x")["input_ids"]
    pieces = list_pieces(tiny[1], ids, list(range(len(ids))))
    assert "".join(text for text, _ in pieces) == "漢é😀 x"
    assert len(pieces) < len(ids)
    # A text that ends inside a character still shows all tokens.
    cut = list_pieces(tiny[1], tiny[1]("😀")["input_ids"][:-1], [1] * (len(tiny[1]("😀")["input_ids"]) - 1))
    assert len(cut) == 1


def find(browser, name):
    return browser.find_element("id", name)


def wait_until(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 120).until(lambda _: browser.execute_script(f"return {script}"))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_a_stranger_asks_about_a_document_with_three_clicks(tiny, document, tmp_path, width, dark):
    require_chromium()
    text = NASTY + document
    with run_live(*tiny, tmp_path) as live, open_url(live.url, width=width, dark=dark) as browser:
        wait_until(browser, "document.getElementById('model').textContent === 'tiny'")
        # The document's field has the focus: pasting needs no click.
        assert browser.switch_to.active_element.get_attribute("id") == "document"
        browser.execute_script("document.activeElement.value = arguments[0]", text)
        clicks = 0
        find(browser, "compress").click()
        clicks += 1
        wait_until(browser, "!document.getElementById('result').hidden")
        assert browser.switch_to.active_element.get_attribute("id") == "question"
        browser.switch_to.active_element.send_keys(NASTY)
        find(browser, "ask").click()
        clicks += 1
        assert clicks <= 3
        wait_until(browser, "document.querySelector('article')?.dataset.state === 'done'")
        # What it shows is what the API says.
        (context,) = live.send("GET", "/v1/contexts").json["data"]
        assert find(browser, "count").text.replace(",", "") == str(context["tokens"])
        shown = browser.execute_script("return document.getElementById('tokens').textContent")
        assert text[:-40] in shown
        answer = get_text(live.chat(NASTY, rankkv={"context": context["id"]}, max_tokens=128))
        told = browser.execute_script("return document.querySelector('article div').textContent")
        assert told.strip() == answer.strip()
        kinds = browser.execute_script(
            "return [...document.querySelectorAll('#tokens span')].map(s => s.className)"
        )
        assert {"level4"} < set(kinds)
        # Text stays text.
        assert browser.title == "RankKV: ask a document"
        assert browser.execute_script("return document.querySelectorAll('img, main script').length") == 0
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 64) is dark
        assert read_complaints(browser) == []
        take_screenshot(browser, tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_full_caches_answer_a_file_and_what_goes_wrong(tiny, document, tmp_path):
    require_chromium()
    path = Path(tmp_path / "document.txt")
    path.write_text(document, encoding="utf-8")
    with run_live(*tiny, tmp_path / "contexts", api_keys=(KEY,)) as live, open_url(live.url) as browser:
        wait_until(browser, "!document.getElementById('login').hidden")
        assert "API key" in find(browser, "trouble").text
        find(browser, "key").send_keys(KEY)
        find(browser, "enter").click()
        wait_until(browser, "document.getElementById('login').hidden")
        find(browser, "compress").click()
        assert "There is no text yet" in find(browser, "trouble").text
        find(browser, "file").send_keys(str(path))
        wait_until(browser, "!document.getElementById('result').hidden")
        assert find(browser, "trouble").text == ""
        find(browser, "beside").click()
        find(browser, "question").send_keys("What is it?\n")
        wait_until(
            browser,
            "[...document.querySelectorAll('article')].filter(a => a.dataset.state === 'done').length === 2",
        )
        compressed, full = live.send("GET", "/v1/contexts").json["data"]
        assert (compressed["compression_ratio"], full["compression_ratio"]) == (0.3, 1.0)
        told = browser.execute_script(
            "return [...document.querySelectorAll('article div')].map(d => d.textContent.trim())"
        )
        asked = [
            get_text(live.chat("What is it?", rankkv={"context": context["id"]}, max_tokens=128)).strip()
            for context in (compressed, full)
        ]
        assert told == asked
        # A question that is stopped frees its place.
        find(browser, "question").send_keys("Go on\n")
        find(browser, "stop").click()
        wait_until(browser, "document.querySelector('article').dataset.state === 'done'")
        wait_until(browser, "!document.getElementById('ask').hidden")
        live.send("DELETE", f"/v1/contexts/{compressed['id']}")
        find(browser, "beside").click()
        find(browser, "question").send_keys("And now?\n")
        wait_until(browser, "document.querySelector('article p').textContent.includes('there is no context')")
