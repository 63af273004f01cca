"""Merge of a study's parts, run on machines that share no folder, into the folder of the whole study.

The whole study has all seeds, splits and variants of its parts. Its notebooks are planned by `grid.plan`, and
taken from a part where they are done there by their fingerprints. What is left to run is then what
`fmfl study` would run: the analysis, and whatever no part has finished.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from fmfl import config, runs, states
from fmfl.config import ARMS, SPLITS, split_list
from fmfl.errors import UserError, first_few
from fmfl.study import grid, outputs, preflight
from fmfl.study.cells import Cell, fingerprints, training_runs
from fmfl.study.outputs import read_record
from fmfl.study.provenance import commit

#: Settings in which the parts of one study may differ: its axes, and paths of what is compared by its bytes.
APART = {"seed", "split", "arms", "data", "checkpoint"}

#: Notebooks that train what others go on from; the analysis needs all of them.
TRAINING = ("03_distill", "04_federate")


@dataclass(frozen=True)
class Part:
    """Folder of a part of a study.

    Attributes:
        folder: its place.
        records: names and records of its cells, without those of variants.
    """

    folder: Path
    records: list[tuple[str, dict[str, Any]]]

    def of(self, *notebooks: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield name and settings of the cells of some notebooks."""
        for name, about in self.records:
            if about["notebook"] in notebooks:
                yield name, config.defaults() | about["settings"]

    def places(self) -> dict[str, Any]:
        """Return the paths of data and checkpoint in this part, and its own."""
        places: dict[str, Any] = {"run_name": str(self.folder)}
        for _, about in self.records:
            names = {"data", "checkpoint"} & config.taken_by(about["notebook"])
            places |= {name: about["settings"][name] for name in names if name in about["settings"]}
        return places

    def checkpoints(self) -> list[dict[str, Any]]:
        """Return the records of the runs in `weights/`, the unfinished ones included."""
        files = sorted((self.folder / "weights").glob("*.safetensors"))
        return [record for file in files if "made_of" in (record := states.read_record(file))]


@dataclass(frozen=True)
class Whole:
    """The study that the parts make up.

    Attributes:
        settings: that all parts have in common, by name.
        seeds, splits: of all parts.
        vary: to a setting's name the values of its variants.
    """

    settings: dict[str, Any]
    seeds: list[int]
    splits: list[str]
    vary: dict[str, list[Any]]

    def plan(self, places: dict[str, Any]) -> list[Cell]:
        """Return the study's cells with data, checkpoint and folder in some places."""
        return grid.plan(config.settings(self.settings | places), self.seeds, self.splits, self.vary)


@dataclass
class Gathered:
    """Files for the whole study's folder.

    Attributes:
        cells: to a cell's key the cell in the part that it is taken from.
        files: to each file's name below the study's folder its source.
        rounds: to a cell's key the rounds of its unfinished runs that are taken.
    """

    cells: dict[str, Cell] = field(default_factory=dict)
    files: dict[Path, Path] = field(default_factory=dict)
    rounds: dict[str, float] = field(default_factory=dict)

    def missing(self, cells: list[Cell]) -> list[Cell]:
        """Return the cells that train and that no part has finished."""
        return [cell for cell in cells if cell.notebook in TRAINING and cell.key not in self.cells]


def merge(
    folders: list[Path],
    out: Path,
    *,
    data: str = "",
    checkpoint: str = "",
    plain: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = tqdm.write,
) -> list[Cell]:
    """Put the parts of a study together in a new folder, and run the analysis there. The parts do not change.

    Args:
        folders: of the parts.
        out: the new folder.
        data: where the images are on this machine; empty: where the parts had them.
        checkpoint: likewise the teacher's weights.
        plain, progress, say: see `grid.run`.

    Returns:
        The cells that no part has finished. Where there are any, the analysis waits for them.

    Raises:
        UserError: the parts are not of one study, differ in a cell that both have, or are damaged. Nothing
            is left in `out` then, unless it was the analysis that failed.
    """
    out = out.absolute()
    parts = [_part(folder) for folder in _check_places(folders, out)]
    whole = _whole(parts)
    _refuse_other_parts(parts, whole)
    cells = whole.plan(_places(parts, data, checkpoint) | {"run_name": str(out)})
    with contextlib.nullcontext() if progress else grid.no_bars():
        inputs = preflight.check(cells)
    _refuse_other_inputs(parts, whole, inputs, cells[0])
    gathered = _gather(parts, whole, inputs, say)
    _check_files(gathered)
    _write(gathered, cells, fingerprints(cells, inputs), out)
    missing = gathered.missing(cells)
    for cell in missing:
        rounds = f": {gathered.rounds[cell.key]:.0f} of {cell.rounds} rounds are there" if cell.rounds else ""
        say(f"missing: {cell.key}{rounds}")
    if not missing:
        _analyse(cells, out, plain=plain, progress=progress, say=say)
    return missing


