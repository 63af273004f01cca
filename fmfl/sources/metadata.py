"""Table of a source: metadata.csv, and the checks that every row passes.

A cell never counts for another column: every line has as many fields as the header, or the table is refused.
A column that is nearly one of ours is named: without its patients a study would be wrong.
"""

import csv
import difflib
import io
import math
import re
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmfl.errors import UserError
from fmfl.sources.files import TABLE_SUFFIXES, ImageIndex, SkippedFile, first_line, walk

#: age: years, NaN where unknown. age_source: record (this patient's), cohort (the middle of a range given for
#: all) or "" without an age. sex: M, F or "". source: the folder's name.
COLUMNS = (
    *("image_id", "patient_id", "age", "age_source", "sex", "finding", "site", "view", "source"),
    *("original_width", "original_height", "licence"),
)
GIVEN = tuple(column for column in COLUMNS if column != "source")
OLDEST = 120.0  # years; a larger age is a mistake in the table
SEXES = {"m": "M", "male": "M", "f": "F", "female": "F"}
NO_SEX = frozenset({"na", "n/a", "unknown", "u", "o", "other"})  # meant as neither; anything else is named
UNKNOWN_AGE = frozenset({"", "na", "n/a", "unknown"})
#: Words that programs and people write where there is no patient id; as an id each would join all of them.
NO_PATIENT = frozenset(
    {"nan", "none", "null", "nil", "na", "n/a", "#n/a", "<na>", "unknown", "unk", "undefined", "missing"}
    | {"not available", "not given", "not known", "anonymous", "anonymized", "anonymised", "anon"}
    | {"-", "--", "?", ".", "x", "xx", "xxx", "#ref!", "#value!", "#name?"}
)
#: Endings of a metadata.csv under another name: an editor makes metadata.csv.txt where suffixes are hidden.
LIKE_A_TABLE = frozenset({"txt", "tab", "dat", "gz", "zip", "parquet", "numbers"})
#: Other words for our columns, as they stand in public tables.
SYNONYMS = {
    "image_id": r"image|img|file|filename|filepath|path|picture|scan",
    "patient_id": r"pat|pid|mrn|case(id|no|nr)?|(patien|pacien|pazien|subj|person|proband|particip)\w*",
    "age": r"age|ages|years|yrs|alter|edad|eta",
    "sex": r"gender|sexe|sexo|geschlecht",
    "finding": r"findings|diagnosis|label|labels|disease|pathology",
    "site": r"hospital|center|centre|institution|clinic",
    "view": r"viewposition|projection",
    "licence": r"license",
}


@dataclass(frozen=True)
class Table:
    """Rows of a metadata.csv."""

    rows: dict[str, dict[str, str]]  # by image_id; empty cells are not in it
    refused: set[str]  # image_ids whose lines contradict each other
    has_patients: bool


def read(folder: Path, images: ImageIndex) -> Generator[SkippedFile, None, Table | None]:
    """Yield what of metadata.csv is not used, and return the table, or None where there is none.

    Raises:
        UserError: it cannot be read, names no images, or calls the patients by another name than patient_id.
    """
    path = folder / "metadata.csv"
    if path.is_dir():
        raise UserError(f"{path}: this is a folder; give the table as a file of that name")
    names = sorted(one.name for one in walk(folder, deep=False))
    if path.name not in names:
        yield from _other_tables(folder, names)
        return None
    header, lines = _lines(path)
    columns = _columns(path, header)
    for given, ours in _nearly(columns).items():
        detail = f"its column {given!r} is not read; name it {ours} if it is that, or remove it"
        if ours in ("image_id", "patient_id"):
            raise UserError(f"{path}: {detail}")
        yield SkippedFile(path, "column not read", detail)
    if "image_id" not in columns:
        names = ", ".join(header)
        raise UserError(f"{path}: there is no image_id column (it has: {names}); name the images in one")
    return (yield from _by_image(path, columns, lines, images))


