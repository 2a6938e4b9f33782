"""`make docs`: these pages, and the API reference from the docstrings. A warning is an error."""

import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).parent.parent

project = 'cmanp_ros'
author = 'the contributors of cmanp_ros'
copyright = f'2026, {author}. Apache-2.0'
release = xml.etree.ElementTree.parse(ROOT / 'package.xml').findtext('version')

extensions = ['myst_parser', 'sphinx.ext.autodoc']
myst_heading_anchors = 4  # links to a heading are written as GitHub has them
autodoc_member_order = 'bysource'
autodoc_default_options = {'members': True, 'show-inheritance': True}
exclude_patterns = ['images']
html_theme = 'furo'
html_title = f'cmanp_ros {release}'
