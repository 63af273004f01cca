"""Command line `fmfl`: study, data, parameters, reports, use of a result, comparisons, teachers, Flower."""

import importlib
import io
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

import fmfl
from fmfl import config, errors
from fmfl.errors import OutOfTime, UserError
from fmfl.study import interrupt, options
from fmfl.study.options import Others, SettingsFile, Vary, absolute, argument, option, read_values

#: Exit code of a study that has stopped at its time limit: EX_TEMPFAIL of sysexits.h, "try again".
OUT_OF_TIME = 75

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click suggests one already
    help="Does federated segmentation get better, and faster, from a foundation model's student?",
    epilog="The TAB key completes commands, options and parameters after `fmfl --install-completion`.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fmfl {fmfl.__version__}")
        raise typer.Exit


Version = Annotated[bool, option("print the version", "--version", callback=_print_version, is_eager=True)]


@app.callback()
def _options_of_all(version: Version = False) -> None: ...


def _say_cost(cells: list, costs: dict) -> None:
    for cell in cells:
        if cell.key not in costs:
            typer.echo(f"{cell.key}: done")
            continue
        cost, rounds = costs[cell.key], f"{cell.rounds} rounds, " if cell.rounds else ""
        training = f"{rounds}{cost.images:,} images, " if cost.images else ""
        typer.echo(f"{cell.key}: {training}{_duration(cost.seconds)}")
    images = sum(cost.images for cost in costs.values())
    seconds = sum(cost.seconds for cost in costs.values())
    typer.echo(
        f"{len(costs)} of {len(cells)} notebooks to run: about {images:,} images to train on, "
        f"{_duration(seconds)} at the speed that this machine has just shown"
    )


def _duration(seconds: float) -> str:
    for unit, length in {"days": 86_400, "hours": 3600, "minutes": 60}.items():
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


@app.command()
def study(
    context: typer.Context,
    profile: Annotated[str, option("for what is not given", metavar="|".join(config.PROFILES))] = "class",
    data: Annotated[str, option("data")] = "phantom",
    teacher: Annotated[str, option("teacher")] = "builtin",
    checkpoint: Annotated[str, option("checkpoint")] = "",
    run_name: Annotated[str, option("folder of the results", "--out")] = "runs/study",
    seed: Annotated[str, option("whole numbers, joined by commas", "--seeds")] = "0",
    split: Annotated[str, option(f"some of {', '.join(config.SPLITS)}", "--splits")] = "iid,age,quantity",
    device: Annotated[str, option("device")] = "auto",
    engine: Annotated[str, option("engine")] = "local",
    p: Others = None,
    vary: Vary = None,
    settings: SettingsFile = None,
    plain: Annotated[bool, option("run the notebooks' code in this process, without Jupyter")] = False,
    replace: Annotated[bool, option("first move another study in --out to a free name", "--replace")] = False,
    only: Annotated[str, option("some notebooks, by the names of --dry-run, and what they need")] = "",
    minutes: Annotated[
        float | None,
        option("stop at the next finished round or notebook after them, with exit code 75"),
    ] = None,
    dry_run: Annotated[bool, option("say what would run and what it costs, and stop")] = False,
    progress: Annotated[bool, option("show a bar with the time left")] = True,
) -> None:
    """Run the five notebooks over all splits, starts and seeds; run again, it finishes what is missing."""
    stop_at = options.time_limit(minutes)
    if not run_name.strip():
        raise UserError("--out is empty: name a folder")
    given = options.read_others(context, p) | {"run_name": run_name, "checkpoint": checkpoint}
    given |= {name: absolute(given[name]) for name in config.tagged("place") if given.get(name)}
    given |= {"data": ",".join(read_values("--data", data, options.read_source))}
    given |= {"teacher": teacher, "device": device, "engine": engine}
    seeds = read_values("--seeds", seed, partial(config.parse, "seed"))
    splits = read_values("--splits", split, partial(config.parse, "split"))
    cfg = config.settings(given, profile=profile)
    variants = options.read_variants(context, vary, cfg)
    if cfg.teacher.checkpoint and not Path(cfg.teacher.checkpoint).is_file():
        raise UserError(f"--checkpoint {cfg.teacher.checkpoint}: there is no such file")

    with interrupt.while_importing():
        from fmfl.study import cost, grid  # import torch, which a typing mistake need not wait for

    cells = grid.plan(cfg, seeds, splits, variants)
    if only:
        cells = grid.only(cells, read_values("--only", only))
    if dry_run:
        say = partial(typer.echo, err=True)
        _say_cost(cells, cost.estimate(cells, replace_other=replace, plain=plain, say=say))
        return
    shown = progress and sys.stderr.isatty()
    ran, done = grid.run(cells, plain=plain, progress=shown, replace_other=replace, stop_at=stop_at)
    typer.echo(f"{ran} notebooks run, {done} were done already")
    if cells[-1].notebook == "05_analysis":
        typer.echo(f"report: {cfg.run_dir / 'report.html'}")


