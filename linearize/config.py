"""YAML text -> a `Section` of settings, strictly, and back. Knows nothing of what the settings mean.

Scalars are read by the type of the field, not by YAML's guesses: `1e-3` is a number where a number is
expected, `no` is text where text is expected, `20M` is 20,000,000. Nothing is coerced: a quoted number is
text. Unknown, repeated, missing and impossible settings are all found in one pass and reported together.
"""

import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field
from decimal import Decimal
from typing import Any

import yaml

from linearize.errors import RecipeError
from linearize.settings import Section, fields_of, is_section, is_union, must_be, out_of_limits, setting_paths

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "True": True, "false": False, "False": False}
_NUMBER = re.compile(
    r"(?P<digits>[+-]?(?:(?:0|[1-9]\d*(?:_\d+)*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?)(?P<unit>[kMB]?)",
    re.ASCII,
)
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_OVERRIDE = "--set"


def parse(section: type[Section], text: str, *, where: str, overrides: Sequence[str] = (), **hidden):
    """Reads a section (and those inside it) from YAML text.

    Args:
        section: the Section class to build.
        text: YAML; empty text means every default.
        where: what the text is (a path), for the message.
        overrides: `a.b=value` strings, the value in YAML; they win over the text, the last one over others.
        hidden: values of fields declared with metadata `yaml=False`.
    Raises:
        RecipeError: every problem found, one a line, each with its full name and line.
    """
    reader = _Reader(section)
    root = reader.compose(text, where)
    readable = not reader.problems
    reader.take_overrides(overrides)
    built = reader.section(section, root, "", **hidden) if readable else None
    if reader.problems:
        count = "a problem" if len(reader.problems) == 1 else f"{len(reader.problems)} problems"
        raise RecipeError("\n  ".join([f"{where} has {count}:", *reader.problems]))
    return built


def to_yaml(section: Section, *, header: str = "") -> str:
    """Every setting with its value and its help as a comment; `parse` reads it back to an equal section."""
    lines = [f"# {line}" for line in header.splitlines()]
    return "\n".join(lines + _yaml_lines(section, "")) + "\n"


# --- reading ---------------------------------------------------------------------------------------------


class _Refused(Exception):
    """A value does not have the type of its field; the text says what is allowed."""


