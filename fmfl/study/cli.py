"""`fmfl`: the whole study, a look at a data source, the report again, two studies compared."""

import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from fmfl import config, errors
from fmfl.errors import UserError
from fmfl.study import interrupt

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
    "engine": "--engine",
    "split": "--splits",
    "seed": "--seeds",
}


def _list(text: str, what: str) -> list[str]:
    found = config.split_list(text)
    if not found:
        raise UserError(f"{what} is empty: name at least one, with commas between them")
    return found


def _once(values: list, what: str) -> list:
    if len(set(values)) < len(values):
        raise UserError(f"{what} names one twice ({', '.join(map(str, values))}): name each once")
    return values


def _pairs(option: str, texts: list[str] | None, options: dict[str, str] = OPTIONS) -> list[tuple[str, str]]:
    """NAME=VALUE texts of an option, split; `options` are the names that have an option of their own."""
    found = []
    for pair in texts or []:
        name, separator, text = pair.partition("=")
        if not separator:
            raise UserError(f"{option} {pair} has no value: write {option} NAME=VALUE")
        if name in options:
            raise UserError(f"{option} {name} has an option of its own: use {options[name]}")
        found.append((name, text))
    return found


def _variants(texts: list[str] | None, cfg: config.Settings) -> dict[str, list]:
    """What --vary asks for; the study's own value of a parameter is there anyway."""
    vary: dict[str, list] = {}
    for name, text in _pairs("--vary", texts):
        if name in ("arms", "inits"):
            raise UserError(f"--vary {name} is no axis of the map: use -p {name}")
        values = [config.parse(name, part) for part in _list(text, f"--vary {name}")]
        vary.setdefault(name, []).extend(value for value in values if value != cfg.flat()[name])
        _once(vary[name], f"--vary {name}")
    return vary


def _say_cost(cells: list, costs: dict) -> None:
    for cell in cells:
        if cell.key not in costs:
            typer.echo(f"{cell.key}: done")
            continue
        cost, rounds = costs[cell.key], f"{cell.rounds} rounds, " if cell.rounds else ""
        training = f": {rounds}{cost.images:,} images, {_hours(cost.hours)}" if cost.images else ""
        typer.echo(f"{cell.key}{training}")
    images, hours = sum(cost.images for cost in costs.values()), sum(cost.hours for cost in costs.values())
    typer.echo(
        f"{len(costs)} of {len(cells)} cells to run: about {images:,} images to train on, {_hours(hours)} at "
        "the speed that this device has just shown; the teacher, scoring and starting kernels come on top"
    )


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


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
    engine: Annotated[
        str, typer.Option(help="local, or flower: the clients behind Flower's messages")
    ] = "local",
    p: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="any other parameter; repeat it")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=V1,V2,...", help="also with other values of one parameter, for the map; repeat it"
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option(help="run the notebooks' code in this process, without Jupyter")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="how many notebooks may run at once")] = 1,
    replace: Annotated[
        bool, typer.Option("--replace", help="move another study that is in --out to a free name first")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="say what would run and what it costs, and stop")] = False,
    progress: Annotated[bool, typer.Option(help="show a bar with the time left")] = True,
) -> None:
    """Run the five notebooks over all splits, starts and seeds; run again, it finishes what is missing."""
    given: dict[str, object] = {name: config.parse(name, text) for name, text in _pairs("-p", p)}
    given["engine"] = engine
    # Notebooks run in their own folder, so every path is made absolute.
    given |= {name: _absolute(given[name]) for name in ("encoder_file", "init_file") if given.get(name)}
    folders = [part if part == "phantom" else _absolute(part) for part in _list(data, "--data")]
    given |= {"data": ",".join(_once(folders, "--data")), "teacher": teacher, "device": device}
    given |= {"run_name": _absolute(out), "checkpoint": checkpoint and _absolute(checkpoint)}
    seed_list = _once([config.parse("seed", text) for text in _list(seeds, "--seeds")], "--seeds")
    split_list = _once([config.validate("split", name) for name in _list(splits, "--splits")], "--splits")
    cfg = config.settings(given, profile=profile)
    variants = _variants(vary, cfg)
    for part in folders:
        if part != "phantom" and not Path(part).is_dir():
            raise UserError(f"--data {part}: there is no such folder")
    if cfg.teacher.checkpoint and not Path(cfg.teacher.checkpoint).is_file():
        raise UserError(f"--checkpoint {cfg.teacher.checkpoint}: there is no such file")

    with interrupt.while_importing():
        from fmfl.study import grid  # imports torch, which a typing mistake need not wait for

    cells = grid.plan(cfg, seed_list, split_list, variants)
    if dry_run:
        _say_cost(cells, grid.estimate(cells, replace_other=replace))
        return
    shown = progress and sys.stderr.isatty()
    ran, done = grid.run(cells, plain=plain, progress=shown, jobs=jobs, replace_other=replace)
    typer.echo(f"{ran} notebooks run, {done} were done already")
    typer.echo(f"report: {cfg.run_dir / 'report.html'}")


