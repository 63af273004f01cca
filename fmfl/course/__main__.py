"""Command line of the course: `python -m fmfl.course copy NAME`, `python -m fmfl.course build`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fmfl import paths
from fmfl.course import classroom, exercises
from fmfl.course.answers import NotYet

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def copy(
    participants: Annotated[list[str], typer.Argument(help="names: letters, digits, - and _")],
    check: Annotated[
        bool, typer.Option(help="run every solution once, to see that the machine is fit")
    ] = True,
    solutions: Annotated[Path | None, typer.Option(help="folder that keeps the executed solutions")] = None,
) -> None:
    """Make each participant's copy of the exercises in runs/class/NAME; what is there stays as it is."""
    folders = [_copy(name) for name in dict.fromkeys(participants)]
    if check or solutions:
        _check(solutions)
    where = os.path.relpath(folders[0], paths.ROOT)
    typer.echo(
        f"\nNext: `make lab`, and open {where}/1_look.ipynb in the file browser on the left.\n"
        "Write the prediction first, fill in the cells with three dots, and run the check below each.\n"
        f"Predictions are kept in {where}. For the teacher: docs/course.md."
    )


def _copy(name: str) -> Path:
    try:
        folder, new, kept = classroom.copy(name)
    except NotYet as error:
        typer.echo(str(error).replace("\n", " "), err=True)
        raise typer.Exit(2) from None
    here = os.path.relpath(folder, paths.ROOT)
    stays = f", {len(kept)} stay as they are" if kept else ""
    typer.echo(f"{here}: {len(new)} new notebooks{stays}.")
    return folder


def _check(folder: Path | None) -> None:
    from papermill.exceptions import PapermillExecutionError

    typer.echo("Running every solution once:")
    try:
        for name, seconds in classroom.run_solutions(folder):
            slow = " (slow: close other programs, or expect to wait)" if seconds > 60 else ""
            typer.echo(f"  {name:<12} passes in {seconds:.0f} s{slow}")
    except PapermillExecutionError as error:
        typer.echo(
            f"A solution failed, so this machine is not fit yet: {error.ename}: {error.evalue}", err=True
        )
        raise typer.Exit(1) from None


@app.command()
def build() -> None:
    """Write notebooks/exercises/*.ipynb from their sources."""
    for file in exercises.build():
        typer.echo(os.path.relpath(file, paths.ROOT))


if __name__ == "__main__":
    app()
