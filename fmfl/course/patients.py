"""Checks of part 1, look at the data: patients and images, leaks, and dealing whole patients by age."""

from collections.abc import Callable, Sequence

import pandas as pd
import torch

from fmfl.course.answers import Mistake, NotYet, asked, demand, judge

#: Eight visits of five patients. The labels of the rows are not their positions, as after any sorting.
TABLE = pd.DataFrame(
    {
        "patient_id": ["a", "b", "a", "c", "d", "b", "e", "c"],
        "age": [70.0, 4.0, 71.0, 30.0, 55.0, 5.0, 41.0, 30.0],
    },
    index=[7, 6, 5, 4, 3, 2, 1, 0],
)


def check_num_patients(num_patients: object, table: pd.DataFrame) -> None:
    """Check the number of patients in the cohort's table."""
    visits = table.patient_id.value_counts()
    judge(
        "num_patients",
        num_patients,
        len(visits),
        [
            Mistake(
                "images counted",
                len(table),
                "A row is an image, and some patients came twice. Count each once.",
            ),
            Mistake(
                "visits more than one counted",
                int((visits > 1).sum()),
                "These are the patients who came more than once. Count the others too.",
            ),
            Mistake("sites counted", table.site.nunique(), "These are the hospitals. Count `patient_id`."),
            Mistake(
                "ages counted", table.age.nunique(), "Two patients may be of one age. Count `patient_id`."
            ),
        ],
    )
    print(f"Right: {len(table)} images are of {len(visits)} patients.")


def check_shared_patients(shared_patients: Callable) -> None:
    """Check a function that names the patients who are on both sides of a split, by a case done by hand.

    Rows 0 and 3 are of patients a and c, rows 2 and 4 of a and d: patient a is on both sides.
    """
    one, other = [0, 3], [2, 4]
    answer = asked("shared_patients", shared_patients, TABLE, one, other)
    if (
        isinstance(answer, (list, tuple, frozenset, pd.Series, pd.Index))
        or type(answer).__name__ == "ndarray"
    ):
        answer = set(answer)
    by_label = set(TABLE.loc[one].patient_id) & set(TABLE.loc[other].patient_id)
    judge(
        "shared_patients(table, [0, 3], [2, 4])",
        answer,
        {"a"},
        [
            Mistake(
                "images compared",
                set(one) & set(other),
                "No image is on both sides, but a patient is: compare `patient_id`, not row numbers.",
            ),
            Mistake(
                "labels taken for positions",
                by_label,
                "`loc` looks for labels of rows, and these are row numbers: take "
                "`table.patient_id.iloc[...]`.",
            ),
            Mistake(
                "both sides joined",
                {"a", "c", "d"},
                "These are the patients of either side. Those on both are the intersection, `&`.",
            ),
            Mistake("a number instead of names", 1, "Return the patients themselves, as a set."),
        ],
    )
    print("Right: a leak is told by patients, not by images.")


def check_deal_by_age(deal_by_age: Callable) -> None:
    """Check a function that deals whole patients by age: invariants, on a case with two visits a patient."""
    rows = [6, 5, 4, 3, 2, 1, 0, 7]
    parts = asked("deal_by_age", deal_by_age, TABLE, rows, 2)
    parts = _lists(parts)
    names = [{TABLE.patient_id.iloc[row] for row in part} for part in parts]
    dealt = [row for part in parts for row in part]
    ages = [[TABLE.age.iloc[row] for row in part] for part in parts]
    if len(parts) != 2 or not all(parts):
        raise NotYet(
            "a hospital without images",
            f"2 hospitals were asked for, and they hold {parts}: give each a part.",
        )
    if len(set(dealt)) < len(dealt):
        raise NotYet("an image dealt twice", f"The parts are {parts}: each row belongs to one hospital.")
    if names[0] & names[1]:
        raise NotYet(
            "images dealt instead of patients",
            f"Patient {min(names[0] & names[1])} is at both hospitals. Deal the patients, then give each "
            "hospital all rows of its patients.",
        )
    if set(dealt) != set(rows):
        raise NotYet(
            "images lost",
            f"Rows {sorted(set(rows) - set(dealt))} are nobody's. If 5 patients are cut by a whole number "
            "a hospital, the rest falls off: `np.array_split` keeps it.",
        )
    if max(ages[0]) > min(ages[1]):
        oldest_first = min(ages[0]) > max(ages[1])
        raise NotYet(
            "the oldest first" if oldest_first else "not sorted by age",
            f"The first hospital holds ages {ages[0]}, the second {ages[1]}. Sort the patients by age, the "
            "youngest first, and cut.",
        )
    print("Right: every image once, every patient at one hospital, the youngest first.")


def _lists(parts: Sequence) -> list[list[int]]:
    """Return the parts as lists of row numbers; tensors and arrays are taken too."""
    try:
        return [torch.as_tensor(part, dtype=torch.int64).tolist() for part in parts]
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(
            "no lists of row numbers", "Return a list with one list of row numbers a hospital."
        ) from None


def check_leak(leak: object, table: pd.DataFrame, one: Sequence[int], other: Sequence[int]) -> None:
    """Check the share of test images whose patient is in training too, in per cent."""
    demand(leak, "leak")
    seen = set(table.patient_id.iloc[list(one)])
    there = table.patient_id.iloc[list(other)]
    images = 100 * float(there.isin(seen).mean())
    patients = 100 * len(seen & set(there)) / there.nunique()
    judge(
        "leak",
        leak,
        images,
        [
            Mistake(
                "a fraction where per cent are asked",
                images / 100,
                "A share runs from 0 to 1: multiply it by 100.",
            ),
            Mistake(
                "patients counted instead of images",
                patients,
                "The score is a mean over test images: count the test *images* whose patient is in training.",
            ),
            Mistake(
                "divided by the wrong side",
                100 * float(there.isin(seen).sum()) / len(one),
                "The share is of the test images: divide by their number.",
            ),
            Mistake("images compared", 0.0, "No image is on both sides. Compare the patients of the images."),
        ],
    )
    print(f"Right: {images:.0f} % of the test images are of patients that a training has seen.")
