"""How the site is built: `make docs`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS / "_ext"))

# What examples print is on their pages: no column of progress bars, and nothing about torch and this machine.
os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore", message="`torch.jit", category=FutureWarning)
warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

project = "luxtorch"
author = "The luxtorch authors"
copyright = author
release = version = version_of("luxtorch")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_gallery.gen_gallery",
    "luxtorch_reference",
]
exclude_patterns = ["_ext"]
default_role = "lux"
nitpicky = True
# Signatures also name types of torch and of Python, whose pages are not here, and some that are private.
nitpick_ignore_regex = [("py:.*", r"(?!luxtorch\.).*|.*\._.*")]

# Markdown
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# The reference, from the docstrings
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

# Tutorials: the examples, run. The one for several processes needs torchrun, so it is shown only; and so is that which
# needs transformers and peft, where these are not installed.
shown_only = [
    "ddp_",
    *([] if find_spec("peft") and find_spec("transformers") else ["finetune_"]),
]
sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["tutorials"],
    "filename_pattern": rf"/(?!{'|'.join(shown_only)})\w+\.py$",
    "within_subsection_order": "luxtorch_reference.TutorialOrder",
    "reset_modules": ("matplotlib", "luxtorch_reference.name_file"),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "write_computation_times": False,
    "show_memory": False,
    "min_reported_time": 1,
}

html_theme = "furo"
html_title = "luxtorch"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