@app.command("data")
def check_data(
    sources: Annotated[str, typer.Argument(metavar="SOURCE[,SOURCE...]", help="phantom, or folders")],
    size: Annotated[int, typer.Option(help="pixels a side")] = 256,
    mask_class: Annotated[str, typer.Option(help="the annotated class that is segmented")] = "lung",
    strict: Annotated[bool, typer.Option(help="a bad file is an error")] = False,
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write a PNG of images with the contours of their masks"),
    ] = None,
) -> None:
    """Check a data source: what it holds, what is left out and why, and what is worth a look."""
    with interrupt.while_importing():
        from fmfl import data
        from fmfl.study import inspection

    if sheet is not None:
        inspection.sheet_file(sheet)  # before the long work
    cohort = data.load(sources, size=size, mask_class=mask_class, strict=strict, progress=sys.stderr.isatty())
    typer.echo(cohort.summary().to_string())
    typer.echo(
        f"{len(cohort)} images of {cohort.table.patient_id.nunique()} patients, "
        f"fingerprint {cohort.fingerprint}"
    )
    for row in cohort.left_out[cohort.left_out.defect].itertuples():
        typer.echo(f"left out: {row.source}/{row.file}: {row.detail}", err=True)
    for sentence in inspection.warnings(cohort):
        typer.echo(f"warning: {sentence}", err=True)
    if sheet is not None:
        typer.echo(f"sheet: {sheet} with {inspection.sheet(cohort, sheet)} images")


@app.command("report")
def rebuild_report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a study's folder")],
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="put the answer into this Markdown file instead, between its marks"
        ),
    ] = None,
) -> None:
    """Write DIR/report.html again from the files beside it."""
    with interrupt.while_importing():
        from fmfl.analysis import markdown
        from fmfl.study import report

    typer.echo(
        f"results: {markdown.write_into(into, directory)}" if into else f"report: {report.write(directory)}"
    )


teachers = typer.Typer(no_args_is_help=True, help="A teacher's weights: check a file, fetch a published one.")
app.add_typer(teachers, name="teacher")


@teachers.command("check")
def check_teacher(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a checkpoint")],
    name: Annotated[str, typer.Option("--teacher", help="the teacher that the file shall be")],
) -> None:
    """Say which weights a file holds, and how they fit; exit code 2 where they do not."""
    with interrupt.while_importing():
        from fmfl import teacher
        from fmfl.teachers import checkpoints

    if file.is_file():
        sha256 = checkpoints.sha256_of(file)
        typer.echo(f"SHA-256 {sha256}")
        typer.echo(
            f"published as {checkpoints.published_as(sha256) or 'none: no published checksum is this one'}"
        )
    loaded = teacher.load(name, file)
    typer.echo(f"all keys fit {name}, {loaded.num_parameters:,} parameters, input of {loaded.size} pixels")


