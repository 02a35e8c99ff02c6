"""A page in a real browser, as wide as a phone or a desk, in a light or a dark scheme."""

import contextlib
import html
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# Values of Chromium's own enumeration mojom::PreferredColorScheme.
SCHEMES = {"dark": 0, "light": 1}
# A phone's width comes from a frame: the browser's window is never narrower than 500 px. The frame has the
# page's own policy, which stops scripts, so that the one around it measures.
MEASURE = """<!doctype html><meta name="color-scheme" content="light dark">
<style>body { margin: 0 } iframe { border: 0; display: block }</style>
<iframe id="page" width="WIDTH" height="HEIGHT" srcdoc="PAGE"></iframe>
<pre id="measured"></pre>
<script>
window.onload = () => {
  const frame = document.getElementById("page");
  const page = frame.contentDocument, root = page.documentElement;
  const style = node => frame.contentWindow.getComputedStyle(node);
  const wide = [...page.querySelectorAll("body *")]
    .filter(node => !node.closest(".scroll") && !node.closest("svg"))
    .filter(node => node.getBoundingClientRect().right > WIDTH + 0.5);
  const stroke = page.querySelector("#curves svg path[style*='--accent']");
  document.getElementById("measured").textContent = JSON.stringify({
    width: frame.contentWindow.innerWidth,
    scrollWidth: root.scrollWidth,
    wide: wide.map(node => node.outerHTML.slice(0, 120)),
    svgs: page.querySelectorAll("svg").length,
    drawn: [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 80).length,
    scrolling: [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
    smallest: Math.min(...[...page.querySelectorAll("#curves svg")].map(
      svg => 9.5 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)),
    background: style(page.body).backgroundColor,
    colour: style(page.body).color,
    stroke: style(stroke).stroke,
    resources: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    sections: [...page.querySelectorAll("section")].map(section => section.id),
  });
};
</script>"""


def browse(browser: str, folder: Path, page: Path, width: int, scheme: str, *flags: str) -> bytes:
    """The browser's output. The browser and all its processes are ended in any case."""
    height = 800
    around = folder / "around.html"
    text = html.escape(page.read_text(encoding="utf-8"))
    around.write_text(
        MEASURE.replace("WIDTH", str(width)).replace("HEIGHT", str(height)).replace("PAGE", text),
        encoding="utf-8",
    )
    command = [
        *(browser, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}"),
        *(f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"),
        around.as_uri(),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors.decode(errors="replace")[-2000:]
    return output


def measure(browser: str, folder: Path, page: Path, width: int, scheme: str) -> dict[str, Any]:
    dumped = browse(browser, folder, page, width, scheme, "--dump-dom").decode("utf-8")
    found = re.search(r'<pre id="measured">(.+?)</pre>', dumped, flags=re.DOTALL)
    assert found is not None, dumped[-500:]
    return dict(json.loads(html.unescape(found[1])))


def channels(colour: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", colour)[:3]]