def _other_tables(folder: Path, names: list[str]) -> Iterator[SkippedFile]:
    for name in names:
        stem, mark, suffix = name.lower().rpartition(".")
        table = f".{suffix}" in TABLE_SUFFIXES
        if plain(stem or suffix).startswith("metadata") and (table or not mark or suffix in LIKE_A_TABLE):
            raise UserError(f"{folder / name}: is not read; save it as metadata.csv, and its patients count")
        if table:
            detail = "it is not read; save it as metadata.csv if it tells the patients"
            yield SkippedFile(folder / name, "table not read", detail)


def _lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and the number and fields of every line that is not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes")
        reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        lines = [(reader.line_num, [field.strip() for field in line]) for line in reader]
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8
        raise UserError(f"{path}: not a CSV table ({first_line(error)}); save it as UTF-8") from None
    lines = [(number, line) for number, line in lines if any(line)]
    if not lines:
        raise UserError(f"{path}: not a CSV table (it is empty); save it as UTF-8")
    header = lines.pop(0)[1]
    while header[-1] == "":
        header.pop()
    separator = re.search(r"[;\t|]", header[0])
    if len(header) == 1 and separator:
        raise UserError(
            f"{path}: columns are separated by {separator[0]!r}; save it with commas (image_id,...)"
        )
    # A spreadsheet ends each line with the same empty fields. One line alone that is longer has a comma
    # within a value, and then its values stand under other columns' names.
    longest = {len(line) for _, line in lines}
    beyond = [field for _, line in lines for field in line[len(header) :]]
    if len(longest) == 1 and not any(beyond):
        lines = [(number, line[: len(header)]) for number, line in lines]
    for number, line in lines:
        if len(line) != len(header):
            raise UserError(
                f"{path}: line {number} has {len(line)} fields, but the header names {len(header)} columns; "
                "separate them with commas, and put quotes around a value that holds one"
            )
    return header, lines


