"""The page in a real browser, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from backdoorscan.plugin.reporter import Terminal
from backdoorscan.reports.html import Html

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
MEASURE = """
<style>body { width: WIDTHpx }</style>
<script>
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll") && !e.closest("svg")
  && e.getBoundingClientRect().right > WIDTH + 1);
document.title = "over:" + wide.map(e => e.tagName + "." + e.className).join(",") + ":end";
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page was not looked at in a browser"),
]


def browse(folder: Path, *arguments: str) -> str:
    profile = folder / "profile"
    profile.mkdir()
    switches = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync hide-scrollbars"
    )
    command = [str(BROWSER), *(f"--{switch}" for switch in switches.split()), f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize("kind", ["scan", "repair", "evaluation"])
@pytest.mark.parametrize("width", [1200, 500])
def test_page_is_drawn(kind: str, width: int, make: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(Html().render(getattr(make, kind)(), Terminal()), "utf-8")
    picture = tmp_path / "page.png"
    browse(tmp_path, f"--window-size={width},1600", f"--screenshot={picture}", (tmp_path / "page.html").as_uri())
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (1600, width)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert (np.ptp(pixels, axis=(1, 2)) > 8).mean() > 0.5  # most lines of the screen show something
    edge = pixels[:, -6:]
    assert (edge == edge[0, -1]).all()  # the margin is empty: nothing runs out of the window


@pytest.mark.parametrize("width", [360, 800])
def test_nothing_is_wider_than_the_window(width: int, make: SimpleNamespace, tmp_path: Path) -> None:
    text = Html().render(make.scan(make.run(3, 60)), Terminal())
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", MEASURE.replace("WIDTH", str(width)))
    (tmp_path / "page.html").write_text(text, "utf-8")
    size = f"--window-size={max(width, 500)},800"  # narrower windows are not opened: the body is made narrow instead
    page = browse(tmp_path, size, "--dump-dom", (tmp_path / "page.html").as_uri())
    assert "<title>over::end</title>" in page, re.findall("over:.*?:end", page)
