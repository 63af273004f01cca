"""A study's answer and tables as Markdown, written between marks in a page, so that they never drift.

A mark is a pair of comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`, with a name in BLOCKS. The text
between them is replaced; the rest of the page is the author's.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd

from fmfl import states
from fmfl.analysis import words
from fmfl.analysis.claims import PAPER
from fmfl.analysis.tables import paired_differences, read_table
from fmfl.config import ARMS
from fmfl.errors import UserError

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


class Folder:
    """A study's files, read where a block needs them."""

    def __init__(self, directory: str | Path, page: str | Path):
        self.directory, self.page = Path(directory), Path(page)

    def __getitem__(self, name: str) -> pd.DataFrame:
        """Read NAME.csv.

        Raises:
            UserError: it is missing or damaged.
        """
        # A variant's value is a setting, a difference's a number.
        text = ("paper",) if name == "differences" else ("paper", "value")
        return read_table(self.required(f"{name}.csv"), text)

    def required(self, name: str) -> Path:
        """Return the path of a file that has to be there."""
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing: run the study to its end first")
        return path

    def picture(self, name: str, alternative: str) -> str:
        """Return Markdown that shows a figure, named relative to the page."""
        path = self.required(f"figures/{name}.png")
        return f"![{alternative}]({os.path.relpath(path, self.page.parent).replace(os.sep, '/')})"

    def split(self) -> str:
        """Return the split of Table 1."""
        return str(self["table1"].split.iloc[0])

    def rows(self, name: str, row: Callable[[Mapping], dict[str, str]]) -> list[dict[str, str]]:
        """Return the rows of NAME.csv in words."""
        return [row(values) for values in self[name].to_dict("records")]


Block = Callable[[Folder], list[str]]


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return a Markdown table's lines."""
    columns = list(columns)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def _table(rows: list[dict[str, str]], without: Iterable[str] = ()) -> list[str]:
    columns = [column for column in (rows[0] if rows else ()) if column not in without]
    return table(columns, [[row[column].replace("\n", ", ") for column in columns] for row in rows])


def _results(study: Folder) -> list[str]:
    """Return Fig. 3, the headline and Table 1."""
    differences = paired_differences(study["per_image"])
    answer = words.headline(study["results"], differences, study["claims"], study.split())
    return [study.picture("fig3", "Dice by round from three starts"), "", *answer, "", *_table1(study)]


def _table1(study: Folder) -> list[str]:
    paper = {init: value for (arm, init, _), value in PAPER.items() if arm == "federated"}
    rows = []
    for row in study["table1"].to_dict("records"):
        cells = [
            "" if pd.isna(row[arm]) else words.estimate(row[arm], row[f"{arm}_low"], row[f"{arm}_high"])
            for arm in ARMS
        ]
        of_paper = paper.get(row["init"])
        rows.append([words.init_name(row["init"]), *cells, f"{of_paper:.2f}" if of_paper else ""])
    columns = [f"Dice in %, {words.split_name(study.split())}", *ARMS, "the paper's federated"]
    return [*table(columns, rows), "", words.tested_on(study["per_image"])]


def _differences(study: Folder) -> list[str]:
    return _table(study.rows("differences", words.difference_row), without=["d"])


def _claims(study: Folder) -> list[str]:
    return [*_table(study.rows("claims", words.claim_row)), "", *words.verdict_counts(study["claims"])]


def _speed(study: Folder) -> list[str]:
    shown = {words.split_name(study.split()), "pooled"}
    rows = [row for row in study.rows("speed", words.speed_row) if row["partition"] in shown]
    return _table(rows, without=["partition", "MB", "curve"])


def _gap(study: Folder) -> list[str]:
    return _table(study.rows("gap", words.gap_row))


def _weakest(study: Folder) -> list[str]:
    rows = study.rows("weakest", words.weakest_row)
    rows = [row | {"worst age band": row["worst age band"] or "none is large enough"} for row in rows]
    return _table(rows, without=["worst client", "HD95", "ASSD"])


def _gains(study: Folder) -> list[str]:
    return _table(study.rows("gains", words.gain_row))


#: The writers of blocks, by the marks' name.
BLOCKS: dict[str, Block] = {
    "results": _results,
    "table1": _table1,
    "differences": _differences,
    "claims": _claims,
    "speed": _speed,
    "gap": _gap,
    "weakest": _weakest,
    "gains": _gains,
}


def write_into(file: str | Path, directory: str | Path, blocks: Mapping[str, Block] = BLOCKS) -> Path:
    """Put a study's answer and tables into a Markdown file, each between its marks.

    Args:
        file: holds at least one pair of marks, each pair once.
        directory: the study's folder; its figures are named relative to the file.
        blocks: by name the function that returns a block's lines.

    Raises:
        UserError: the file has no marks or one without the other, or one of the study's files is missing.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name a Markdown file") from error
    study = Folder(directory, file)
    names = [name for name in re.findall(r"<!-- (\w+): begin -->", text) if name in blocks]
    if not names:
        raise UserError(
            f"{file} has no place for results: write the lines {BEGIN} and {END} where they shall stand, "
            f"or those of another of {', '.join(blocks)}"
        )
    for name in names:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise UserError(
                f"{file} has no place for {name}: it needs {begin} and {end} once each, in this order"
            )
        before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        text = "\n".join([before, *blocks[name](study), after])
    states.write_bytes(file, text.encode("utf-8"))
    return file
