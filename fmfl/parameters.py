"""Declaration of one parameter: type, default, range, the paper's value, meaning, users; and its check."""

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fmfl.errors import UserError

KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a run.

    Attributes:
        low, high: the range of a number, both ends allowed.
        multiple: a divisor of the value; 0: any.
        many: the value is a text of choices, or of any number of numbers, joined by commas.
        paper: the paper's value, where it names one.
        by: who takes it: notebooks by their numbers, and F for Flower's nodes.
        tags: groups that it belongs to, see `config.TAGS`.
    """

    name: str
    kind: type
    default: Any
    stage: str
    by: str
    meaning: str
    low: float | None = None
    high: float = math.inf
    multiple: int = 0
    choices: tuple[str, ...] = ()
    many: bool = False
    paper: Any = None
    tags: str = ""

    def __str__(self) -> str:
        """Return two lines: name, default, the paper's value, range and notebooks; then the meaning."""
        paper = "" if self.paper is None else f" (paper: {_in_text(self.paper)})"
        notebooks = " ".join(f"0{number}" for number in self.by if number.isdigit())
        about = f"{self.name} = {_in_text(self.default)}{paper}: {self.range}; notebooks {notebooks}"
        return f"{about}\n    {self.meaning}"

    @property
    def range(self) -> str:
        """Type and range in words."""
        if self.choices:
            return f"{'some' if self.many else 'one'} of {', '.join(self.choices)}"
        words = "numbers" if self.many else KINDS[self.kind]
        if self.low is not None:
            words += f" from {self.low:.10g}" + (f" to {self.high:.10g}" if self.high < math.inf else "")
        words += f", a multiple of {self.multiple}" if self.multiple else ""
        return words + (", joined by commas" if self.many else "")

    def validate(self, value: Any) -> Any:
        """Return a value in the parameter's own type.

        Raises:
            UserError: it is of another type or out of range.
        """
        value = self._in_its_type(value)
        if type(value) is not self.kind:
            kind = KINDS[self.kind]
            raise UserError(f"parameter {self.name} must be {kind}, not {value!r} ({type(value).__name__})")
        items = split_list(value) if self.many else [value]
        if not items and self.choices and self.default:
            raise UserError(f"parameter {self.name} is empty: choose {self.range}")
        for item in items:
            self._check_choice(item) if self.choices else self._check_range(item)
        if self.many and len({as_number(item) for item in items}) < len(items):
            what = "choice" if self.choices else "number"
            raise UserError(f"parameter {self.name} = {value!r} names one {what} twice: name each once")
        return value

    def parse(self, text: str) -> Any:
        """Return the value that a text on a command line stands for: `"1e-4"` becomes a number.

        Raises:
            UserError: see `validate`.
        """
        if self.kind is bool:
            return self.validate(text.strip())
        return self.validate(text if self.kind is str else as_number(text, self.kind))

    def _in_its_type(self, value: Any) -> Any:
        """Return a value of another type that says the same in the parameter's own; others as they are."""
        if self.kind is float and type(value) is int:
            return float(value)
        if self.kind in (int, float) and isinstance(value, str) and "e" in value.lower():
            return as_number(value, self.kind)  # YAML reads 1e-3 as text
        if self.kind is bool and isinstance(value, str):
            return {"true": True, "false": False}.get(value.lower(), value)  # papermill -p NAME true is text
        if self.kind is str and isinstance(value, list | tuple):
            return ",".join(map(str, value))
        if self.kind is str and isinstance(value, os.PathLike):
            return str(value)
        if self.many and not self.choices and type(value) in (int, float):
            return f"{value:g}"  # papermill reads a list of one as a number
        return value

    def _check_choice(self, item: str) -> None:
        if item not in self.choices:
            raise UserError(f"parameter {self.name} is {item!r}: choose {self.range}")

    def _check_range(self, item: Any) -> None:
        if self.low is None:
            return
        number = as_number(item) if self.many else item
        low, high = f"{self.low:.10g}", f"{self.high:.10g}"
        if isinstance(number, str):
            raise UserError(
                f"parameter {self.name} holds {item!r}: give numbers joined by commas, such as {low},{high}"
            )
        if not self.low <= number <= self.high:  # NaN too
            limits = f"lie between {low} and {high}" if self.high < math.inf else f"be at least {low}"
            begins = f"holds {item}: each" if self.many else f"is {item}: it"
            raise UserError(f"parameter {self.name} {begins} must {limits}")
        if self.multiple and number % self.multiple:
            near = number - number % self.multiple
            raise UserError(
                f"parameter {self.name} is {item}: it must be a multiple of {self.multiple}, such as {near}"
            )


def param(default: Any, meaning: str, low: float | None = None, high: float = math.inf, **more: Any) -> Any:
    """Return a dataclass field that declares a parameter; `more` are attributes of `Parameter`."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "low": low, "high": high} | more)


def choice(default: str, choices: str | Iterable[str], meaning: str, **more: Any) -> Any:
    """Return a dataclass field that declares a parameter with named values, such as `"auto cpu cuda"`."""
    choices = choices.split() if isinstance(choices, str) else choices
    return param(default, meaning, choices=tuple(choices), **more)


def split_list(text: str) -> list[str]:
    """Return the parts of a comma-separated text."""
    return [part.strip() for part in text.split(",") if part.strip()]


def as_number(text: str, kind: type = float) -> Any:
    """Return the number in a text, whole where `kind` is int and it is so; another text as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if kind is int and number.is_integer() else number


def _in_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value) or '""'
