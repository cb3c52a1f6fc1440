"""Pictures of the page of `rankkv serve`, taken in a headless Chromium, in both colour schemes.

    python -m benchmarks.serving_page

It starts `rankkv serve embedded`, compresses a document on the page, asks it beside the full cache, and writes
`results/figures/serving_page.png` and `serving_page-dark.png`.  It needs selenium, Chromium and its driver.
"""

from __future__ import annotations

import argparse
import base64
import shutil
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from rankkv import load_model
from rankkv.models.texts import insert_fact, python_docs_text, take_tokens

from .serving import Server

FACT = "The gate code of the north yard is 7391."
QUESTION = "What is the gate code of the north yard?"
WIDTH, HEIGHT = 1000, 1220


def take_picture(url: str, text: str, path: Path, scheme: str) -> None:
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    # Named, so that selenium looks for neither of them.
    options.binary_location = shutil.which("chromium") or ""
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(url)
        wait = WebDriverWait(browser, 600)

        def wait_for(condition: str) -> None:
            wait.until(lambda _: browser.execute_script(f"return {condition}"))

        browser.execute_script("document.getElementById('document').value = arguments[0]", text)
        browser.execute_script("document.getElementById('ratio').value = '0.2'")
        browser.find_element("id", "compress").click()
        wait_for("!document.getElementById('result').hidden")
        browser.find_element("id", "beside").click()
        browser.find_element("id", "question").send_keys(QUESTION + "\n")
        wait_for(
            "[...document.querySelectorAll('article')].filter(a => a.dataset.state === 'done').length === 2"
        )
        # The fact is in the middle of what is shown of the document.
        browser.execute_script(
            "const box = document.getElementById('tokens');"
            "const spans = [...box.children]; const place = box.textContent.indexOf(arguments[0]);"
            "let seen = 0; for (const span of spans) { seen += span.textContent.length;"
            "if (seen > place) { box.scrollTop = span.offsetTop - box.offsetTop - 100; break; } }"
            "document.activeElement.blur();",
            FACT,
        )
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        path.write_bytes(base64.b64decode(shot["data"]))
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of the server's page.")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--folder", type=Path, default=Path("results/figures"))
    arguments = parser.parse_args()
    tokenizer = load_model("embedded")[1]
    text = insert_fact(take_tokens(tokenizer, python_docs_text(), arguments.tokens), FACT, depth=0.5)
    with Server("embedded") as server:
        for scheme, name in (("light", "serving_page.png"), ("dark", "serving_page-dark.png")):
            take_picture(f"http://127.0.0.1:{server.port}/", text, arguments.folder / name, scheme)


if __name__ == "__main__":
    main()