def _check_places(folders: list[Path], out: Path) -> list[Path]:
    """Return the parts' folders with their full paths, or raise a UserError."""
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if not place.is_dir():
            raise UserError(f"{folder}: there is no such folder; name a study's folder")
        if places.count(place) > 1:
            raise UserError(f"{folder} is named twice: name each part once")
        if place in (out.resolve(), *out.resolve().parents):
            raise UserError(f"--out {out} lies in {folder}, which stays as it is: name another folder")
    if len(places) < 2:
        raise UserError("one folder alone is no merge: name at least two")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(
            f"--out {out} exists: name a new folder; to add to a merged study, name its folder as a part too"
        )
    return places


def _part(folder: Path) -> Part:
    part = Part(folder, list(outputs.cell_records(folder)))
    if not any(part.of(*TRAINING)):
        raise UserError(f"{folder} holds no start or federation of a study: name a study's folder")
    return part


# ---------------------------------------------------------------------------------------------------
# The whole study
# ---------------------------------------------------------------------------------------------------


def _whole(parts: list[Part]) -> Whole:
    """Return the study that the parts make up; their settings are those of its plan."""
    settings = _common_settings(parts)
    made = [one for part in parts for _, one in part.of("04_federate")]
    begun = [record for part in parts for record in part.checkpoints()]
    starts = [one for part in parts for _, one in part.of("03_distill")]
    splits = {one["split"] for one in (*made, *begun)}
    arms = {arm for one in made for arm in split_list(one["arms"])} | {one["arm"] for one in begun}
    if arms:
        settings["arms"] = ",".join(arm for arm in ARMS if arm in arms)
    if not any(part for part in parts if any(part.of("05_analysis"))):
        compared = {one["split"] for one in made if {*split_list(one["arms"])} - {"federated"}}
        settings["reference_split"] = compared.pop() if len(compared) == 1 else settings["reference_split"]
    return Whole(
        settings=settings,
        seeds=sorted({one["seed"] for one in (*made, *begun, *starts)}),
        splits=[split for split in SPLITS if split in splits] or ["iid"],
        vary=_variants(parts, settings),
    )


def _common_settings(parts: list[Part]) -> dict[str, Any]:
    """Return the value of each setting, from the cells that depend on it; other values are refused."""
    seen: dict[str, tuple[Any, Path]] = {}
    for part in parts:
        for notebook in config.NOTEBOOKS:
            for cell, used in part.of(notebook):
                for name in sorted(outputs.depends_on(notebook) - APART):
                    value, folder = seen.setdefault(name, (used[name], part.folder))
                    if used[name] != value:
                        raise UserError(
                            f"{name} is {used[name]!r} in {part.folder} ({cell}) and {value!r} in {folder}: "
                            f"{_remedy(name)}"
                        )
    return config.defaults() | {name: value for name, (value, _) in seen.items()}


def _remedy(name: str) -> str:
    if name == "images_without_age":  # decided by a study's splits
        return "run the part that keeps them again with -p images_without_age=leave_out"
    return "parts of one study have the same settings"


