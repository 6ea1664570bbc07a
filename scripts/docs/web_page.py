"""Pictures of the web page, taken in a real browser: what a visitor sees first, and a heat map.

    python -m scripts.docs.web_page                 # images/web_page.png, images/web_page_look.png

Needs playwright (requirements-dev.txt) and Chromium or Chrome.
"""

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from common.errors import UserError, run_command
from scripts.processes import find_browser

WEIGHTS = Path("model/demo/sft_vlm_128.pth")
IMAGES = Path("images")
PORT = 8917
# Pixels; the page is taken at twice as many, so that it is sharp.
SIZE = {"width": 1280, "height": 860}
PATIENCE = 120_000  # ms


def main() -> None:
    browser = find_browser()
    if browser is None:
        raise UserError("no Chromium or Chrome is installed: a picture of the page needs one")
    flags = ["--weights", str(WEIGHTS), "--device", "cpu", "--port", str(PORT)]
    server = subprocess.Popen([sys.executable, "web_demo_vlm.py", *flags])
    try:
        take_pictures(browser, wait_for_page(PORT))
    finally:
        server.terminate()
        server.wait()


def wait_for_page(port: int) -> str:
    """The address of the page on this port, once it answers; UserError after a minute or more."""
    address = f"http://localhost:{port}"
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{address}/_stcore/health", timeout=2):
                return address
        except OSError:
            time.sleep(0.2)
    raise UserError(f"the page does not answer on port {port}: is it taken?")


def take_pictures(browser_path: str, address: str) -> None:
    """Save the two pictures."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, device_scale_factor=2, locale="en-US")
        page.set_default_timeout(PATIENCE)

        # what a visitor sees first
        page.goto(address)
        cards = page.locator(".gallery button")
        cards.nth(5).wait_for()
        save(page, "web_page.png")

        # a question, its answer, and where the model looked for the answer's main word
        cards.nth(1).click()
        page.locator(".answer span").last.click()
        maps = page.locator("[class*=st-key-maps-] img")
        maps.nth(1).wait_for()
        page.get_by_role("button", name="Grey out each patch").click()
        maps.nth(2).wait_for()
        save(page, "web_page_look.png")
        browser.close()


def save(page, name: str) -> None:
    # fonts and pictures fade in; the mouse would leave its mark
    page.mouse.move(5, 5)
    page.wait_for_timeout(1500)
    page.screenshot(path=IMAGES / name)
    print(f"written: {IMAGES / name}")


if __name__ == "__main__":
    run_command(main)
