"""`python -m bench NAME`: each command prints a table and one JSON line; see bench/README.md."""

import importlib
from types import ModuleType

import typer

#: Modules with one command, `run`, and modules with several.
COMMANDS = (
    "threads",
    "steps",
    "rounds",
    "scale",
    "memory",
    "gpu",
    "flower",
    "deployment",
    "hosts",
    "teachers",
)
COMMANDS += ("kills", "golden", "independent", "pack")
GROUPS = {"collapse": "collapse", "experiment": "experiments"}

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def _module(name: str) -> ModuleType | None:
    """Import a benchmark; one whose optional package is missing says so when it is called."""
    try:
        return importlib.import_module(f"bench.{name}")
    except ModuleNotFoundError as error:
        missing = error.name

        def sorry() -> None:
            raise SystemExit(f"bench {name}: the package {missing} is not installed")

        app.command(name, help=f"Needs the package {missing}.")(sorry)
        return None


for name in COMMANDS:
    if module := _module(name):
        app.command(name)(module.run)
for name, file in GROUPS.items():
    if module := _module(file):
        app.add_typer(module.app, name=name)


if __name__ == "__main__":
    app()
