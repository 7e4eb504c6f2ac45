"""Headless Chromium, where a machine has it: what scripts see on a page, and the page on paper."""

import json
import os
import select
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run")
WITH_PIPES = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Runs a program that reads from the first descriptor as 3, and writes to the second as 4."""
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def run_browser(profile, *flags):
    """Run Chromium with a profile folder of its own and return what it prints."""
    command = [BROWSER, *QUIET, *OFFLINE, f"--user-data-dir={profile}", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout


def probed(page, probe, profile, *, width=1440, height=900):
    """What the body of an asynchronous JavaScript function returns once a page has loaded."""
    with Chromium(profile) as browser:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.ask("Emulation.setDeviceMetricsOverride", **size)
        browser.ask("Page.navigate", url=page.as_uri())
        browser.wait("Page.loadEventFired")
        text = f"(async () => {{{probe}}})()"
        found = browser.ask(
            "Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True
        )
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")


class Chromium:
    """A browser with one page, spoken to by its protocol for debugging through two pipes."""

    def __init__(self, profile):
        reading, self.out = os.pipe()
        self.messages, writing = os.pipe()
        ends = (str(reading), str(writing))
        flags = (*QUIET, *OFFLINE, f"--user-data-dir={profile}", "--remote-debugging-pipe")
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITH_PIPES, *ends, BROWSER, *flags, "about:blank"],
            pass_fds=(reading, writing),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (reading, writing):
            os.close(end)
        self.count, self.events, self.session, self.rest = 0, [], None, b""

    def __enter__(self):
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        found = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        self.ask("Page.enable")
        return self

    def __exit__(self, *_):
        self.session = None
        with suppress(OSError, AssertionError):
            self.ask("Browser.close")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for end in (self.out, self.messages):
            os.close(end)

    def ask(self, method, **parameters):
        """Send a command and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        session = {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message | session).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            self.events.append(answer.get("method"))
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, event):
        """Wait for an event, unless it has come."""
        while event not in self.events:
            self.events.append(self._next().get("method"))

    def _next(self):
        while b"\0" not in self.rest:
            assert select.select([self.messages], [], [], 120)[0], "the browser does not answer"
            read = os.read(self.messages, 1 << 16)
            assert read, "the browser has ended"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)


def printed(page, profile):
    """The text of every page of paper; None without pdftotext."""
    path = profile / "page.pdf"
    run_browser(profile, f"--print-to-pdf={path}", "--virtual-time-budget=5000", page.as_uri())
    if shutil.which("pdftotext") is None:
        return None
    done = subprocess.run(["pdftotext", "-layout", path, "-"], capture_output=True, check=True)
    return done.stdout.decode().rstrip("\f").split("\f")
