"""Settings of Sphinx for the site that `docs/build_site.py` builds: Markdown, docstrings and equations.

Two things are made here. Equations become MathML while the site is built: a browser draws them without a
script and without the network. Docstrings of this project are plain text, and are put into Sphinx's markup:
an indented equation stays a block of text, a name in backticks leads to its place.
"""

import re
import textwrap
from importlib.util import find_spec

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import desc_annotation, pending_xref
from sphinx.util.nodes import make_refnode

import fmfl

project = "fmfl"
author = copyright = "The fmfl authors"
version = release = fmfl.__version__
extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"),
    "sphinx.ext.githubpages",
]
root_doc = "index"
viewcode_follow_imported_members = False
highlight_language = "text"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
#: `site:` and `place:` begin an address that is right as it stands, see `build_site.address_in_site`.
_AS_THEY_STAND = {"site": "{{path}}", "place": "{{path}}#{{fragment}}"}
myst_url_schemes = {"http": None, "https": None, "mailto": None} | _AS_THEY_STAND

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports = [name for name in ("flwr", "onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "fmfl"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = html_domain_indices = False
# From a file, a browser does not let the search read the pages found for their first lines.
html_show_search_summary = False

#: Begins a part of a docstring that napoleon reads.
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
#: Longest value of a constant that is shown, in characters.
LONGEST = 60


def setup(app):
    """Connect this page's functions with Sphinx."""
    app.add_html_math_renderer("mathml", (_inline_equation, None), (_equation, None))
    app.connect("autodoc-process-docstring", _with_markup, priority=400)  # before napoleon, at 500
    app.connect("missing-reference", _inside_the_package)
    app.connect("doctree-read", _plainer)
    app.connect("html-page-context", _accessible, priority=900)  # after the theme
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline_equation(translator, node):
    translator.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _mathml(latex: str, display: str) -> str:
    """Write an equation as MathML, with the two signs that latex2mathml draws otherwise than LaTeX."""
    return convert(
        latex.replace(r"\arg", r"\operatorname{arg}").replace(r"\min_", r"\min\limits_"), display=display
    )


def _equation(translator, node):
    formula = _mathml(node.astext(), "block")
    translator.body.append(
        f'<div class="equation" tabindex="0" role="group" aria-label="Equation">{formula}</div>'
    )
    raise nodes.SkipNode


def _with_markup(app, what, name, obj, options, lines):
    # In a constant's first line napoleon takes the words before a colon for its type: a comment is in front.
    constant = what in ("attribute", "data", "property")
    lines[:] = [*["..", ""] * constant, *markup("\n".join(lines)).splitlines()]


def markup(text: str) -> str:
    """Put a docstring of plain text into reStructuredText; napoleon's sections keep their form."""
    paragraphs, in_section = [], False
    for paragraph in text.split("\n\n"):
        first = paragraph.lstrip("\n").split("\n", 1)[0]
        if not first.startswith(" "):
            in_section = bool(SECTION.match(first))
        if first.startswith("====="):  # a table
            paragraphs.append("::\n\n" + textwrap.indent(paragraph, "    "))
        elif first.startswith("    ") and not in_section:
            paragraphs.append(f"::\n\n{paragraph}")
        else:
            # In napoleon's own reading, all before a colon would be a type.
            paragraphs.append(re.sub(r"^(Return|Yield)s:$", _field, _prose(paragraph), flags=re.M))
    return "\n\n".join(paragraphs)


def _field(heading: re.Match) -> str:
    return f":{heading[0].lower()}"


def _prose(text: str) -> str:
    """Turn code in backticks into a link or a literal, and keep all else as it is written."""
    # What follows a space in the name of a field, Sphinx takes for its type.
    text = re.sub(r"^( {4}\w+), (?=\w+: )", "\\g<1>,\u200b", text, flags=re.M)
    parts = re.split(r"`([^`]+)`", text)
    for place, part in enumerate(parts):
        if place % 2 == 0:
            part = re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", part)
            parts[place] = rf"\ {part}" if place and re.match(r"\w", part) else part
        elif re.fullmatch(r"[A-Za-z_][\w.]*", part):
            parts[place] = f":py:obj:`{part}`"
        else:
            parts[place] = f"``{part}``"
    return "".join(parts)


def _inside_the_package(app, env, node, text):
    """Find what a docstring names from the package on, such as `devices.autocast`."""
    target = f"fmfl.{node.get('reftarget')}"
    known = env.domains["py"].objects
    if node.get("refdomain") == "py" and "." in target.removeprefix("fmfl.") and target in known:
        place = known[target]
        return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, text, target)
    return None


def _plainer(app, doctree):
    """Leave out long values of constants, and links that attributes' own names would be."""
    for part in list(doctree.findall(pending_xref)):
        if part.get("reftype") == "obj" and part.get("refspecific"):
            part.replace_self(part.children)
    for part in list(doctree.findall(desc_annotation)):
        if part.astext().startswith(" = ") and len(part.astext()) > LONGEST:
            part.parent.remove(part)


def _accessible(app, page, template, context, doctree):
    """Mend what assistive software stumbles over in the HTML of Sphinx and its theme.

    The keyboard reaches what can scroll sideways, a signature's parameters are no list of definitions, and
    the headings of the contents have a level.
    """
    body = context.get("body", "").replace("<pre>", '<pre tabindex="0">')
    named = '<div tabindex="0" role="group" aria-label="Table" class="table-wrapper'
    body = body.replace('<div class="table-wrapper', named)
    context["body"] = re.sub(r"<dl>\n(.*?)</dl>", _parameters, body, flags=re.S)
    contents = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = contents.replace('role="heading"', 'role="heading" aria-level="2"')


def _parameters(listed: re.Match) -> str:
    lines = listed[1].replace("<dd>", '<div class="parameter">').replace("</dd>", "</div>")
    return f"<div>\n{lines}</div>"
