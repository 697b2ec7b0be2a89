"""The page: whole in itself, and right in a real browser at every width and theme."""

import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from tests.vbus.compare.test_report import with_measurements
from vbus.compare import html, plots, run
from vbus.compare.result import Report
from vbus.errors import NoDeviceError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SEEN = [
    *((400, "light"), (400, "dark"), (700, "light"), (1000, "dark")),
    *((1600, "light"), (1600, "dark")),
]
PROBE = """
<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(e =>
    !e.closest(".scroll, svg, details") && e.getBoundingClientRect().width > 0 &&
    e.getBoundingClientRect().right > innerWidth + 1).length;
  const seen = [...document.querySelectorAll("figure svg")].filter(
    e => e.getBoundingClientRect().width > 100).length;
  const style = getComputedStyle(document.body);
  const hidden = document.documentElement.scrollWidth > innerWidth;
  document.title = ["PROBE", innerWidth, wide, hidden, seen,
    style.backgroundColor, style.color].join(";");
});
</script>
"""


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return html.page(with_measurements(report))


@pytest.fixture(scope="module")
def browser() -> str:
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")


def look(browser: str, folder: Path, page: str, width: int, theme: str) -> list[str]:
    """Load the page; give what its probe says of it."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"))
    dark = theme == "dark"
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},900",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    title = re.search(r"<title>PROBE;([^<]*)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    return title[1].split(";")


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_needs_nothing_else(page: str) -> None:
    """No address of another file or host: it can be sent by mail."""
    assert not re.search(r"<(?:script|link|img|iframe)\b", page)
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_every_id_is_used_once(page: str) -> None:
    """Many drawings in one page: a second clip path of a name would clip wrong."""
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))
    assert used <= set(ids)


def test_colours_follow_the_theme(page: str) -> None:
    """Nothing is drawn in a stand-in or a fixed colour."""
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not [stand_in for stand_in in plots.VARIABLES if stand_in in drawings]
    fixed = re.findall(r"(?:fill|stroke): ?(#[0-9a-fA-F]{3,6})", drawings)
    assert not fixed


def test_each_layout_has_a_row_in_the_map(page: str) -> None:
    for name in run.LAYOUTS:
        assert f"{name}, " in page


def test_what_was_measured_is_said_to_be_in_its_section(
    page: str, report: Report
) -> None:
    """Every number says if it was modelled or measured, the plots too."""
    assert "modelled, except those of real guests" in page
    assert "Measured on real guests" in page
    nothing_drawn = msgspec.structs.replace(report, layouts=[], loads=[])
    unmeasured = html.page(nothing_drawn)
    assert "Plots: modelled." in unmeasured
    assert "Measured on real guests" not in unmeasured


def test_without_the_library_it_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(NoDeviceError, match=r"pip install 'vbus\[compare\]'"):
        plots.need_library()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), SEEN)
def test_it_fits_in_a_browser(
    page: str, browser: str, tmp_path: Path, width: int, theme: str
) -> None:
    """400 to 1600 px, light and dark: nothing sticks out, all plots are seen, text is
    readable on its ground."""
    seen_width, wide, hidden, seen, ground, ink = look(
        browser, tmp_path, page, width, theme
    )
    assert abs(int(seen_width) - max(width, 400)) < 120, seen_width
    assert (wide, hidden) == ("0", "false")
    # Of loads, of processes, of machines, of address space: two of each are there.
    assert int(seen) == len(plots.COST_PLOTS) + 2 + 2 + 2 + 2
    bright, dim = sorted((luminance(ground), luminance(ink)), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) > 7
    assert (luminance(ground) > 0.5) == (theme == "light")
