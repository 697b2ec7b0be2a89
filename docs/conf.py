"""Sphinx settings: `make docs`."""

from importlib.metadata import version as installed

project = "vbus"
author = "The vbus authors"
copyright = "2026, The vbus authors"
version = release = installed("vbus")

extensions = ["myst_parser"]
exclude_patterns = ["build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"vbus {release}"
