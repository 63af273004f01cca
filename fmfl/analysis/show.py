"""Tables as people read them: an estimate and its interval in one cell, a dash where there is no value."""

import html
import numbers
from collections.abc import Iterable, Mapping

import pandas as pd

from fmfl.analysis.words import estimate, number


class Table:
    """A table of text, shown as HTML in a notebook and as plain text elsewhere.

    Attributes:
        cells: the text of each cell.
        left: names of the columns that are aligned to the left; numbers are aligned to the right.
    """

    def __init__(self, cells: pd.DataFrame, left: Iterable[str]) -> None:
        self.cells, self.left = cells, set(left)

    def __repr__(self) -> str:
        """Return the table as plain text, no cell cut short."""
        return self.cells.to_string(index=False) if len(self.cells) else "(no rows)"

    def _repr_html_(self) -> str:
        head = "".join(self._cell("th", name, name) for name in self.cells)
        rows = [
            "".join(self._cell("td", name, value) for name, value in zip(self.cells, row, strict=True))
            for row in self.cells.itertuples(index=False)
        ]
        body = (
            "\n".join(f"<tr>{row}</tr>" for row in rows)
            or '<tr><td style="text-align: left">no rows</td></tr>'
        )
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def _cell(self, tag: str, column: str, text: str) -> str:
        side = "left" if column in self.left else "right"
        return f'<{tag} style="text-align: {side}">{html.escape(text)}</{tag}>'


def table(
    frame: pd.DataFrame | pd.Series | Mapping[str, object],
    digits: int | Mapping[str, int] = 2,
    *,
    interval_of: str = "value",
) -> Table:
    """Return a table to be shown as the last line of a notebook's cell.

    Args:
        frame: the rows; a Series or a mapping is shown as one row a value. Columns `x_low` and `x_high` hold
            the interval of column `x` and are written into its cells: "92.5 (91.0 to 94.0)".
        digits: decimals of all numbers that are not whole, or of each column (2 where none is named).
        interval_of: the column whose interval stands in the columns `low` and `high`.
    """
    if not isinstance(frame, pd.DataFrame):
        frame = pd.Series(frame, dtype=object).rename_axis("").rename(" ").to_frame()
    if not (isinstance(frame.index, pd.RangeIndex) and frame.index.name is None):
        frame = (
            frame.reset_index(names=frame.index.name or "")
            if frame.index.nlevels == 1
            else frame.reset_index()
        )
    cells, left = {}, []
    for column in frame:
        name = str(column)
        low, high = ("low", "high") if name == interval_of else (f"{name}_low", f"{name}_high")
        places = digits if isinstance(digits, int) else digits.get(name, 2)
        title = name.replace("_", " ")
        values = frame[column]
        if any(isinstance(value, str) for value in values):
            left.append(title)
        if low in frame and high in frame:
            limits = zip(values, frame[low], frame[high], strict=True)
            cells[title] = [estimate(*ends, places) for ends in limits]
        elif not _is_a_limit(name, frame, interval_of):
            cells[title] = [text(value, places) for value in values]
    return Table(pd.DataFrame(cells, dtype=str), left)


def text(value: object, digits: int = 2) -> str:
    """Return a value as text; a dash where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        value = [f"{name}: {text(part, digits)}" for name, part in value.items()]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    if value is None or value == "" or pd.isna(value):
        return "–"
    if isinstance(value, numbers.Integral):
        return f"{value:,}"
    return number(value, digits) if isinstance(value, numbers.Real) else str(value)


def _is_a_limit(name: str, frame: pd.DataFrame, interval_of: str) -> bool:
    """Return whether a column is the lower or upper end of another column's interval."""
    if name in ("low", "high"):
        return interval_of in frame
    return any(name.endswith(end) and name.removesuffix(end) in frame for end in ("_low", "_high"))
