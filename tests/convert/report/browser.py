"""A page in headless Chromium: what its console said, what it asked the network for, how wide it is on a phone."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install -y chromium")

PHONE = 390
# What the browser asks for by itself: the time, updates, accounts.
_ITS_OWN = re.compile(r"https?://[\w.-]*\.(google|googleapis|gstatic)\.com/")
_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
)
_FRAME = """<iframe id="phone" src="{name}" style="width:{width}px;height:900px;border:0"></iframe>
<p id="width"></p><script>
document.getElementById("phone").onload = event => {{
  document.getElementById("width").textContent =
    "content " + event.target.contentDocument.documentElement.scrollWidth;
}};</script>"""


@dataclass(frozen=True)
class Seen:
    """The page after loading: its document, console lines, and addresses it asked for."""

    document: str
    console: list[str]
    requests: list[str]


def chromium(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run Chromium on a page with further options."""
    assert CHROMIUM is not None
    flags = [*_QUIET, f"--user-data-dir={page.parent / 'profile'}"]
    return subprocess.run(
        [CHROMIUM, *flags, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )


def seen(page: Path) -> Seen:
    """Open a page and look."""
    log = page.parent / "network.json"
    done = chromium(page, "--enable-logging=stderr", f"--log-net-log={log}", "--virtual-time-budget=2000", "--dump-dom")
    asked = re.findall(r'"url":"((?:https?|wss?):[^"]*)"', log.read_text(encoding="utf-8"))
    return Seen(
        document=done.stdout,
        console=[line for line in done.stderr.splitlines() if "CONSOLE" in line],
        requests=sorted({url for url in asked if not _ITS_OWN.match(url)}),
    )


def width_on_a_phone(page: Path) -> int:
    """Pixels that the page's content is wide in a window of PHONE pixels."""
    frame = page.parent / "frame.html"
    frame.write_text(_FRAME.format(name=page.name, width=PHONE), encoding="utf-8")
    document = chromium(frame, "--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom").stdout
    found = re.search(r"content (\d+)", document)
    assert found is not None
    return int(found[1])
