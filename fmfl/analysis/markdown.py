"""A study's answer and tables as Markdown, written between marks in a page, so that they never drift.

A mark is a pair of comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`, with a name in BLOCKS. What
stands between them is replaced; the rest of the page is the author's.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd

from fmfl import states
from fmfl.analysis import statistics, tables
from fmfl.analysis.plots import NAMES, SPLITS
from fmfl.errors import UserError

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def number(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """Write a number; a dash where there is none."""
    if pd.isna(value):
        return "–"
    text = f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")
    return text.replace("+", "").replace("−", "") if float(f"{value:.{digits}f}") == 0 else text


def interval(low: float, high: float, digits: int = 2, *, sign: bool = False) -> str:
    """Write "low to high"; nothing where there is none."""
    if pd.isna(low) or pd.isna(high):
        return ""
    return f"{number(low, digits, sign=sign)} to {number(high, digits, sign=sign)}"


def estimate(value: float, low: float, high: float, digits: int = 2, *, sign: bool = False) -> str:
    """Write "value (low to high)"."""
    within = interval(low, high, digits, sign=sign)
    return number(value, digits, sign=sign) + (f" ({within})" if within else "")


def decimals(*numbers: float) -> int:
    """Say how many decimals a difference and its interval have: two where one is under a point, else one."""
    return 2 if any(abs(one) < 1 for one in numbers if pd.notna(one)) else 1


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Give a Markdown table's lines."""
    columns = list(columns)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def headline(
    results: pd.DataFrame, differences: pd.DataFrame, claims: pd.DataFrame, split: str | None = None
) -> list[str]:
    """Give the answer in a few sentences; better and worse are said only outside the noise.

    Args:
        results: the run's scored rounds.
        differences: `analysis.paired_differences`.
        claims: `analysis.claims`.
        split: what the answer is about, `analysis.reference_split` if not given.
    """
    split = tables.reference_split(results) if split is None else split
    last = tables.final(results)
    fm = last[(last.arm == "federated") & (last.init == "fm") & (last.split == split)]
    if fm.empty:
        return ["These results hold no federated run from the teacher's student."]
    seeds = f"{len(fm)} seeds" if len(fm) > 1 else "one seed"
    sentences = [
        f"Under {SPLITS.get(split, split)}, federated training that starts from the teacher's "
        f"student ends at a mean Dice of {100 * fm.dice.mean():.1f} % "
        f"after {fm['round'].max()} rounds ({seeds})."
    ]
    for row in differences[(differences.split == split) & (differences.higher == "fm")].itertuples():
        sentences += _difference(row)
    sentences += _speed(results, split)
    if len(fm) > 1:
        sentences.append("All seeds share one draw of proxy, test and client images.")
    return [*sentences, *_counts(claims)]


def _difference(row) -> list[str]:
    """Read one difference aloud."""
    against = {"random": "a random start", "pretraining": "a start from supervised pre-training"}
    other = against.get(row.lower, row.lower)
    digits = decimals(row.value, row.low, row.high)
    size = f"{number(row.value, digits, sign=True)} points"
    if row.reading == statistics.TOO_FEW:
        return [f"Its difference from {other} is {size}, on {row.patients} test patients: {tables.TOO_FEW}."]
    over = "patients" if row.seeds == 1 else "seeds and patients"
    size += f" (95 % interval over {over} {interval(row.low, row.high, digits)})"
    if row.reading != "inside the noise":
        said = [f"It ends {'above' if row.value > 0 else 'below'} {other}: {size}."]
    elif row.equivalent:
        said = [
            f"Its difference from {other}, {size}, is inside the noise: the two are equivalent within "
            f"{tables.EQUIVALENCE:g} points (two one-sided tests)."
        ]
    else:
        said = [f"Its difference from {other}, {size}, is inside the noise."]
    if row.seeds == 1:
        said.append("That is one training run of each: the noise between runs is unknown.")
    return said


def _speed(results: pd.DataFrame, split: str) -> list[str]:
    """Say how soon the student and the random start come to a fixed Dice, and after how many images."""
    runs = results[(results.arm == "federated") & (results.split == split)]
    if not {"random", "fm"} <= set(runs.init) or "images_seen" not in runs:
        return []
    target = tables.TARGETS[0]
    found = tables.speed(runs, [target]).set_index("init")
    if found.capped["fm"]:
        return []
    fm, random = found.loc["fm"], found.loc["random"]
    least = "at least " if random.capped else ""
    return [
        f"To a Dice of {100 * target:g} % it needs {fm.rounds:.3g} rounds and {fm.images_seen:,.0f} training "
        f"images, those of its making included; the random start needs {least}{random.rounds:.1f} rounds and "
        f"{least}{random.images_seen:,.0f} images."
    ]


