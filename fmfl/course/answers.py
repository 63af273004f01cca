"""Answers of participants: predictions written down first, and checks that name what is wrong.

Each part of the course has a module of checks. A check knows the right answer to a small case and what the
typical mistakes give for it. So it can name the mistake by the answer alone, whatever the code looks like.
"""

import copy
import json
import linecache
import math
import re
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmfl import paths, states


class NotYet(Exception):
    """Answer that is not right yet: the mistake's name, and what to do about it.

    JupyterLab shows the message alone: a traceback would bury it.
    """

    def __init__(self, mistake: str, says: str) -> None:
        super().__init__(f"Not yet: {mistake}.\n{textwrap.fill(says, 100)}")
        self.mistake = mistake

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for how an exception is shown in a notebook."""
        return str(self).splitlines()


class Mistake(NamedTuple):
    """Typical mistake: its name, what it gives for the check's case, and what to do."""

    name: str
    answer: object
    says: str


def judge(task: str, value: object, right: object, mistakes: Sequence[Mistake] = ()) -> None:
    """Compare an answer with the right one, then with those of typical mistakes.

    Args:
        task: names the answer in messages.
        value: the participant's.
        right: the answer wanted.
        mistakes: in the order of looking.

    Raises:
        NotYet: the answer is open, a mistake by name, or another one.
    """
    demand(value, task)
    if same(value, right):
        return
    for mistake in mistakes:
        if same(value, mistake.answer):
            raise NotYet(mistake.name, mistake.says)
    raise NotYet(
        "another answer",
        f"{task} is {shown(value)}, but here it has to be {shown(right)}. None of the typical mistakes "
        "gives this: do the case by hand, and compare line by line.",
    )


def demand(value: object, task: str) -> None:
    """Raise NotYet where nothing has been filled in, or a function returns nothing."""
    if value is ...:
        raise NotYet("still open", f"Fill in {task} in the cell above: replace the three dots. Then run on.")
    if value is None:
        raise NotYet(
            "nothing comes back", f"{task} returns nothing: write its lines, and end with `return ...`."
        )


def asked(task: str, function: object, *arguments: object) -> Any:
    """Call a participant's function with copies of the arguments, and return its answer.

    Raises:
        NotYet: it is no function, is still open, or stops with an error.
    """
    demand(function, task)
    if not callable(function):
        raise NotYet("not a function", f"{task} is {shown(function)}: keep its line that begins with `def`.")
    given = copy.deepcopy(arguments)
    try:
        answer = function(*given)
    except NotYet:
        raise
    except Exception as error:
        raise NotYet(
            f"it stops with {type(error).__name__}", f"{task} says: {error}{_line_of(error, function)}"
        ) from None
    if answer is None and _is_open(function):
        raise NotYet("still open", f"Fill in {task} in the cell above: replace the three dots. Then run on.")
    demand(answer, task)
    if not all(map(torch.equal, _tensors(given), _tensors(arguments))):
        raise NotYet(
            "an input is changed",
            f"{task} changes a tensor that it was given: adding in place (`+=`, `add_`) changes what a "
            "hospital has sent. Begin with `total = 0`, and write `total = total + ...`.",
        )
    return answer