class _Reader:
    """One pass over a document: builds what it can and collects every problem."""

    def __init__(self, root: type[Section]) -> None:
        self.problems: list[str] = []
        self.paths = setting_paths(root)
        self.overrides: dict[str, yaml.Node] = {}

    def compose(self, text: str, name: str) -> yaml.Node | None:
        try:
            loader = yaml.SafeLoader(text)
            loader.name = name
            return loader.get_single_node()
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1}: " if mark and name != _OVERRIDE else ""
            problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
            self.problems.append(f"{line}not valid YAML: {problem} (text with : # * [ {{ needs quotes)")
            return None

    def take_overrides(self, overrides: Sequence[str]) -> None:
        for override in overrides:
            path, equals, text = override.partition("=")
            path = path.strip()
            if not equals:
                self.problems.append(f"{_OVERRIDE} {override}: write it as {self.paths[0]}=value")
            elif path in self.paths:
                before = len(self.problems)
                node = self.compose(text, _OVERRIDE)
                self.problems[before:] = [f"{_OVERRIDE} {override}: {p}" for p in self.problems[before:]]
                # an empty value composes to nothing: the same as null in a file
                self.overrides[path] = node or yaml.ScalarNode("null", "", _mark_of(_OVERRIDE))
            elif any(known.startswith(path + ".") for known in self.paths):
                inside = [known for known in self.paths if known.startswith(path + ".")]
                self.problems.append(f"{_OVERRIDE} {path}: is a group; set one of {', '.join(inside)}")
            else:
                self.problems.append(
                    f"{_OVERRIDE} {path}: no such setting{self.nearest(path, self.paths, '')}"
                )

    def nearest(self, name: str, names: Sequence[str], path: str) -> str:
        """'; did you mean ...': from the names of this group, else from those of all groups."""
        close = difflib.get_close_matches(name, names, 1)
        if close:
            return f"; did you mean '{path}{close[0]}'?"
        by_last = {known.rpartition(".")[2]: known for known in reversed(self.paths)}
        close = difflib.get_close_matches(name.rpartition(".")[2], list(by_last), 1, 0.75)
        return f"; did you mean '{by_last[close[0]]}'?" if close else f"; known: {', '.join(names)}"

    def section(self, section: type[Section], node: yaml.Node | None, path: str, **hidden) -> Section | None:
        before = len(self.problems)
        given = self.mapping(section, node, path)
        values = dict(hidden)
        for item, kind in fields_of(section):
            name = path + item.name
            child = self.overrides.get(name, given.get(item.name))
            if is_section(kind):
                values[item.name] = self.section(kind, child, name + ".")
            elif child is not None:
                values[item.name] = self.value(item, kind, child, name)
            elif item.default is MISSING and item.default_factory is MISSING:
                self.problems.append(f"{name}: is required ({item.metadata['help']})")
        if len(self.problems) > before:
            return None
        try:
            return section(**values)
        except RecipeError as error:
            self.problems += [path + line for line in str(error).splitlines()]
            return None

    def mapping(self, section: type[Section], node: yaml.Node | None, path: str) -> dict[str, yaml.Node]:
        """The known entries of a group; problems for all others. Nothing, or null, is an empty group."""
        names = [item.name for item, _ in fields_of(section)]
        if node is None or _is_null(node):
            return {}
        if not isinstance(node, yaml.MappingNode):
            group, allowed = path.rstrip(".") or "everything", ", ".join(names)
            self.problems.append(f"{group}{_line(node)}: must be a group with {allowed}, is {_shown(node)}")
            return {}
        entries, lines = {}, {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else _shown(key)
            if name not in names:
                self.problems.append(
                    f"{path}{name}{_line(key)}: no such setting{self.nearest(name, names, path)}"
                )
            elif name in entries:
                self.problems.append(f"{path}{name}{_line(key)}: written twice, first on line {lines[name]}")
            else:
                entries[name], lines[name] = value, key.start_mark.line + 1
        return entries

    def value(self, item: Field, kind: Any, node: yaml.Node, name: str) -> Any:
        try:
            value = _read(kind, node)
            problem = out_of_limits(item, value)
        except _Refused as error:
            value, problem = None, str(error)
        if problem:
            self.problems.append(f"{name}{_line(node)}: {problem}")
        return value


def _read(kind: Any, node: yaml.Node) -> Any:
    """The value of a node as `kind`; raises _Refused."""
    if is_union(kind):
        return _read(_member_for(kind, node), node)
    if kind is types.NoneType:
        return None
    if typing.get_origin(kind) is list:
        return _read_list(kind, node)
    text = node.value
    if not isinstance(node, yaml.ScalarNode) or (kind in (int, float, bool) and node.style is not None):
        raise _Refused(must_be(kind, _shown(node)))
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise _Refused(must_be(kind, repr(text)))
        return text
    if kind is str:
        if _is_null(node):
            raise _Refused("must be text, is empty")
        return text
    if kind is bool and text in _BOOLS:
        return _BOOLS[text]
    number = _number(text) if kind in (int, float) else None
    if number is None or (kind is int and number != number.to_integral_value()):
        raise _Refused(must_be(kind, repr(text)))
    return kind(number)


def _read_list(kind: Any, node: yaml.Node) -> list:
    (item_kind,) = typing.get_args(kind)
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.ScalarNode) and node.start_mark.name == _OVERRIDE and not _is_null(node):
        # on the command line `0,1` needs no brackets
        parts = [node.value] if node.style else [part.strip() for part in node.value.split(",")]
        children = [yaml.ScalarNode(node.tag, part, node.start_mark, style=node.style) for part in parts]
    else:
        raise _Refused(must_be(kind, _shown(node)))
    return [_read(item_kind, child) for child in children]


def _number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text)
    return Decimal(match["digits"].replace("_", "")) * _UNITS[match["unit"]] if match else None


def _member_for(union: Any, node: yaml.Node) -> Any:
    """The member of a union that a node's shape asks for: null, a list, or the scalar."""
    members = typing.get_args(union)
    if _is_null(node) and types.NoneType in members:
        return types.NoneType
    lists = [member for member in members if typing.get_origin(member) is list]
    if isinstance(node, yaml.SequenceNode) and lists:
        return lists[0]
    scalars = [member for member in members if member is not types.NoneType and member not in lists]
    assert len(scalars) == 1, f"cannot tell the members of {union} apart"
    return scalars[0]


# --- writing ---------------------------------------------------------------------------------------------


def _yaml_lines(section: Section, indent: str) -> list[str]:
    lines = []
    for item, kind in fields_of(type(section)):
        value = getattr(section, item.name)
        if is_section(kind):
            about = (kind.__doc__ or "").splitlines()[0]
            lines += [f"{indent}{item.name}:  # {about}", *_yaml_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{item.name}: {_yaml_value(value)}  # {item.metadata['help']}")
    return lines


def _yaml_value(value: Any) -> str:
    """A value in YAML that this module and any YAML 1.1 reader take for the same one."""
    if isinstance(value, list):
        return f"[{', '.join(_yaml_value(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa + (".0" if e and "." not in mantissa else "") + e + exponent
    if isinstance(value, str):
        # plain where it is a path or a name, quoted where YAML could take it for anything else
        name_like = re.fullmatch(r"[A-Za-z/][\w./*+-]*(:[\w./*+-]+)*", value, re.ASCII)
        if name_like and yaml.safe_load(value) == value:
            return value
        return yaml.safe_dump(value, default_style='"', width=math.inf, allow_unicode=True).strip()
    return str(value)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULLS


def _line(node: yaml.Node) -> str:
    mark = node.start_mark
    return f" ({_OVERRIDE})" if mark.name == _OVERRIDE else f" (line {mark.line + 1})"


def _mark_of(name: str) -> yaml.Mark:
    return yaml.Mark(name, 0, 0, 0, None, None)


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"the quoted text {node.value!r}" if node.style else repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group"