def _counts(claims: pd.DataFrame) -> list[str]:
    """Count verdicts, the paper's numbers and its directions apart."""
    kinds = {"size": "numbers of the paper", "direction": "differences whose sign it gives"}
    sentences = []
    for kind, name in kinds.items():
        verdicts = claims.verdict[claims.kind == kind]
        counts = verdicts.value_counts()
        said = ", ".join(f"{counts[v]} {v}" for v in tables.VERDICTS if v in counts)
        if said:
            sentences.append(f"Of {len(verdicts)} {name}: {said}.")
    return sentences


# The blocks


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
        return tables.read_table(self.required(f"{name}.csv"), text)

    def required(self, name: str) -> Path:
        """Give the path of a file that has to be there."""
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing: run the study to its end first.")
        return path

    def picture(self, name: str, alternative: str) -> str:
        """Give Markdown that shows a figure, named relative to the page."""
        path = self.required(f"figures/{name}.png")
        return f"![{alternative}]({os.path.relpath(path, self.page.parent).replace(os.sep, '/')})"

    def split(self) -> str:
        """Name the split of Table 1."""
        return str(self["table1"].split.iloc[0])


def _name(init: str) -> str:
    return NAMES.get(init, init)


def _minus(text: str) -> str:
    """Write the minus of a number as one, and leave hyphens."""
    return re.sub(r"-(?=\d)", "−", str(text))


def _counted(per_image: pd.DataFrame) -> str:
    people, seeds = per_image.patient_id.nunique(), per_image.seed.nunique()
    images = per_image.image_id.nunique()
    text = f"{images} test images of {people} patients, {seeds} seed{'s' * (seeds != 1)}."
    if people < statistics.MIN_PATIENTS:
        return f"{text} Fewer than {tables.MIN_PATIENTS} patients: no intervals, no tests."
    return f"{text} Intervals are 95 % over {'seeds and patients together' if seeds > 1 else 'patients'}."


def _results(study: Folder) -> list[str]:
    """Fig. 3, the headline and Table 1."""
    differences = tables.paired_differences(study["per_image"])
    said = headline(study["results"], differences, study["claims"], study.split())
    shown = study.picture("fig3", "Dice by round from three starts")
    return [shown, "", *said, "", *_table1(study)]


def _table1(study: Folder) -> list[str]:
    found, split = study["table1"], study.split()
    paper = {(arm, init): value for (arm, init, _), value in tables.PAPER.items()}
    rows = []
    for row in found.to_dict("records"):
        cells = [
            "" if pd.isna(row[arm]) else estimate(row[arm], row[f"{arm}_low"], row[f"{arm}_high"])
            for arm in tables.ARMS
        ]
        of_paper = paper.get(("federated", row["init"]))
        rows.append([_name(row["init"]), *cells, f"{of_paper:.2f}" if of_paper else ""])
    columns = [f"Dice in %, {SPLITS.get(split, split)}", *tables.ARMS, "the paper's federated"]
    return [*table(columns, rows), "", _counted(study["per_image"])]


def reading(row) -> str:
    """Read a difference's columns: outside the noise, inside it, or equivalent."""
    if row.reading == "inside the noise" and row.equivalent:
        return f"inside the noise; equivalent within {tables.EQUIVALENCE:g}"
    return row.reading


def largest_p(row) -> str:
    """Write the largest of a difference's corrected p-values, on which its reading stands."""
    p = max(row.p_holm, row.p_permutation_holm, row.p_two_way_holm)
    return "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _differences(study: Folder) -> list[str]:
    rows = [
        (
            SPLITS.get(row.split, row.split),
            f"{_name(row.higher)} less {_name(row.lower)}",
            estimate(row.value, row.low, row.high, sign=True),
            interval(row.patient_low, row.patient_high, sign=True),
            interval(row.seed_low, row.seed_high, sign=True),
            largest_p(row),
            reading(row),
        )
        for row in study["differences"].itertuples()
    ]
    columns = ["partition", "difference", "points (95 %)", "patients alone", "seeds alone", "p, corrected"]
    return table([*columns, "reading"], rows)