def _tensors(values: object) -> list[torch.Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(values, torch.Tensor):
        return [values]
    inside = values.values() if isinstance(values, dict) else values
    nested = isinstance(values, (dict, list, tuple))
    return [tensor for value in inside for tensor in _tensors(value)] if nested else []


def _is_open(function: Callable) -> bool:
    """Tell if a function's body is nothing but a docstring and dots."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_names or code.co_nlocals > code.co_argcount:
        return False
    return {value for value in code.co_consts if value is not None} <= {function.__doc__, ...}


def _line_of(error: Exception, function: Callable) -> str:
    """Quote the last line of the participant's own cell that led to an error."""
    own = getattr(getattr(function, "__code__", None), "co_filename", None)
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    line = linecache.getline(own, numbers[-1]).strip() if numbers else ""
    return f" (line {numbers[-1]} of the cell: {line})" if line else ""


def same(one: object, other: object) -> bool:
    """Tell if two answers agree: numbers to four digits, tensors in shape and values, the rest exactly."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        try:
            one, other = torch.as_tensor(one), torch.as_tensor(other)
        except (TypeError, ValueError, RuntimeError):  # text, None, lists of several lengths
            return False
        close = one.shape == other.shape and torch.allclose(
            one.double(), other.double(), rtol=1e-4, atol=1e-6, equal_nan=True
        )
        return bool(close)
    if isinstance(one, Real) and isinstance(other, Real):
        both_nan = math.isnan(one) and math.isnan(other)
        return both_nan or math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def shown(value: object) -> str:
    """Return a value as a message shows it: four digits, at most 80 characters."""
    if isinstance(value, torch.Tensor):
        value = value.detach().tolist()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return textwrap.shorten(repr(value), 80)


# Predictions

#: Names that make folders of their own on every system.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def folder(participant: str | Path) -> Path:
    """Return a participant's own folder below runs/class; a path stands for itself.

    Raises:
        NotYet: the name would not make a folder.
    """
    if not Path(participant).is_absolute() and not NAME.fullmatch(str(participant)):
        raise NotYet(
            "a name that makes no folder", "Use letters, digits, - and _ for the participant's name."
        )
    return paths.RUNS / "class" / participant


def predict(participant: str, question: str, value: object, low: float, high: float, unit: str = "") -> None:
    """Write a prediction down before its outcome is seen; the first one counts.

    Args:
        participant: whose folder keeps it.
        question: names it in the file and in `compare`.
        value: a number.
        low: the smallest that can be meant.
        high: the largest.
        unit: such as `%`.

    Raises:
        NotYet: it is open, no number, a fraction instead of per cent, or out of range.
    """
    asks = f"Write a number from {low:g} to {high:g}{f' ({unit})' if unit else ''} in place of the three dots"
    if value is ...:
        raise NotYet(
            "the prediction is open",
            f"{asks}, before you run on. A wrong one teaches as much as a right one.",
        )
    if not isinstance(value, Real) or isinstance(value, bool):
        raise NotYet("the prediction is no number", f"{asks}, without quotes and without its unit.")
    if unit == "%" and 0 < value < 1:
        raise NotYet("a fraction where per cent are asked", f"Did you mean {100 * value:g}? {asks}.")
    if not low <= value <= high:
        raise NotYet("a prediction out of range", f"{value:g} cannot be meant. {asks}.")
    _keep(participant, question, value)


def choose(participant: str, question: str, value: object, options: Sequence[str]) -> None:
    """Write down a prediction that is one of some words; see `predict`."""
    words = ", ".join(map(repr, options))
    if value is ...:
        raise NotYet("the prediction is open", f"Write one of {words} in place of the three dots.")
    if value not in options:
        raise NotYet("the prediction is none of the choices", f"Write one of {words}.")
    _keep(participant, question, value)


def _keep(participant: str, question: str, value: object) -> None:
    file = folder(participant) / "predictions.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    first = known.setdefault(question, value)
    states.write_bytes(file, json.dumps(known, indent=1).encode())
    kept = "" if same(first, value) else f" Your first one, {shown(first)}, counts."
    print(f"Your prediction is written down: {shown(value)}.{kept}")


def compare(participant: str, question: str, outcome: object, unit: str = "") -> None:
    """Show what was predicted first beside what came out.

    Raises:
        NotYet: nothing was predicted.
    """
    file = folder(participant) / "predictions.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if question not in known:
        raise NotYet("no prediction", f"Write your prediction on {question!r} first, and run its cell.")
    said, came = shown(known[question]), f"{outcome:.2f}" if isinstance(outcome, float) else shown(outcome)
    print(f"{question}: you predicted {said}{unit and ' ' + unit}, and it is {came}{unit and ' ' + unit}.")


def labels(
    task: str, given: object, right: Mapping[str, str], options: Mapping[str, str], says: Mapping[str, str]
) -> None:
    """Check a choice of words, one for each item, and say why the first wrong one is wrong.

    Args:
        task: names the answer in messages.
        given: the participant's choices by item.
        right: the right ones.
        options: the words that may be chosen, with their meaning.
        says: for each item, the name of the mistake, a colon, and where to look.

    Raises:
        NotYet: something is open, unknown or wrong.
    """
    demand(given, task)
    if not isinstance(given, Mapping):
        raise NotYet("not a dictionary", f"Keep {task} a dictionary, with a word for each of {list(right)}.")
    for item, word in right.items():
        if given.get(item, ...) is ...:
            raise NotYet("still open", f"Choose a word for {item!r} in {task}: {', '.join(options)}.")
        if not isinstance(given[item], str) or given[item] not in options:
            raise NotYet(
                "none of the choices", f"{given[item]!r} for {item!r}: choose one of {', '.join(options)}."
            )
        if given[item] != word:
            name, _, hint = says[item].partition(": ")
            raise NotYet(name, f"On {item!r} you chose {given[item]!r}. {hint}")
