"""Settings of the documentation site. `make docs` builds it with every warning as an error."""

from sdit import __version__

project = "sdit"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "figures"]
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures belong to torch and numpy, whose pages are not read

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
myst_links_external_new_tab = False
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "sdit"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["tables.css"]