@teachers.command("download")
def download_teacher(
    name: Annotated[str, typer.Argument(metavar="NAME", help="sam_vit_b, sam_vit_l or sam_vit_h")],
) -> None:
    """Fetch a teacher's published weights and check their SHA-256."""
    with interrupt.while_importing():
        from fmfl.teachers import checkpoints

    typer.echo(f"weights: {checkpoints.download(name, progress=sys.stderr.isatty())}")


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

    with interrupt.while_importing():
        from fmfl.study import verify

    lines, equal = verify.compare(one, other, tolerance)
    for line in lines:
        typer.echo(line)
    raise typer.Exit(0 if equal else 1)


flowers = typer.Typer(
    no_args_is_help=True, help="The study on several machines, through Flower: keys, a server, its clients."
)
app.add_typer(flowers, name="flower")


@flowers.command("keys")
def flower_keys(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a new folder")],
    host: Annotated[
        str, typer.Option(help="names or addresses of the server, as clients reach it, joined by commas")
    ] = "localhost",
    clients: Annotated[int, typer.Option(min=1, help="how many")] = 3,
) -> None:
    """Make a folder of keys for the server and one for each client."""
    deploy = _deploy()
    deploy.keys(folder, _list(host, "--host"), clients)
    typer.echo(f"{folder / 'server'} stays with the server; hand client K its folder client-K alone")


@flowers.command("server")
def flower_server(
    keys: Annotated[Path, typer.Option(help="the folder server of `fmfl flower keys`")],
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("runs/hospitals"),
    start: Annotated[
        str, typer.Option(help="first weights, such as init-fm-seed0.safetensors; empty: random")
    ] = "",
    test_data: Annotated[str, typer.Option(help="folders that the server scores on; empty: none")] = "",
    host: Annotated[str, typer.Option(help="address to listen on")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the one port that clients reach")] = 8000,
    p: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="any other parameter; repeat it")
    ] = None,
) -> None:
    """Serve the rounds to the clients; run again, it goes on where it stopped."""
    deploy = _deploy()
    own = {"run_name": "--out", "start": "--start", "test_data": "--test-data"}
    given: dict[str, object] = {name: config.parse(name, text) for name, text in _pairs("-p", p, own)}
    folders = [part if part == "held_out" else _absolute(part) for part in config.split_list(test_data)]
    given |= {"start": start and _absolute(start), "test_data": ",".join(folders)}
    deploy.serve(keys, Path(_absolute(out)), given, host=host, port=port)
    typer.echo(f"results: {out / 'results.csv'}")


@flowers.command("client")
def flower_client(
    data: Annotated[str, typer.Option(help="this hospital's folders, joined by commas")],
    keys: Annotated[Path, typer.Option(help="this hospital's folder client-K")],
    number: Annotated[int, typer.Option(min=0, help="K, from 0")],
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="where the server is")],
    clients: Annotated[int, typer.Option(min=1, help="how many there are")] = 3,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="of Flower's own on this machine; 0: 9094 + K")
    ] = 0,
) -> None:
    """Train on this hospital's images whenever the server asks, until stopped."""
    folders = [_absolute(part) for part in _list(data, "--data")]
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--data {folder}: there is no such folder")
    _deploy().client(",".join(folders), server, keys, number, clients, port or None)


def _deploy() -> ModuleType:
    try:
        with interrupt.while_importing():
            from fmfl.flower import deploy
    except ImportError:
        raise UserError("Flower is not installed: pip install -c requirements.lock -e '.[flower]'") from None
    return deploy


def main() -> None:
    """Run `fmfl`: a person's mistake is one sentence and exit code 2, Ctrl-C one and 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no × gets an escape, not an error
            stream.reconfigure(errors="backslashreplace")
    noted = interrupt.Noted()
    try:
        with interrupt.handled(noted.act):
            app()
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 2
        if code and (noted.came or code == 130):  # 130 is what typer makes of it
            print(interrupt.STOPPED, file=sys.stderr)
            sys.exit(130)
        if isinstance(error, UserError):
            print(f"fmfl: {error}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, OSError):
            print(f"fmfl: {errors.of_the_system(error)}", file=sys.stderr)
            sys.exit(2)
        raise
