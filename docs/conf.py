"""The documentation site: the Markdown pages of the repository and a reference from docstrings.

Sphinx's source folder is the root of the repository, so that relative links between the pages lead
to the same pages on the site as on GitHub. ``make docs`` builds it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import normnorm  # noqa: E402

project, release = "normnorm", normnorm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "benchmarks/*.md", "docs/**.md"]
exclude_patterns = [".*"]

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

autodoc_default_options = {"members": True, "exclude-members": "cls_to_become"}
autodoc_inherit_docstrings = False
autodoc_member_order = "groupwise"
autodoc_mock_imports = ["lightning", "monai", "pytorch_lightning", "timm", "transformers"]
autodoc_typehints_format = "short"
napoleon_use_ivar = True
maximum_signature_line_length = 88

html_theme = "pydata_sphinx_theme"
html_sidebars = {"**": ["globaltoc"]}
html_theme_options = {"navbar_center": [], "show_prev_next": False}

# The README has no table of contents of the site, which GitHub would show as code.
CONTENTS = {
    "Use": ["docs/reference", "docs/use/*"],
    "Internals": ["docs/internals/*", "CONTRIBUTING", "CHANGELOG"],
    "Measured": ["docs/measured/*", "Benchmark scripts <benchmarks/README>", "benchmarks/NOTES"],
}


def add_contents(app, page, source):
    for caption, pages in CONTENTS.items() if page == root_doc else ():
        options = ["```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", ""]
        source[0] += "\n".join(["", *options, *pages, "```", ""])


def add_index(app, exception):
    (Path(app.outdir) / "index.html").write_text(
        f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">'
    )


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
