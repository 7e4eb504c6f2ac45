"""Headless Chromium, where a machine has it: what scripts see on a page, and the page on paper."""

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def run_browser(profile, *flags):
    """Run Chromium with a profile folder of its own and return what it prints."""
    command = [BROWSER, *QUIET, *OFFLINE, f"--user-data-dir={profile}", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout


def probed(page, probe, profile):
    """What the body of an asynchronous JavaScript function returns once a page has loaded."""
    added = """<script>
addEventListener("load", async () => {
  const found = await (async () => {%s})().catch(error => ({error: String(error)}));
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
});
</script></body>"""
    path = page.with_name(f"probed-{page.name}")
    path.write_text(page.read_text("utf-8").replace("</body>", added % probe), "utf-8")
    dom = run_browser(profile, "--virtual-time-budget=5000", "--dump-dom", path.as_uri())
    path.unlink()
    return json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom)[1]))


def printed(page, profile):
    """The text of every page of paper; None without pdftotext."""
    path = profile / "page.pdf"
    run_browser(profile, f"--print-to-pdf={path}", "--virtual-time-budget=5000", page.as_uri())
    if shutil.which("pdftotext") is None:
        return None
    done = subprocess.run(["pdftotext", "-layout", path, "-"], capture_output=True, check=True)
    return done.stdout.decode().rstrip("\f").split("\f")