@app.command()
def merge(
    folders: Annotated[list[Path], argument("DIR DIR...", "studies' folders, made on several machines")],
    run_name: Annotated[str, option("new folder of the whole study", "--out")],
    data: Annotated[str, option("where the images are here, if not where they were there")] = "",
    checkpoint: Annotated[str, option("likewise the teacher's weights")] = "",
    plain: Annotated[bool, option("run the notebooks' code in this process, without Jupyter")] = False,
    progress: Annotated[bool, option("show a bar with the time left")] = True,
) -> None:
    """Put the parts of a study, made on machines that share no folder, together, and run its analysis."""
    if not run_name.strip():
        raise UserError("--out is empty: name a folder")
    sources = ",".join(read_values("--data", data, options.read_source)) if data else ""
    with interrupt.while_importing():
        from fmfl.study import merge

    out, shown = Path(absolute(run_name)), progress and sys.stderr.isatty()
    places = {"data": sources, "checkpoint": absolute(checkpoint) if checkpoint else ""}
    if merge.merge(folders, out, **places, plain=plain, progress=shown):
        typer.echo(f"{out}: `fmfl study` with the same settings and this --out runs what is missing")
    else:
        typer.echo(f"report: {out / 'report.html'}")


@app.command()
def params(word: Annotated[str, argument("WORD", "in a name, meaning or range")] = "") -> None:
    """List the parameters: default, the paper's value, range, the notebooks that take them, meaning."""
    listed = [about for about in config.PARAMETERS.values() if word.lower() in str(about).lower()]
    if not listed:
        raise UserError(f"no parameter has {word!r} in its text: `fmfl params` lists all of them")
    for about in listed:
        typer.echo(about)


@app.command("data")
def check_data(
    sources: Annotated[str, argument("SOURCE[,SOURCE...]", "phantom, or folders")],
    size: Annotated[int, option("pixels a side")] = 256,
    mask_class: Annotated[str, option("mask_class")] = "lung",
    strict: Annotated[bool, option("strict")] = False,
    sheet: Annotated[Path | None, option("PNG of images with their masks", metavar="FILE")] = None,
) -> None:
    """Check a data source: what it holds, what is left out and why, and what is worth a look."""
    with interrupt.while_importing():
        from fmfl import data
        from fmfl.sources.mask_files import organ_of
        from fmfl.study import inspection

    organ = organ_of(mask_class).name
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
    for sentence in inspection.warnings(cohort, organ):
        typer.echo(f"warning: {sentence}", err=True)
    if sheet is not None:
        typer.echo(f"sheet: {sheet} with {inspection.sheet(cohort, sheet, organ)} images")


@app.command()
def example(
    folder: Annotated[Path, argument("FOLDER", "a new folder")],
    number: Annotated[int, option("how many", "--images", min=1, max=100_000)] = 120,
    seed: Annotated[int, option("of the drawing", min=0)] = 0,
) -> None:
    """Write a folder of synthetic images of another organ: kidneys, with masks and a table without ages."""
    from fmfl.sources import kidneys

    typer.echo(f"example: {kidneys.write(folder, number, seed)} with {number} images and masks")


@app.command("report")
def rebuild_report(
    directory: Annotated[Path, argument("DIR", "a study's folder")],
    into: Annotated[Path | None, option("Markdown file that gets the answer instead", metavar="FILE")] = None,
) -> None:
    """Write DIR/report.html again from the files beside it."""
    with interrupt.while_importing():
        from fmfl.analysis import markdown
        from fmfl.study import report

    if into:
        typer.echo(f"results: {markdown.write_into(into, directory)}")
    else:
        typer.echo(f"report: {report.write(directory)}")