def words(name: str) -> list[str]:
    """Return the words of a name, in lower case: "leftLung", "left_lung" and "Left lung" agree."""
    return re.findall(r"[^\W_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def plain(name: str) -> str:
    """Return a name without case, spaces, underscores and other marks: "Patient ID" is patientid."""
    return "".join(words(name))


def _columns(path: Path, header: list[str]) -> list[str]:
    """Return the header's names, in our spelling where they are ours; "" for a column without a name."""
    ours = {plain(column): column for column in GIVEN}
    columns = [ours.get(plain(name), name) for name in header]
    for column in columns:
        if column and columns.count(column) > 1:
            raise UserError(f"{path}: two columns are named {column}; keep one of them")
    return columns


def _nearly(columns: list[str]) -> dict[str, str]:
    """Return columns that look as if one of ours that is absent was meant, and that one of ours."""
    absent = [column for column in GIVEN if column not in columns]
    meant = {}
    for name in columns:
        if not name or name in GIVEN:
            continue
        close = difflib.get_close_matches(plain(name), map(plain, absent), 1, 0.88)
        likely = {ours for ours in absent if plain(ours) in close}
        for word in words(name):
            likely |= {ours for ours in absent if re.fullmatch(SYNONYMS.get(ours, ours), word)}
        if likely & {"age", "sex"}:  # a patient's age is no patient's id
            likely -= {"patient_id"}
        if likely:
            meant[name] = min(likely, key=GIVEN.index)
    return meant


def _by_image(
    path: Path, columns: list[str], lines: list[tuple[int, list[str]]], images: ImageIndex
) -> Generator[SkippedFile, None, Table]:
    """Return the rows by image_id; lines that contradict each other tell nothing of their image."""
    rows = {number: dict(zip(columns, line, strict=True)) for number, line in lines}
    matches = images.match({number: [row["image_id"]] for number, row in rows.items() if row["image_id"]})
    lines_of: dict[Path, list[int]] = defaultdict(list)
    for number, row in rows.items():
        image = matches.get(number, "")
        if isinstance(image, Path):
            lines_of[image].append(number)
        else:
            detail = f"the image {row['image_id']} of line {number} {image}"
            detail = detail if image else f"line {number} names no image"
            yield SkippedFile(path, "missing image", detail)
    table = Table({}, set(), "patient_id" in columns)
    for image, (first, *others) in lines_of.items():
        known = {key: value for key, value in rows[first].items() if value}
        if any(
            rows[first][key] != rows[other][key] for key in GIVEN[1:] if key in columns for other in others
        ):
            numbers = ", ".join(map(str, (first, *others)))
            detail = f"lines {numbers} of metadata.csv say different things of it"
            yield SkippedFile(image, "image_id twice", detail)
            table.refused.add(images.key(image))
            continue
        if (sex := known.get("sex", "")) and sex.lower() not in SEXES.keys() | NO_SEX:
            detail = f"its sex is {sex!r} in line {first}, which counts as unknown: write M or F"
            yield SkippedFile(path, "sex not read", detail)
        for number in others:
            detail = f"line {number} has image_id {rows[number]['image_id']} again"
            yield SkippedFile(path, "image_id twice", detail)
        table.rows[images.key(image)] = known
    return table


def row(image: Path, image_id: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked row of what a reader knows; `values` may lack any column and hold others.

    Raises:
        SkippedFile: the age is not a number of years in 0..120, or the patient_id is a word for none. An age
            that is empty or "NA" is unknown, which is no fault; one that is "nan" or negative went wrong
            somewhere, and so may have the rest of its row.
    """
    text = {key: "" if values.get(key) is None else str(values[key]).strip() for key in COLUMNS}
    age = math.nan
    if text["age"].lower() not in UNKNOWN_AGE:
        number = re.fullmatch(r"\d+(\.\d*)?|\.\d+", text["age"])
        age = float(number[0]) if number else math.nan
        if not 0 <= age <= OLDEST:
            raise age_not_valid(image, text["age"])
    age_source = "cohort" if text["age_source"].lower() == "cohort" else "record"
    checked = {
        "image_id": image_id,
        "patient_id": patient(image, text["patient_id"]),
        "age": age,
        "age_source": "" if math.isnan(age) else age_source,
        "sex": SEXES.get(text["sex"].lower(), ""),
        "original_width": whole(text["original_width"]),
        "original_height": whole(text["original_height"]),
    }
    return {key: text[key] for key in GIVEN} | checked


def age_not_valid(image: Path, text: str) -> SkippedFile:
    """Return the reason to leave out an image with such an age."""
    detail = f"its age is {text!r}, not years in 0..{OLDEST:.0f} (empty where unknown)"
    return SkippedFile(image, "age not valid", detail)


def patient(image: Path, text: str) -> str:
    """Return a patient's id as given, but 7 for "7.0".

    Raises:
        SkippedFile: it is a word for none, or a rounded number. As an id it would make one patient of all
            images that have it; a person has to say, by an id or an empty cell, whether they are one.
    """
    fault = ""
    if text.lower() in NO_PATIENT:
        fault = ": give the patient's own, or none if no other image is of it"
    elif re.fullmatch(r"\d([.,]\d+)?e\+\d+", text.lower()):
        fault = ", a number that a spreadsheet has rounded: give all its digits"
    if fault:
        raise SkippedFile(image, "patient_id not valid", f"its patient_id is {text!r}{fault}")
    return without_fraction(text)


def without_fraction(text: str) -> str:
    """Return "7" for "7.0", which programs make of a whole number; another text as it is."""
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text


def whole(value: Any) -> int:
    """Return a positive whole number, or 0 for anything else."""
    try:
        return max(0, int(float(value)))
    except (ValueError, OverflowError, TypeError):
        return 0
