"""Build the site of docs/, docstrings and notebooks: `python docs/build_site.py [FOLDER]`.

The pages' sources are first put together in a folder of their own: Markdown from the repository, a page for
each module, and the committed notebooks with their outputs. A link of a page leads to another page of the
site where there is one, and else to a copy of the file that it names. Sphinx then writes HTML that can be
read from a file.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import modules

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

#: What becomes a page.
PAGES = (
    "docs/**/*.md",
    "*.md",
    "bench/*.md",
    "data/*.md",
    "notebooks/**/*.md",
    "notebooks/**/*.ipynb",
    "fmfl/**/*.py",
)

#: Pages below another one in the site's contents, as Sphinx finds them.
BELOW = {"notebooks.md": "notebooks/**", "results/README.md": "*/README"}

#: Folder of the pages' sources whose content is copied to the site as it is.
FILES = "_files"

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^()\s]+)(\))")

#: nbconvert's Markdown, but for what a table, a figure and printed text become.
NOTEBOOK = """\
{% extends 'markdown/index.md.j2' %}
{% block stream %}```text
{{ output.text }}
```{% endblock %}
{% block data_text %}```text
{{ output.data['text/plain'] }}
```{% endblock %}
{% block data_html %}```{raw} html
<div class="table-wrapper">
{{ output.data['text/html'] | replace('class="dataframe"', 'class="docutils"') }}
</div>
```{% endblock %}
{% block data_png %}![Figure that this cell draws]({{ output.metadata.filenames['image/png'] }}){% endblock %}
"""


def sources() -> dict[Path, Path]:
    """Map every file that becomes a page to the page's place below the site's folder."""
    files = {
        file for pattern in PAGES for file in ROOT.glob(pattern) if ".ipynb_checkpoints" not in file.parts
    }
    return {file: _place(file) for file in sorted(files) if file.name != "__main__.py"}


def _place(file: Path) -> Path:
    path = file.relative_to(ROOT)
    if file.name == "__init__.py":  # of the package or a wing
        return Path("api", "index.md")
    if file.suffix == ".py":
        return Path("api", ".".join(path.with_suffix("").parts) + ".rst")
    if path.parts[0] == "docs":
        return path.relative_to("docs")
    return path.with_suffix(".md")


def stage(folder: Path) -> None:
    """Write the pages' sources, the pictures and the files that links lead to into an empty folder."""
    pages = sources()
    for file, place in pages.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.name == "__init__.py":
            text = _modules()
        elif file.suffix == ".py":
            text = _module(file)
        elif file.suffix == ".ipynb":
            text = _linked(_notebook(file, target.parent), file, pages, folder)
        else:
            text = _linked(file.read_text(encoding="utf-8"), file, pages, folder)
        target.write_text(text + _contents(place, text), encoding="utf-8")


def _module(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n"


def _modules() -> str:
    """Return the page that lists the modules, wing by wing, each with the first line of its docstring."""
    trees = modules.modules()
    lines = ["# Modules in Python", "", "The science first, then what is built on it.", ""]
    for wing, about in modules.WINGS.items():
        lines += [f"## fmfl{'.' + wing if wing else ''}", "", about, ""]
        names = [name for name in trees if name.rpartition(".")[0] == wing]
        for name in names:
            lines.append(f"- [fmfl.{name}](fmfl.{name}.rst): {modules.first_line(trees[name])}")
        lines += ["", "```{toctree}", ":hidden:", *(f"fmfl.{name}" for name in names), "```", ""]
    return "\n".join(lines)


def _notebook(file: Path, folder: Path) -> str:
    """Return a notebook with its outputs as Markdown, and write its figures beside it."""
    from nbconvert import MarkdownExporter

    exporter = MarkdownExporter(raw_template=NOTEBOOK)
    text, resources = exporter.from_filename(str(file), {"output_files_dir": f"{file.stem}_files"})
    for name, content in resources["outputs"].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return text


def _contents(place: Path, text: str) -> str:
    """Return the hidden contents below a page: a part for each heading of the front page that has links."""
    if place.as_posix() in BELOW:
        return f"\n\n```{{toctree}}\n:hidden:\n:glob:\n{BELOW[place.as_posix()]}\n```\n"
    if place.as_posix() != "index.md":
        return ""
    parts = []
    for part in text.split("\n## ")[1:]:
        links = [(text.strip("[]("), address) for text, address, _ in LINK.findall(part)]
        linked = [f"{text} <{address}>" for text, address in links if address.endswith(".md")]
        lines = ["", "```{toctree}", ":hidden:", f":caption: {part.splitlines()[0]}", *linked, "```", ""]
        parts += lines
    return "\n".join(parts)


def _linked(text: str, file: Path, pages: dict[Path, Path], folder: Path) -> str:
    """Return a page's text with the addresses that its links have in the site."""

    def changed(link: re.Match) -> str:
        begin, address, end = link.groups()
        return begin + (address_in_site(address, file, pages, folder) or address) + end

    return LINK.sub(changed, text)


def address_in_site(address: str, file: Path, pages: dict[Path, Path], folder: Path) -> str:
    """Return the address that a link of a page has in the site; empty if it names no file of the repository.

    A file that is no page is copied to the site, to its own path.
    """
    path, _, fragment = address.partition("#")
    target = (file.parent / path).resolve()
    if not path or ":" in path or not target.exists() or not target.is_relative_to(ROOT):
        return ""
    if target.is_dir():
        target /= "__init__.py" if (target / "__init__.py").exists() else "README.md"
    here = _place(file).parent
    if target in pages and pages[target].suffix == ".rst":
        place, fragment = pages[target].with_suffix(".html"), fragment and f"{pages[target].stem}.{fragment}"
        return (f"place:{{}}#{fragment}" if fragment else "site:{}").format(os.path.relpath(place, here))
    if target in pages:
        return os.path.relpath(pages[target], here) + f"#{fragment}" * bool(fragment)
    picture = target.suffix in (".png", ".svg")
    place = _place(target) if picture else target.relative_to(ROOT)
    copy = (folder if picture else folder / FILES) / place
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(target, copy)
    return ("" if picture else "site:") + os.path.relpath(place, here)


def build(folder: Path) -> int:
    """Build the site into a folder, from nothing; warnings are errors. Returns Sphinx's exit status.

    A folder that holds anything but an earlier site is refused, as all of it would be lost.
    """
    from sphinx.cmd.build import main

    if folder.exists() and not (folder / "objects.inv").is_file() and any(folder.iterdir()):
        print(f"{folder} holds something else than a site: name another folder", file=sys.stderr)
        return 2
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="fmfl-site-") as work:
        pages = Path(work, "pages")
        (pages / FILES).mkdir(parents=True)
        stage(pages)
        options = ["-q", "-W", "--keep-going", "-c", str(DOCS), "-d", f"{work}/doctrees"]
        return main([*options, "-D", f"html_extra_path={pages / FILES}", str(pages), str(folder)])


if __name__ == "__main__":
    site = Path(sys.argv[1] if sys.argv[1:] else ROOT / "site").absolute()
    status = build(site)
    print(f"the site is built: {site / 'index.html'}" if status == 0 else "the site has the faults above")
    sys.exit(status)
