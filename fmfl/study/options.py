"""Options of the command line: their declaration, and their texts as parameters."""

import math
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fmfl import config
from fmfl.errors import UserError


def option(text: str, *flags: str, **more: Any) -> Any:
    """Return an option with a text, or with the meaning and the choices of the parameter of this name."""
    if about := config.PARAMETERS.get(text):
        text, choices = about.meaning, about.choices
        more |= {"metavar": "|".join(choices), "autocompletion": lambda: list(choices)} if choices else {}
    return typer.Option(*flags, help=text, **more)


def argument(metavar: str, text: str) -> Any:
    """Return an argument with a name for it and a text."""
    return typer.Argument(metavar=metavar, help=text)


Others = Annotated[
    list[str] | None,
    option(
        "any other of `fmfl params`; repeat it",
        "-p",
        metavar="NAME=VALUE",
        autocompletion=lambda: [f"{name}=" for name in config.PARAMETERS],
    ),
]
Vary = Annotated[
    list[str] | None,
    option("also with other values of a parameter, for the map; repeat it", metavar="NAME=V1,V2,..."),
]


def _read_file(context: typer.Context, file: Path | None) -> Path | None:
    """Take a file of settings for all that the command line leaves open."""
    if file is not None and not context.resilient_parsing:
        try:
            context.default_map, *pairs = _sorted(context, _mapping(file))
        except UserError as error:
            raise UserError(f"--settings {file}: {error}") from None
        context.meta.update(zip(("fmfl -p", "fmfl --vary"), pairs, strict=True))
    return file


SettingsFile = Annotated[
    Path | None,
    option(
        "YAML file of parameters, of these options by name, and of values under vary; options go before it",
        "--settings",
        metavar="FILE",
        is_eager=True,
        callback=_read_file,
    ),
]


def _mapping(file: Path) -> dict[str, Any]:
    """Return the names and values of a YAML file.

    Raises:
        UserError: it cannot be read, or holds something else, or a name twice.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        content, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"it cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" in line {place.line + 1}" if place else ""
        raise UserError(f"it is not valid YAML{where}: write one `NAME: VALUE` a line") from None
    if not isinstance(content, dict):
        raise UserError("it holds no parameters: write one `NAME: VALUE` a line")
    names = [str(key.value) for key, _ in node.value]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is given twice: name each parameter once")
    return {str(name): value for name, value in content.items()}


def _sorted(context: typer.Context, content: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Return a file's values as texts of a command line: of its options, of -p and of --vary."""
    flags = {
        one.opts[0].lstrip("-"): one.name
        for one in context.command.params
        if one.name in {"profile", *config.PARAMETERS}
    }
    known = flags | {name: name for name in config.PARAMETERS}
    own: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, value in content.items():
        if name == "vary":
            continue
        if name not in known:
            raise config.unknown(name, [*known, "vary"])
        kind = own if (meant := known[name]) in flags.values() else others
        if meant in kind:
            raise UserError(f"{name} is given twice, once as {meant}: name each parameter once")
        kind[meant] = _text(name, value)
        if kind is others:
            config.parse(name, others[name])
    variants = content.get("vary") or {}
    if not isinstance(variants, dict):
        raise UserError("vary must hold one `NAME: [VALUE, ...]` a line")
    return own, others, {config.known(name).name: _text(name, value) for name, value in variants.items()}


def _text(name: str, value: Any) -> str:
    """Write a value of a YAML file as on a command line; a list is joined by commas."""
    if value is None or isinstance(value, dict):
        raise UserError(f"{name} has no value: write `{name}: VALUE`")
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def read_values(option: str, text: str, read: Callable[[str], Any] = str) -> list:
    """Return the values of an option that joins them by commas, each once."""
    try:
        values = [read(part) for part in config.split_list(text)]
    except UserError as error:  # a parameter's own error: the person has typed the option
        raise UserError(re.sub(r"^parameter \w+ ", f"{option} ", str(error))) from None
    if not values:
        raise UserError(f"{option} is empty: name at least one, with commas between them")
    if len(set(values)) < len(values):
        raise UserError(f"{option} names one twice ({', '.join(map(str, values))}): name each once")
    return values


def read_pairs(context: typer.Context, option: str, texts: list[str] | None) -> dict[str, str]:
    """Return the NAME=VALUE texts of an option, without parameters that have an option of their own.

    A file of settings has the others, see `SettingsFile`.
    """
    own = {one.name: one.opts[0] for one in context.command.params if one.name in config.PARAMETERS}
    pairs: dict[str, str] = {}
    for pair in texts or []:
        name, separator, text = pair.partition("=")
        if not separator:
            raise UserError(f"{option} {pair} has no value: write {option} NAME=VALUE")
        if name in own:
            raise UserError(f"{option} {name} has an option of its own: use {own[name]}")
        if name in pairs:
            raise UserError(f"{option} {name} is given twice: name each parameter once")
        pairs[name] = text
    return context.meta.get(f"fmfl {option}", {}) | pairs


def read_others(context: typer.Context, texts: list[str] | None) -> dict[str, Any]:
    """Return the parameters given by -p."""
    return {name: config.parse(name, text) for name, text in read_pairs(context, "-p", texts).items()}


def read_variants(context: typer.Context, texts: list[str] | None, cfg: config.Settings) -> dict[str, list]:
    """Return the values that --vary gives a parameter, without the study's own, which is there anyway."""
    variants: dict[str, list] = {}
    for name, text in read_pairs(context, "--vary", texts).items():
        if name in config.tagged("free") | config.tagged("where"):
            raise UserError(f"--vary {name} is no axis of the map: use -p {name}")
        values = read_values(f"--vary {name}", text, partial(config.parse, name))
        variants[name] = [value for value in values if value != cfg.flat()[name]]
    return variants


def time_limit(minutes: float | None) -> float:
    """Return when --minutes are over, counted from now, in seconds since 1970; infinity without them."""
    if minutes is None:
        return math.inf
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes is {minutes:g}: it must be a number above 0")
    return time.time() + 60 * minutes


def absolute(path: str) -> str:
    """Return a path that holds in every folder."""
    return str(Path(path).expanduser().resolve())


def read_source(text: str) -> str:
    """Return a source of images; a folder is absolute, as notebooks run in a folder of their own."""
    if text == "phantom":
        return text
    if not Path(folder := absolute(text)).is_dir():
        raise UserError(f"--data {folder}: there is no such folder")
    return folder
