"""Warnings on a data source, and its contact sheet: what a person should look at before a study."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from fmfl import split, states
from fmfl.analysis.statistics import MIN_PATIENTS
from fmfl.config import DataConfig, FederateConfig
from fmfl.data import Cohort
from fmfl.errors import UserError, first_few
from fmfl.sources.mask_files import is_lung

#: Share of the picture that lungs usually take, least and most.
COVER = (0.01, 0.70)

#: Share of another organ's median cover below which a mask is doubtful.
SMALL = 0.1

#: Least share of images with an age; a study by age uses only those that have one.
FEW_AGES = 0.5

SHEET_IMAGES = 60
SHEET_COLUMNS = 10


def warnings(cohort: Cohort, organ: str = "lung") -> list[str]:
    """Return sentences on what may be wrong with images that are used, or is too little for a study."""
    checks: tuple[Callable[[Cohort], Iterator[str]], ...] = (
        partial(_cover, organ=organ),
        _patients,
        _near_patients,
        _copies,
        _ages,
        _test_patients,
    )
    return [*cohort.remarks, *(sentence for check in checks for sentence in check(cohort))]


def cover(cohort: Cohort) -> np.ndarray:
    """Share of each picture that its mask takes, [N], 0..1."""
    return cohort.masks.flatten(1).float().mean(dim=1).cpu().numpy()


def _usual(share: np.ndarray, organ: str) -> tuple[float, float]:
    """Return the least and most of a picture that an organ's mask usually takes; lungs' are known."""
    return COVER if is_lung(organ) else (SMALL * float(np.median(share)), COVER[1])


def _cover(cohort: Cohort, organ: str) -> Iterator[str]:
    """Name masks that cover less or more of their picture than lungs do, or than other organs' do here."""
    share, usual = cover(cohort), "lungs do" if is_lung(organ) else "most of them do"
    least, most = _usual(share, organ)
    for doubtful, part in ((share < least, f"under {100 * least:.2g}%"), (share > most, f"over {most:.0%}")):
        if doubtful.any():
            names = first_few(cohort.table.image_id[doubtful])
            yield f"{doubtful.sum()} masks cover {part} of their picture, which is not what {usual}: {names}"


def _patients(cohort: Cohort) -> Iterator[str]:
    """Count images that have no patient_id, and those of a patient who has most of a source."""
    for name, table in cohort.table.groupby("source", sort=False):
        own = np.array(
            [
                patient.endswith((f":{image}", f":{image.removeprefix(f'{name}/')}"))
                for patient, image in zip(table.patient_id, table.image_id, strict=True)
            ]
        )
        if own.all():
            yield (
                f"{name}: no image has a patient_id, so each counts as a patient of its own; images of one "
                "patient, which may be nearly the same, can then lie on both sides of a split, and the score "
                "is too good: give patient_id in metadata.csv"
            )
        elif own.any():
            counted = f"{own.sum()} of {len(own)} images"
            yield f"{name}: {counted} have no patient_id, and each counts as a patient of its own"
        largest = table.patient_id.value_counts()
        if len(table) > 2 and largest.iloc[0] > len(table) / 2:
            yield f"{name}: {largest.iloc[0]} of {len(table)} images are of one patient, {largest.index[0]}"


def _near_patients(cohort: Cohort) -> Iterator[str]:
    """Name patients whose ids differ by case, spaces, marks or zeros in front: they are often one."""
    alike = defaultdict(set)
    for patient in cohort.table.patient_id.unique():
        digits_apart = re.sub(r"(?<=[0-9])[\W_]+(?=[0-9])", ".", patient.lower())  # 1-12 is not 11-2
        alike[re.sub(r"(?<![0-9])0+(?=[0-9])|[^\w.]|_", "", digits_apart)].add(patient)
    groups = [" and ".join(map(repr, sorted(patients))) for patients in alike.values() if len(patients) > 1]
    if groups:
        yield (
            f"{len(groups)} times patient ids differ by case, spaces, marks or zeros in front alone, and "
            f"each counts as a patient: {first_few(groups)}; write one patient's id in one way"
        )


def _copies(cohort: Cohort) -> Iterator[str]:
    """Name images whose every pixel is that of another patient's image."""
    table = cohort.table.assign(pixels=[states.tensor_digest(image) for image in cohort.images])
    equal = [rows for _, rows in table.groupby("pixels", sort=False) if rows.patient_id.nunique() > 1]
    groups = [" and ".join(rows.image_id) for rows in equal]
    if groups:
        yield (
            f"{len(groups)} pictures occur under several patients and can then lie on both sides of a split: "
            f"{first_few(groups)}; remove the copies, or give them one patient_id"
        )


