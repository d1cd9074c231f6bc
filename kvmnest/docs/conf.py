"""Sphinx settings of the documentation; built by ci/docs, warnings are errors."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "extension"), str(HERE.parent.parent)]

import kvmnest  # noqa: E402  (the tree that these pages stand in, not an installed one)

project = "kvmnest"
author = "the kvmnest authors"
project_copyright = "the kvmnest authors, MIT licence"
version = release = kvmnest.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
    "documented_modules",
    "documented_formats",
    "tables",
]
exclude_patterns = ["extension"]
default_role = "code"
nitpicky = True
# References that no page of ours can resolve: other projects' names, without their inventories,
# since a build asks no network.
nitpick_ignore_regex = [
    ("py:.*", r"(?!kvmnest\b).*"),
    ("py:class", r"kvmnest\..*T"),  # type variables
    ("py:class", r"kvmnest\.(known|settings)\..*"),  # these have no page of their own
]

myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {"version": release}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"kvmnest {release}"
html_static_path: list[str] = []
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