def _claims(study: Folder) -> list[str]:
    rows = [
        (
            row.claim,
            _minus(row.paper),
            estimate(row.ours, row.low, row.high),
            row.verdict,
            _minus(row.why),
        )
        for row in study["claims"].itertuples()
    ]
    return [*table(["claim", "paper", "ours (95 %)", "verdict", "why"], rows), "", *_counts(study["claims"])]


def _speeds(study: Folder) -> list[str]:
    found = study["speed"]
    found = found[found.split.isin([study.split(), "pooled"])]
    rows = [
        (
            f"{100 * row.target:g} %",
            row.arm,
            _name(row.init),
            f"{row.reached} of {row.seeds}",
            ("≥ " if row.capped else "") + estimate(row.rounds, row.rounds_low, row.rounds_high, 1),
            ("≥ " if row.capped else "") + f"{row.images_seen:,.0f}",
            ("≥ " if row.capped else "") + f"{row.seconds:.1f}",
        )
        for row in found.itertuples()
    ]
    columns = ["to a Dice of", "arm", "start", "seeds there", "rounds (95 % over seeds)", "images", "seconds"]
    return table(columns, rows)


def _gap(study: Folder) -> list[str]:
    paper = {init: f"{100 * share:.0f} %" for init, share in tables.PAPER_GAP.items()}
    rows = [
        (
            _name(row.init),
            "–"
            if pd.isna(row.gap_closed)
            else f"{100 * row.gap_closed:.0f} % ({100 * row.low:.0f} to {100 * row.high:.0f})",
            paper.get(row.init, ""),
            "" if pd.isna(row.why) else row.why,
        )
        for row in study["gap"].itertuples()
    ]
    return table(["start", "gap closed (95 %)", "paper", "why there is none"], rows)


def _weakest(study: Folder) -> list[str]:
    rows = [
        (
            row.arm,
            _name(row.init),
            SPLITS.get(row.split, row.split),
            number(row.dice),
            number(row.worst_tenth),
            "none is large enough" if pd.isna(row.worst_band) else f"{row.worst_band} years",
            number(row.worst_band_dice),
            f"{row.failures:.1f} %",
        )
        for row in study["weakest"].itertuples()
    ]
    columns = ["arm", "start", "partition", "all", "worst tenth", "worst age band", "its Dice", "below 0.8"]
    return table(columns, rows)


def _gains(study: Folder) -> list[str]:
    rows = [
        (
            row.axis,
            row.value,
            f"{_name(row.higher)} less {_name(row.lower)}",
            estimate(row.gain, row.low, row.high, sign=True),
            largest_p(row),
            reading(row),
        )
        for row in study["gains"].itertuples()
    ]
    return table(["setting", "value", "difference", "points (95 %)", "p, corrected", "reading"], rows)


Block = Callable[[Folder], list[str]]

BLOCKS: dict[str, Block] = {
    "results": _results,
    "table1": _table1,
    "differences": _differences,
    "claims": _claims,
    "speed": _speeds,
    "gap": _gap,
    "weakest": _weakest,
    "gains": _gains,
}
"""What can stand between marks, by the marks' name."""


def write_into(file: str | Path, directory: str | Path, blocks: Mapping[str, Block] = BLOCKS) -> Path:
    """Put a study's answer and tables into a Markdown file, each between its marks.

    Args:
        file: holds at least one pair of marks, each pair once.
        directory: the study's folder; its figures are named relative to the file.
        blocks: by name what gives a block's lines.

    Raises:
        UserError: the file has no marks or one without the other, or one of the study's files is missing.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name a Markdown file") from error
    study = Folder(directory, file)
    found = re.findall(r"<!-- (\w+): (begin|end) -->", text)
    wanted = [name for name, end in found if end == "begin" and name in blocks]
    if not wanted:
        raise UserError(
            f"{file} has no place for results: write the lines {BEGIN} and {END} where they shall stand, "
            f"or those of another of {', '.join(blocks)}"
        )
    for name in wanted:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise UserError(
                f"{file} has no place for {name}: it needs {begin} and {end} once each, in this order"
            )
        before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        text = "\n".join([before, *blocks[name](study), after])
    states.write_bytes(file, text.encode("utf-8"))
    return file