teachers = typer.Typer(
    no_args_is_help=True,
    suggest_commands=False,
    help="A teacher's weights: check a file, fetch a published one.",
)
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
    name: Annotated[str, argument("NAME", "sam_vit_b, sam_vit_l or sam_vit_h")],
) -> None:
    """Fetch a teacher's published weights and check their SHA-256."""
    with interrupt.while_importing():
        from fmfl.teachers import checkpoints

    typer.echo(f"weights: {checkpoints.download(name, progress=sys.stderr.isatty())}")


Run = Annotated[Path, argument("RUN", "the folder of a run, such as runs/study")]
Device = Annotated[str, option("device")]
Size = Annotated[int, option("pixels a side, where the run's folder does not tell", min=0)]
WhichArm = Annotated[str, option("arm of the weights", metavar="|".join(config.ARMS))]
WhichInit = Annotated[str, option("start of the weights", metavar="|".join(config.INITS))]
WhichSplit = Annotated[str, option("split of the weights", metavar="|".join(config.SPLITS))]
WhichSeed = Annotated[int | None, option("seed of the weights")]
WhichClient = Annotated[int | None, option("client of standalone weights")]


@app.command()
def predict(
    run: Run,
    images: Annotated[list[Path], argument("IMAGE|FOLDER...", "X-rays: PNG, JPEG, TIFF, DICOM")],
    out: Annotated[Path, option("folder of masks, overlays and predictions.csv")],
    arm: WhichArm = "",
    init: WhichInit = "",
    split: WhichSplit = "",
    seed: WhichSeed = None,
    client: WhichClient = None,
    size: Size = 0,
    device: Device = "auto",
) -> None:
    """Segment X-rays by a run's student; exit code 1 where some files could not be used."""
    with interrupt.while_importing():
        from fmfl.study import predictions, students

    where = students.device(device)
    final, why = students.choose(run, arm=arm, init=init, split=split, seed=seed, client=client)
    pixels = students.image_size(run, size)
    typer.echo(f"weights: {final}\nwhy: {why}")
    model = students.load(final, where)
    progress = sys.stderr.isatty()
    organ = students.organ(run)
    done = predictions.predict(model, pixels, images, out, weights=final, organ=organ, progress=progress)
    for one in done.left_out:
        typer.echo(f"left out: {one.file}: {one}", err=True)
    for line in predictions.in_words(done, out):
        typer.echo(line)
    raise typer.Exit(1 if done.left_out else 0)


@app.command("export")
def export_student(
    run: Run,
    onnx: Annotated[Path, option("file to write")],
    arm: WhichArm = "",
    init: WhichInit = "",
    split: WhichSplit = "",
    seed: WhichSeed = None,
    client: WhichClient = None,
    size: Size = 0,
    overwrite: Annotated[bool, option("replace an export of other weights", "--overwrite")] = False,
) -> None:
    """Write a run's student as an ONNX file, and check it against the network."""
    with interrupt.while_importing():
        from fmfl import export
        from fmfl.study import students

    final, why = students.choose(run, arm=arm, init=init, split=split, seed=seed, client=client)
    pixels = students.image_size(run, size)
    export.check_file(onnx, final.sha256, overwrite=overwrite)
    typer.echo(f"weights: {final}\nwhy: {why}")
    metadata = {"fmfl": fmfl.__version__, "weights": final.file.name, "weights_sha256": final.sha256}
    metadata |= {"organ": students.organ(run)}
    difference = export.write(onnx, students.load(final), pixels, metadata)
    typer.echo(f"largest difference from the network: {difference:.1e}, allowed: {export.TOLERANCE:g}")
    typer.echo(f"onnx: {onnx}\n{students.NOTE}")


