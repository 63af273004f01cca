"""``fmfl``: the whole study, a look at a data source, the report again, two studies compared."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fmfl import config
from fmfl.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Does federated segmentation get better, and faster, from a foundation model's student?",
)


#: Parameters that have an option of their own.
OPTIONS = {
    "run_name": "--out",
    "data": "--data",
    "teacher": "--teacher",
    "checkpoint": "--checkpoint",
    "device": "--device",
    "split": "--splits",
    "seed": "--seeds",
}


def _list(text: str, what: str) -> list[str]:
    found = config.several(text)
    if not found:
        raise UserError(f"{what} is empty: name at least one, with commas between them")
    return found


def _once(values: list, what: str) -> list:
    if len(set(values)) < len(values):
        raise UserError(f"{what} names one twice ({', '.join(map(str, values))}): name each once")
    return values


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())


@app.command()
def study(
    profile: Annotated[
        str, typer.Option(help="smoke, class or paper: the settings not given otherwise")
    ] = "class",
    data: Annotated[
        str, typer.Option(help="phantom, or folders with X-rays and masks, joined by commas")
    ] = "phantom",
    teacher: Annotated[str, typer.Option(help="the teacher's name")] = "builtin",
    checkpoint: Annotated[str, typer.Option(help="the teacher's weights; empty for the shipped ones")] = "",
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("runs/study"),
    seeds: Annotated[str, typer.Option(help="whole numbers, joined by commas")] = "0",
    splits: Annotated[str, typer.Option(help="iid, age, quantity, site, dirichlet")] = "iid,age,quantity",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    engine: Annotated[str, typer.Option(help="local: all clients in one process")] = "local",
    p: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="any other parameter; repeat it")
    ] = None,
    plain: Annotated[
        bool, typer.Option(help="run the notebooks' code in this process, without Jupyter")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="say what would run, and stop")] = False,
    progress: Annotated[bool, typer.Option(help="show a bar with the time left")] = True,
) -> None:
    """Run the five notebooks over all splits, starts and seeds; run again, it finishes what is missing."""
    if engine != "local":
        raise UserError(f"engine {engine!r} is unknown: choose local")
    given: dict[str, object] = {}
    for pair in p or []:
        name, separator, text = pair.partition("=")
        if not separator:
            raise UserError(f"-p {pair} has no value: write -p NAME=VALUE")
        if name in OPTIONS:
            raise UserError(f"-p {name} has an option of its own: use {OPTIONS[name]}")
        given[name] = config.parse(name, text)
    # Notebooks run in their own folder, so every path is made absolute.
    folders = [part if part == "phantom" else _absolute(part) for part in _list(data, "--data")]
    given |= {"data": ",".join(_once(folders, "--data")), "teacher": teacher, "device": device}
    given |= {"run_name": _absolute(out), "checkpoint": checkpoint and _absolute(checkpoint)}
    seed_list = _once([config.parse("seed", text) for text in _list(seeds, "--seeds")], "--seeds")
    split_list = _once([config.checked("split", name) for name in _list(splits, "--splits")], "--splits")
    cfg = config.settings(given, profile=profile)
    for part in folders:
        if part != "phantom" and not Path(part).is_dir():
            raise UserError(f"--data {part}: there is no such folder")
    if cfg.teacher.checkpoint and not Path(cfg.teacher.checkpoint).is_file():
        raise UserError(f"--checkpoint {cfg.teacher.checkpoint}: there is no such file")

    from fmfl import grid  # imports torch, which a typing mistake need not wait for

    cells = grid.plan(cfg, seed_list, split_list)
    if dry_run:
        for cell in cells:
            typer.echo(f"{cell.name}: {cell.rounds} rounds" if cell.rounds else cell.name)
        return
    ran, done = grid.run(cells, plain=plain, progress=progress and sys.stderr.isatty())
    typer.echo(f"{ran} notebooks run, {done} were done already")
    typer.echo(f"report: {cfg.run_dir / 'report.html'}")


@app.command("data")
def check_data(
    sources: Annotated[str, typer.Argument(metavar="SOURCE[,SOURCE...]", help="phantom, or folders")],
    size: Annotated[int, typer.Option(help="pixels a side")] = 256,
    mask_class: Annotated[str, typer.Option(help="the annotated class that is segmented")] = "lung",
    strict: Annotated[bool, typer.Option(help="a bad file is an error")] = False,
) -> None:
    """Check a data source: what it holds, what is left out and why."""
    from fmfl import data

    cohort = data.load(sources, size=size, mask_class=mask_class, strict=strict, progress=sys.stderr.isatty())
    typer.echo(cohort.summary().to_string())
    typer.echo(
        f"{len(cohort)} images of {cohort.table.patient_id.nunique()} patients, "
        f"fingerprint {cohort.fingerprint}"
    )
    for row in cohort.left_out[cohort.left_out.defect].itertuples():
        typer.echo(f"left out: {row.source}/{row.file}: {row.detail}", err=True)


@app.command("report")
def rebuild_report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a study's folder")],
) -> None:
    """Write DIR/report.html again from the files beside it."""
    from fmfl import report

    typer.echo(f"report: {report.write(directory)}")


@app.command()
def verify(
    one: Annotated[Path, typer.Argument(metavar="DIR_A", help="a study's folder")],
    other: Annotated[Path, typer.Argument(metavar="DIR_B", help="another's")],
    tolerance: Annotated[
        float, typer.Option(help="final weights and scores this near are equal, as between devices")
    ] = 0.0,
) -> None:
    """Compare two studies round by round: exit code 0 where they are equal, 1 where they part."""
    if not 0 <= tolerance < float("inf"):
        raise UserError(f"--tolerance is {tolerance}: it must be a number of at least 0")

    from fmfl import verify

    lines, equal = verify.compare(one, other, tolerance)
    for line in lines:
        typer.echo(line)
    raise typer.Exit(0 if equal else 1)


def main() -> None:
    """The command ``fmfl``: a person's mistake is one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"fmfl: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C
            print("fmfl: stopped; the same command continues where it stopped", file=sys.stderr)
        raise
