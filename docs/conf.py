"""Sphinx configuration; the build needs no network."""

import lightning_woodfisher

project = "lightning-woodfisher"
author = "The lightning-woodfisher authors"
copyright = "2026, the lightning-woodfisher authors"
release = lightning_woodfisher.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = False

autodoc_typehints = "description"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "lightning-woodfisher"