@app.command()
def score(
    run: Run,
    sources: Annotated[str, argument("SOURCE[,SOURCE...]", "phantom, or folders with masks")],
    by: Annotated[str, option("site, source, age, sex, view or finding: the groups")] = "site",
    out: Annotated[Path | None, option("folder of the tables; else RUN/scores/SOURCE")] = None,
    mask_class: Annotated[str, option("class of the masks, or labels such as kidney:2; else the run's")] = "",
    size: Size = 0,
    device: Device = "auto",
) -> None:
    """Score all final weights of a run on other images: scores.csv by image, summary.csv by group."""
    with interrupt.while_importing():
        from fmfl import data
        from fmfl.study import scoring, students

    where, progress = students.device(device), sys.stderr.isatty()
    finals, pixels = students.finals(run), students.image_size(run, size)
    folder = scoring.check_folder(out or scoring.folder_of(run, sources), by)
    mask_class = mask_class or students.mask_class(run)
    cohort = data.load(sources, size=pixels, mask_class=mask_class, progress=progress)
    scores, by_group = scoring.score(finals, cohort.to(where), by, progress=progress)
    scoring.write(folder, sources, scores, by_group)
    for line in scoring.in_words(finals, by_group, cohort, run, folder):
        typer.echo(line)


@app.command()
def verify(
    one: Annotated[Path, argument("DIR_A", "a study's folder")],
    other: Annotated[Path, argument("DIR_B", "another's")],
    tolerance: Annotated[float, option("final weights and scores this near are equal")] = 0.0,
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
    no_args_is_help=True,
    suggest_commands=False,
    help="The study on several machines, through Flower: keys, a server, its clients.",
)
app.add_typer(flowers, name="flower")


@flowers.command("keys")
def flower_keys(
    folder: Annotated[Path, argument("FOLDER", "a new folder")],
    host: Annotated[str, option("the server's names or addresses, joined by commas")] = "localhost",
    clients: Annotated[int, option("how many", min=1)] = 3,
) -> None:
    """Make a folder of keys for the server and one for each client."""
    _flower("keys").make(folder, read_values("--host", host), clients)
    typer.echo(f"{folder / 'server'} stays with the server; hand client K its folder client-K alone")


@flowers.command("server")
def flower_server(
    context: typer.Context,
    keys: Annotated[Path, option("the folder server of `fmfl flower keys`")],
    run_name: Annotated[str, option("folder of the results", "--out")] = "runs/hospitals",
    start: Annotated[str, option("start")] = "",
    test_data: Annotated[str, option("test_data")] = "",
    host: Annotated[str, option("address to listen on")] = "0.0.0.0",
    port: Annotated[int, option("the one port that clients reach", min=1, max=65535)] = 8000,
    p: Others = None,
) -> None:
    """Serve the rounds to the clients; run again, it goes on where it stopped."""
    folders = [part if part == "held_out" else absolute(part) for part in config.split_list(test_data)]
    given = options.read_others(context, p) | {
        "start": start and absolute(start),
        "test_data": ",".join(folders),
    }
    _flower("deploy").serve(keys, Path(absolute(run_name)), given, host=host, port=port)
    typer.echo(f"results: {Path(run_name) / 'results.csv'}")


@flowers.command("client")
def flower_client(
    data: Annotated[str, option("this hospital's folders, joined by commas")],
    keys: Annotated[Path, option("this hospital's folder client-K")],
    server: Annotated[str, option("where the server is", metavar="HOST:PORT")],
    port: Annotated[int, option("for Flower on this machine; 0: 9094 + K", min=0, max=65535)] = 0,
) -> None:
    """Train on this hospital's images whenever the server asks, until stopped."""
    folders = read_values("--data", data, options.read_source)
    _flower("deploy").client(",".join(folders), server, keys, port or None)


def _flower(module: str) -> ModuleType:
    try:
        with interrupt.while_importing():
            return importlib.import_module(f"fmfl.flower.{module}")
    except ImportError:
        raise UserError("Flower is not installed: pip install -c requirements.lock -e '.[flower]'") from None


def main() -> None:
    """Run `fmfl`: a person's mistake is one sentence and exit code 2, Ctrl-C one and 130, a time limit 75."""
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
            sys.exit(OUT_OF_TIME if isinstance(error, OutOfTime) else 2)
        if isinstance(error, OSError):
            print(f"fmfl: {errors.of_the_system(error)}", file=sys.stderr)
            sys.exit(2)
        raise