def _variants(parts: list[Part], settings: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the values of the variants, from records of their cells or else from their folders' names."""
    variants: dict[str, list[Any]] = {}
    for folder in (one for part in parts for one in sorted((part.folder / outputs.VARY).glob("*=*"))):
        name, _, text = folder.name.partition("=")
        value = config.parse(name, text)
        for _, about in outputs.cell_records(folder):
            if name in config.taken_by(about["notebook"]):
                value = about["settings"][name]  # with all its digits
        if value != settings[name] and value not in variants.setdefault(name, []):
            variants[name].append(value)
    return variants


def _places(parts: list[Part], data: str, checkpoint: str) -> dict[str, Any]:
    """Return where images and weights are here: as given, or where a part had them.

    Raises:
        UserError: they are not there.
    """
    had = [part.places() for part in parts]
    folders = [data] if data else [one["data"] for one in had if "data" in one]
    files = [checkpoint] if checkpoint else [one["checkpoint"] for one in had if "checkpoint" in one]
    usable = [text for text in folders if all(_is_source(one) for one in split_list(text))]
    readable = [file for file in files if not file or Path(file).is_file()]
    if not usable:
        raise UserError(f"the images lay in {folders[0]}, which is not here: name their folders with --data")
    if files and not readable:
        raise UserError(f"the teacher's weights lay in {files[0]}, not here: name them with --checkpoint")
    return {"data": usable[0], "checkpoint": readable[0] if files else ""}


def _is_source(text: str) -> bool:
    return text == "phantom" or Path(text).is_dir()


# ---------------------------------------------------------------------------------------------------
# Parts of other studies
# ---------------------------------------------------------------------------------------------------


def _refuse_other_parts(parts: list[Part], whole: Whole) -> None:
    """Raise a UserError where a part holds other settings, images or teacher's weights than the first."""
    first: dict[str, tuple[str, Path]] = {}
    for part in parts:
        for trace in preflight.traces(whole.plan(part.places())[0].cfg):
            differences = {
                name: pair
                for name, pair in trace.differences.items()
                if name not in {"images_without_age", "data", "checkpoint"}
            }
            if differences:
                said = first_few(
                    f"{name} is {there!r} there and {here!r} in {parts[0].folder}"
                    for name, (there, here) in differences.items()
                )
                raise UserError(f"{part.folder} is no part of the same study: {said}")
            for what, digest in (("images", trace.images), ("teacher's weights", trace.teacher)):
                if digest is None:
                    continue
                known, folder = first.setdefault(what, (digest, part.folder))
                if digest != known:
                    raise UserError(
                        f"{part.folder} is no part of the same study: its {what} have the fingerprint "
                        f"{digest[:8]}, and those of {folder} {known[:8]}"
                    )


def _refuse_other_inputs(parts: list[Part], whole: Whole, inputs: dict[str, str], here: Cell) -> None:
    """Raise a UserError where the images or the teacher's weights here are not those of the parts."""
    for trace in preflight.traces(whole.plan(parts[0].places())[0].cfg):
        for what, place, digest in (
            ("data", here.cfg.data.data, trace.images),
            ("teacher", here.cfg.teacher.checkpoint or here.cfg.teacher.teacher, trace.teacher),
        ):
            if digest not in (None, inputs[what]):
                option = {"data": "data", "teacher": "checkpoint"}[what]
                raise UserError(
                    f"{place} has the fingerprint {inputs[what][:8]} here, and in {parts[0].folder} "
                    f"{digest[:8]}: name the same {what} with --{option}"
                )


def _done(part: Part, whole: Whole, inputs: dict[str, str]) -> dict[str, Cell]:
    """Return the cells that a part has finished, by key; the analysis is made anew.

    Raises:
        UserError: a cell was made with other settings or by other code, or lacks a file.
    """
    cells = whole.plan(part.places())
    keys, done = fingerprints(cells, inputs), {}
    for cell in cells:
        about = read_record(cell.marker.with_name("cell.json"))
        if cell.notebook == "05_analysis" or not cell.marker.exists():
            continue
        if not about:
            raise UserError(f"cell.json in {cell.marker.parent} is damaged: copy it here again")
        if cell.notebook == "01_data" and about["settings"]["seed"] != cell.cfg.federate.seed:
            continue  # it shows the clients of the study's first seed, and this is another one
        if read_record(cell.marker).get("fingerprint") != keys[cell.key]:
            raise _changed(part, cell, about, whole)
        if missing := cell.missing():
            raise UserError(
                f"{part.folder} lacks {first_few(missing)}, though {cell.key} is done there: copy it again"
            )
        done[cell.key] = cell
    return done


def _changed(part: Part, cell: Cell, about: dict[str, Any], whole: Whole) -> UserError:
    """Say what makes a finished cell another one than the whole study's."""
    used, wanted = config.defaults() | about["settings"], cell.parameters
    names = [name for name in outputs.depends_on(cell.notebook) if used[name] != wanted[name]]
    if names:
        name = min(names)
        return UserError(
            f"{name} is {used[name]!r} in {part.folder} ({cell.key}) and {wanted[name]!r} in the study of "
            f"all parts: repeat it there with --splits {','.join(whole.splits)} --only {cell.key}, which "
            "trains nothing that is trained already"
        )
    there, here = (one or "unknown" for one in (about.get("run", {}).get("commit"), commit()))
    return UserError(
        f"{cell.key} in {part.folder} was made by other code (commit {there[:16]}) than is here "
        f"({here[:16]}): merge with the checkout that made it"
    )


# ---------------------------------------------------------------------------------------------------
# Files of the whole study
# ---------------------------------------------------------------------------------------------------


def _gather(parts: list[Part], whole: Whole, inputs: dict[str, str], say: Callable[[str], None]) -> Gathered:
    """Choose the source of each file; finished cells first, then the checkpoints of unfinished runs."""
    gathered, plans = Gathered(), {}
    for part in parts:
        done = _done(part, whole, inputs)
        plans[part.folder] = {cell.key: cell for cell in whole.plan(part.places())}
        say(f"{part.folder}: {len(done)} notebooks are done")
        for key, cell in done.items():
            if key in gathered.cells:
                _refuse_other_bytes(gathered.cells[key], cell)
            else:
                gathered.cells[key] = cell
                gathered.files |= _files(cell)
    own = plans[parts[0].folder]
    for cell in gathered.missing(list(own.values())):
        gathered.rounds[cell.key] = 0.0
        _take_unfinished([plan[cell.key] for plan in plans.values()], gathered)
    _warn_of_precisions(gathered, say)
    return gathered


def _warn_of_precisions(gathered: Gathered, say: Callable[[str], None]) -> None:
    """Say where some machines trained in bfloat16 and others, without such a GPU, in float32."""
    weights = (file for file in gathered.files.values() if file.suffix == ".safetensors")
    made_of = (states.read_record(file).get("made_of", {}) for file in weights)
    precisions = sorted({about["settings"]["precision"] for about in made_of if about})
    if len(precisions) > 1:
        say(f"warning: the parts were trained in {' and '.join(precisions)}: see parameter precision")


def _below(cell: Cell, file: Path) -> Path:
    """Name a file of a cell below the study's folder, of which a variant's folder is a part."""
    own = file.relative_to(cell.cfg.run_dir)
    return Path(outputs.VARY, cell.cfg.run_dir.name, own) if cell.variant else own


def _files(cell: Cell) -> dict[Path, Path]:
    """Return the files of a finished cell, by their names below the study's folder."""
    folder, record = cell.marker.parent, read_record(cell.marker.with_name("cell.json"))
    files = [cell.executed, *(file for file in sorted(folder.iterdir()) if not file.name.startswith("."))]
    files += [cell.cfg.run_dir / "figures" / name for name in record.get("figures", [])]
    return {_below(cell, file): file for file in [*files, *_weights(cell)]}


def _weights(cell: Cell) -> list[Path]:
    """Return the files of weights that a cell has left so far."""
    folder = cell.cfg.run_dir / "weights"
    if cell.notebook == "03_distill":
        names = (f"{kind}-*-seed{cell.cfg.federate.seed}.safetensors" for kind in ("init", "variant"))
        return sorted(itertools.chain.from_iterable(folder.glob(name) for name in names))
    if cell.notebook == "04_federate":
        files = (folder / f"{name}.safetensors" for name in training_runs(cell.cfg))
        return [file for file in files if file.exists()]
    return []


def _refuse_other_bytes(one: Cell, other: Cell) -> None:
    """Raise a UserError where a cell that two parts have differs in more than the time that it took."""
    pairs = [(_files(cell), cell) for cell in (one, other)]
    (here, _), (there, _) = pairs
    common = [name for name in here if name in there and name.suffix in (".csv", ".safetensors")]
    differ = [str(name) for name in common if _without_times(here[name]) != _without_times(there[name])]
    if _record(one) != _record(other):
        differ.append(f"cells/{one.name}/cell.json")
    if differ:
        raise UserError(
            f"{one.key} is in {one.cfg.run_dir} and in {other.cfg.run_dir}, with other bytes in "
            f"{first_few(differ)}: delete it in the one that shall not count"
        )


def _record(cell: Cell) -> dict[str, Any]:
    record = read_record(cell.marker.with_name("cell.json")).get("record", {})
    return {name: value for name, value in record.items() if "seconds" not in name}


def _without_times(file: Path) -> object:
    """Return the content of a table or of weights, for comparison; seconds are another each time."""
    if file.suffix == ".csv":
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        return table[[name for name in table if "seconds" not in name]].to_csv(index=False)
    record = states.read_record(file)
    return record.get("sha256"), [done["sha256"] for done in record.get("rounds", [])]


def _take_unfinished(cells: list[Cell], gathered: Gathered) -> None:
    """Take the checkpoints of a cell that no part has finished, of each run the one with most rounds.

    A run goes on from a checkpoint of its own fingerprint alone, see `resume`, so that a useless one does no
    harm; one of a start that is not the study's is left out.

    Args:
        cells: one in each part.
    """
    shares = {"04_federate": training_runs(cells[0].cfg)}.get(cells[0].notebook, {})
    for cell in cells:
        for file in _weights(cell):
            name, record = _below(cell, file), states.read_record(file)
            _refuse_other_code(file, record)
            before = states.read_record(gathered.files[name]) if name in gathered.files else {}
            newer = record.get("round_number", 0) > before.get("round_number", -1)
            if newer and _began_elsewhere(name, file, gathered.files) is None:
                gathered.files[name] = file
                gained = record.get("round_number", 0) - before.get("round_number", 0)
                gathered.rounds[cell.key] += shares.get(file.stem, 0.0) * gained


def _refuse_other_code(file: Path, record: dict[str, Any]) -> None:
    made_of = record.get("made_of", {})
    if made_of.get("code", states.code_digest(runs.RUN_CODE)) != states.code_digest(runs.RUN_CODE):
        raise UserError(f"{file} was made by other code than is here: merge with the checkout that made it")


def _began_elsewhere(name: Path, file: Path, files: dict[Path, Path]) -> Path | None:
    """Return the start's file from which a run did not begin though it should; None where all is well."""
    record = states.read_record(file)
    if not (rounds := record.get("rounds")):
        return None
    start = files.get(name.with_name(f"init-{record['init']}-seed{record['seed']}.safetensors"))
    if start is None or states.read_record(start).get("sha256") == rounds[0]["sha256"]:
        return None
    return start


def _check_files(gathered: Gathered) -> None:
    """Raise a UserError where weights are damaged, or a run did not begin from the start that is taken."""
    for name, file in gathered.files.items():
        if file.suffix != ".safetensors":
            continue
        if states.read_state(file) is None:
            raise UserError(f"{file} is damaged: copy the folder here again, or run the study there again")
        if start := _began_elsewhere(name, file, gathered.files):
            raise UserError(
                f"{file} did not begin from {start}, another training of the same start: run the cells of "
                "one seed on one machine, or with the same bytes on both (-p deterministic=true on a GPU)"
            )


def _write(gathered: Gathered, cells: list[Cell], keys: dict[str, str], out: Path) -> None:
    """Write the study's folder under another name, then give it its own."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        for name, file in gathered.files.items():
            states.write_bytes(aside / name, file.read_bytes())
            if states.previous(file).exists():
                states.write_bytes(states.previous(aside / name), states.previous(file).read_bytes())
        for cell in cells:
            if cell.key in gathered.cells:
                _write_records(cell, keys[cell.key], aside / _below(cell, cell.marker.parent))
        if out.exists():
            out.rmdir()  # empty
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_records(cell: Cell, fingerprint: str, folder: Path) -> None:
    """Write a cell's records with the paths of this machine, by which `fmfl study` finds it done."""
    about, names = read_record(folder / "cell.json"), config.tagged("place") & set(cell.parameters)
    about["settings"] |= {name: cell.parameters[name] for name in names}
    outputs.write_text(folder / "cell.json", json.dumps(about, indent=1, default=str))
    done = read_record(folder / "done.json") | {"fingerprint": fingerprint}
    outputs.write_text(folder / "done.json", json.dumps(done))


def _analyse(cells: list[Cell], out: Path, **options: Any) -> None:
    """Run what is left, which trains nothing: the analysis, and 01 and 02 where no part has them."""
    try:
        grid.run(cells, **options)
    except UserError:
        raise  # its sentence names outputs in the folder, and `fmfl study` goes on there
    except BaseException:  # Ctrl-C: the same command begins again
        shutil.rmtree(out, ignore_errors=True)
        raise
