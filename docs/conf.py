"""The site's settings. `make docs` builds it; nothing is fetched, while building or reading."""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS / "_extensions"))

import qlora_native  # noqa: E402

project = "qlora_native"
author = "the authors of qlora_native"
copyright = "the authors, MIT licence"
version = release = qlora_native.__version__

extensions = [
    "breathe",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "command_line",
    "figures",
    "formulas",
    "headers",
    "names",
]
exclude_patterns = ["_extensions"]
nitpicky = False

# ---- Python ----
# Docstrings mark code by single backticks: a link where the name is known, code everywhere.
default_role = "py:obj"
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# ---- C and C++ ----
breathe_default_project = "headers"
breathe_domain_by_file_pattern = {"*c_api*.h": "c"}
breathe_show_include = False
cpp_maximum_signature_line_length = 88
c_maximum_signature_line_length = 88
# breathe declares the namespace anew for every header.
suppress_warnings = ["duplicate_declaration.cpp"]

# ---- Pages ----
highlight_language = "none"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"qlora_native {re.match(r'[0-9]+[.][0-9]+', version).group()}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "formulas"