def _ages(cohort: Cohort) -> Iterator[str]:
    """Say that too few ages are known for the splits by age, and which splits work."""
    ages = cohort.table.age
    if ages.notna().mean() >= FEW_AGES and ages.nunique() > 1:
        return
    known = f"{ages.notna().sum()} of {len(ages)} images have an age"
    if ages.nunique() == 1:
        known += f", and all the same, {ages.max():g} years"
    try:
        federated = _holdout(cohort.table).federated
        working = working_splits(cohort.table, federated, FederateConfig().num_clients)
    except UserError:  # see `_test_patients`
        working = []
    use = (
        f"use --splits {','.join(working)}"
        if working
        else "and no other split works with so few patients or sites"
    )
    yield f"{known}: too few for the splits {' and '.join(split.AGE_SCHEMES)}; {use}"


def working_splits(table: pd.DataFrame, federated: Tensor, num_clients: int) -> list[str]:
    """Return the splits that need no age and can deal these images to so many clients."""

    def works(scheme: str) -> bool:
        try:
            return bool(split.partition(table, federated, scheme, num_clients))
        except UserError:
            return False

    return [name for name in split.OPTIONS if name not in split.AGE_SCHEMES and works(name)]


def _holdout(table: pd.DataFrame, test: float | None = None) -> split.Holdout:
    usual = DataConfig()
    return split.holdout(table, usual.holdout_seed, proxy=usual.proxy, test=test or usual.test)


def _test_patients(cohort: Cohort) -> Iterator[str]:
    """Say that the test part has too few patients for an interval, and how many images would do."""
    try:
        patients = cohort.patients(_holdout(cohort.table).test)
    except UserError as error:
        yield f"they are too few for a study with its usual parts: {error}"
        return
    if len(patients) < MIN_PATIENTS:
        enough = _enough(cohort)
        remedy = f"-p test={enough} holds {MIN_PATIENTS}" if enough else "more patients are needed"
        few = f"under {MIN_PATIENTS} a study gives no interval and no test"
        yield f"the test part would hold {len(patients)} patients, and {few}: {remedy}"


def _enough(cohort: Cohort) -> int | None:
    """Find a number of test images, at most half of all, with enough patients; None without one."""
    low, high = MIN_PATIENTS, len(cohort) // 2
    for size in range(low, high + 1, max(1, high // 100)):
        try:
            if len(cohort.patients(_holdout(cohort.table, size).test)) >= MIN_PATIENTS:
                return size
        except UserError:
            continue
    return None


def sheet_file(file: Path) -> None:
    """Make a contact sheet's folder; UserError where it cannot be written or is to be no PNG."""
    if file.suffix.lower() != ".png":
        raise UserError(f"--sheet {file}: it is a picture; give a file name that ends in .png")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
    except OSError as error:
        raise UserError(
            f"--sheet {file}: cannot be written ({error.strerror}); choose another place"
        ) from None


def sheet(cohort: Cohort, file: Path, organ: str = "lung") -> int:
    """Write a contact sheet: images with the contours of their masks, the doubtful covers first.

    Args:
        cohort: whose images.
        file: a PNG.
        organ: named below each image.

    Returns:
        How many images it shows: all, or `SHEET_IMAGES` of them.

    Raises:
        UserError: the file cannot be written, or is to be no PNG.
    """
    from matplotlib import pyplot

    from fmfl.analysis import plots

    sheet_file(file)
    share = cover(cohort)
    least, most = _usual(share, organ)
    doubtful = np.flatnonzero((share < least) | (share > most))[: SHEET_IMAGES // 2]
    usual = np.setdiff1d(np.arange(len(cohort)), doubtful)
    count = min(SHEET_IMAGES - len(doubtful), len(usual))
    places = np.linspace(0, len(usual) - 1, count).round().astype(int)
    chosen = [*doubtful.tolist(), *usual[places].tolist()]
    figure = plots.images(cohort, chosen, columns=SHEET_COLUMNS)
    rows = -(-len(chosen) // SHEET_COLUMNS)
    figure.set_size_inches(1.5 * SHEET_COLUMNS, 1.9 * rows)  # room for the names
    for axis, index in zip(figure.axes, chosen, strict=False):
        name = cohort.table.image_id[index].replace("$", r"\$")
        digits = 0 if share[index] >= 0.1 else 1
        axis.set_xlabel(f"{name[-24:]}\n{organ} {share[index]:.{digits}%}", fontsize=7)
    try:
        figure.savefig(file, dpi=110)
    finally:
        pyplot.close(figure)
    return len(chosen)
