"""The report's page in a real browser, as wide as a screen and as a phone: no error, nothing cut off, tables sort."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachegen.experiments.page import write_page
from tests.fixtures.outcomes import make_outcome

pytestmark = pytest.mark.browser

# The page stands in a frame of the width in question, since a headless window is never narrower than 500 pixels.
FRAME = """<!doctype html><body style="margin:0">
<iframe src="report.html" style="border:0;width:WIDTHpx;height:3000px"></iframe>
<pre id="found"></pre><script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => setTimeout(() => {
  const page = frame.contentDocument, table = page.querySelector("[data-table]");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[1].textContent);
  const before = column();
  table.querySelectorAll("th button")[1].click();
  const ascending = column();
  table.querySelectorAll("th button")[1].click();
  document.getElementById("found").textContent = JSON.stringify({
    scroll: page.documentElement.scrollWidth, width: frame.clientWidth,
    plots: [...page.querySelectorAll(".plot")].map((plot) => {
      const svg = plot.querySelector(".main-svg");
      return svg && [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height];
    }),
    marks: page.querySelectorAll(".scatterlayer .trace, .barlayer .trace").length,
    before, ascending, descending: column(),
  });
}, 2000));
</script>"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with the page, and the address it is served at."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(write_page({"a model": [make_outcome()]}, "A report"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_all_of_it(place, width, scheme):
    folder, address = place
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser is not None, "no chromium on PATH (Debian: apt-get install chromium)"
    (folder / f"{width}.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--virtual-time-budget=20000", "--window-size=1280,3000"]
    command += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = subprocess.run(
        [*command, f"{address}/{width}.html"], capture_output=True, text=True, timeout=120, check=True
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    text = re.search('<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert text is not None
    found = json.loads(text[1])
    assert found["scroll"] <= found["width"] == width
    assert len(found["plots"]) == len(make_outcome().figures)
    assert all(plot and 300 < plot[0] <= width and plot[1] > 300 for plot in found["plots"])
    assert found["marks"] > 0
    assert found["before"] == ["3.00", "1.00", "2.00"]
    assert found["ascending"] == ["1.00", "2.00", "3.00"] and found["descending"] == ["3.00", "2.00", "1.00"]
