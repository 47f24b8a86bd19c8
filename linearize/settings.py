"""Settings as frozen dataclasses: what a field may hold, in words and as a check. Knows nothing of files.

A `Section` checks itself whenever it is built, from a file (config.py) or in Python, and reports everything
that is wrong at once.
"""

import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field

from linearize.errors import RecipeError

_COMPARISONS = {
    "minimum": ("at least", operator.ge),
    "maximum": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def setting(default=MISSING, *, help: str, **limits) -> typing.Any:
    """A dataclass field of a `Section`.

    Args:
        default: the value where none is given; a list is copied; without one the setting is required.
        help: what the setting does, with its unit; becomes its comment in `to_yaml`.
        limits: `minimum`, `maximum` (inclusive), `above`, `below` (exclusive) for a number or each number of
            a list; `unique=True`, `nonempty=True` for a list.
    """
    unknown = set(limits) - {*_COMPARISONS, "unique", "nonempty"}
    assert not unknown, f"unknown limits {unknown}"
    metadata = {"help": help, "limits": limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of settings. Subclasses declare fields with `setting` (or of another Section's type)."""

    def __post_init__(self) -> None:
        """Raises RecipeError with every problem of this section, one a line."""
        problems = []
        for item, kind in fields_of(type(self)):
            value = getattr(self, item.name)
            problem = _misfit(kind, value) or out_of_limits(item, value)
            if problem:
                problems.append(f"{item.name}: {problem}")
        problems = problems or list(self.check())
        if problems:
            raise RecipeError("\n".join(problems))

    def check(self) -> Iterator[str]:
        """Yields 'setting: problem' for settings that do not go together, each of them possible by itself."""
        yield from ()


@functools.cache
def fields_of(section: type[Section]) -> list[tuple[Field, typing.Any]]:
    """The settings of a section and their types, in order; fields with metadata `yaml=False` left out."""
    hints = typing.get_type_hints(section)
    return [
        (item, hints[item.name]) for item in dataclasses.fields(section) if item.metadata.get("yaml", True)
    ]


def setting_paths(section: type[Section]) -> list[str]:
    """The dotted name of every setting, such as 'attention.feature_map.dim'."""
    paths = []
    for item, kind in fields_of(section):
        paths += [f"{item.name}.{rest}" for rest in setting_paths(kind)] if is_section(kind) else [item.name]
    return paths


def _misfit(kind: typing.Any, value: typing.Any) -> str | None:
    """Why a Python value is not of type `kind`, or None."""
    if is_union(kind):
        fits = any(_misfit(member, value) is None for member in typing.get_args(kind))
    elif typing.get_origin(kind) is list:
        (item_kind,) = typing.get_args(kind)
        fits = isinstance(value, list) and all(_misfit(item_kind, item) is None for item in value)
    elif typing.get_origin(kind) is typing.Literal:
        fits = value in typing.get_args(kind)
    elif kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return None if fits else must_be(kind, repr(value))


def out_of_limits(item: Field, value: typing.Any) -> str | None:
    """Why a value of the right type is impossible, or None."""
    limits = item.metadata.get("limits", {})
    if isinstance(value, list):
        if limits.get("nonempty") and not value:
            return "must not be an empty list"
        if limits.get("unique") and len(set(value)) < len(value):
            return f"must not repeat an entry, is {value}"
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str) and not entry.strip():
            return "must not be empty text"
        if isinstance(entry, (int, float)) and not isinstance(entry, bool):
            if not math.isfinite(entry):
                return f"must be finite, is {entry}"
            for name, (words, holds) in _COMPARISONS.items():
                if name in limits and not holds(entry, limits[name]):
                    return f"must be {words} {limits[name]}, is {entry}"
    return None


def must_be(kind: typing.Any, shown: str) -> str:
    """'must be ..., is ...': what a field of this type takes, and what it was given."""
    close = ""
    if typing.get_origin(kind) is typing.Literal:
        match = difflib.get_close_matches(shown.strip("'"), typing.get_args(kind), 1)
        close = f"; did you mean '{match[0]}'?" if match else ""
    return f"must be {describe(kind)}, is {shown}{close}"


def describe(kind: typing.Any) -> str:
    """What a field of this type takes, in words."""
    if is_union(kind):
        return " or ".join(describe(member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list, each {describe(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    words = {int: "a whole number (64, 16k, 20M)", float: "a number (0.5, 1e-3)", bool: "true or false"}
    words |= {str: "text", types.NoneType: "null"}
    return words.get(kind) or getattr(kind, "__name__", str(kind))


def is_section(kind: typing.Any) -> bool:
    """Whether a field's type is a group of settings."""
    return isinstance(kind, type) and issubclass(kind, Section)


def is_union(kind: typing.Any) -> bool:
    """Whether a field's type is `A | B`."""
    return typing.get_origin(kind) in (typing.Union, types.UnionType)
