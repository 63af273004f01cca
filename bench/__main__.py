"""`python -m bench NAME`: each command prints a table and one JSON line; see bench/README.md."""

import importlib
import sys
from types import ModuleType

import typer

from fmfl import errors
from fmfl.errors import UserError

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


def _module(file: str, name: str) -> ModuleType | None:
    """Import a benchmark; one whose optional package is missing says so when its command is called."""
    try:
        return importlib.import_module(f"bench.{file}")
    except ModuleNotFoundError as error:
        missing = error.name

        def sorry() -> None:
            raise SystemExit(f"bench {name}: the package {missing} is not installed")

        anything = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command(name, help=f"Needs the package {missing}.", context_settings=anything)(sorry)
        return None


for name in COMMANDS:
    if module := _module(name, name):
        app.command(name)(module.run)
for name, file in GROUPS.items():
    if module := _module(file, name):
        app.add_typer(module.app, name=name)


def main() -> None:
    """Run the benchmarks: a person's mistake is one sentence and exit code 2, as in `fmfl`."""
    try:
        return app()
    except UserError as error:
        mistake = str(error)
    except OSError as error:
        mistake = errors.of_the_system(error)
    print(f"bench: {mistake}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
