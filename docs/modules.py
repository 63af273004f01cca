"""Write docs/modules.md, a table of the package's modules and their imports: `python docs/modules.py`."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "fmfl"
PAGE = Path(__file__).with_suffix(".md")

#: The wings in the order of reading, each with one line; the science has no name of its own.
WINGS = {
    "": "The science: what the paper needs. It imports nothing of the wings but sources and teachers.",
    "sources": "Readers of images and masks, and synthetic images: chest X-rays, kidneys.",
    "teachers": "The Segment Anything family as its authors call it, and the built-in teacher.",
    "analysis": "Statistics, tables, the paper's claims, figures, the loss landscape.",
    "study": "The notebooks' inputs and files, the grid of a study, the report, the command line.",
    "course": "The course's exercises: checks that name a mistake, and a copy for each participant.",
    "flower": "The same rounds on Flower, in one process and deployed. No other wing imports it.",
    "widgets": "Interactive pieces of the notebooks. They hold no science, and no other wing imports them.",
}


def modules() -> dict[str, ast.Module]:
    """Parse every module of the package, by its dotted name below `fmfl`."""
    return {
        file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): ast.parse(
            file.read_text(encoding="utf-8")
        )
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.name not in ("__init__.py", "__main__.py")
    }


def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Find the modules that each one imports, inside functions too; imports for types alone do not count."""
    return {name: _imported(tree, set(trees)) - {name} for name, tree in trees.items()}


def _imported(tree: ast.Module, known: set[str]) -> set[str]:
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    result = set()
    for node in set(ast.walk(tree)) - skipped:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fmfl":
            home = node.module.removeprefix("fmfl").removeprefix(".")
            for alias in node.names:
                inside = f"{home}.{alias.name}".removeprefix(".")
                result.add(inside if inside in known else home)
        elif isinstance(node, ast.Import):
            result |= {alias.name.removeprefix("fmfl.") for alias in node.names}
    return result & known


def first_line(tree: ast.Module) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(tree) or "").splitlines()[0]


def page() -> str:
    """Return the page's Markdown."""
    trees = modules()
    needs = imports(trees)
    lines = ["# Modules", "", "`python docs/modules.py` writes this page."]
    lines += ["`tests/test_layout.py` holds it and the direction of the imports.", ""]
    for wing, about in WINGS.items():
        lines += [f"## fmfl{'/' + wing if wing else ''}", "", about, ""]
        lines += ["| module | holds | imports |", "|---|---|---|"]
        for name, tree in trees.items():
            if name.rpartition(".")[0] == wing:
                file = name.replace(".", "/") + ".py"
                used = ", ".join(f"`{other}`" for other in sorted(needs[name]))
                lines.append(f"| [{name.rpartition('.')[2]}](../fmfl/{file}) | {first_line(tree)} | {used} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
