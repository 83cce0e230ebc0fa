"""The settings of a YAML or JSON file, each entry as the command-line token that says the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.cli import SettingsError
from metaxl_evo.training.converters import FieldKind
from metaxl_evo.training.shipped_configs import SUFFIXES

BASE = "base"  # the entry that names a file to build on
DEEPEST, MOST = 50, 10_000  # what a settings file may nest, and the values of one entry


@dataclass(frozen=True)
class Entry:
    """One top-level entry of a settings file: its node, untyped as yet, and where it stands."""

    node: yaml.Node
    file: Path

    @classmethod
    def of(cls, value: Any) -> Entry:
        """A plain value, as a mapping within a file holds it."""
        node = yaml.compose(json.dumps(value), Loader=Loader)
        assert node is not None
        return cls(node, Path("settings"))

    @property
    def place(self) -> str:
        return _place(self.file, self.node)

    def tokens(self, key: str, field: FieldKind) -> Iterator[str]:
        """The command-line token that says the same; none for null, which leaves the default."""
        node = self.node
        try:
            _refuse_unfolding(node)
        except yaml.YAMLError as error:
            raise _unreadable(self.file, error) from None
        if node.tag == _NULL:
            return
        if isinstance(node, yaml.ScalarNode):
            yield f"--{key}={node.value}"
        elif isinstance(node, yaml.SequenceNode) and field.takes_list:
            yield f"--{key}={json.dumps([self._item(key, item) for item in node.value])}"
        elif isinstance(node, yaml.MappingNode) and field.takes_mapping:
            yield f"--{key}={json.dumps(self._typed(node))}"
        else:
            found = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
            wanted = "a list" if field.takes_list else "a mapping" if field.takes_mapping else "one value"
            raise SettingsError(f"{self.place}: {key}: expected {wanted}, found {found}")

    def _item(self, key: str, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL:
            raise SettingsError(f"{_place(self.file, node)}: {key}: expected a list of plain values")
        return node.value

    def _typed(self, node: yaml.MappingNode) -> Any:
        try:
            return Loader("").construct_document(node)
        except yaml.YAMLError as error:
            raise _unreadable(self.file, error) from None
        except ValueError as error:  # !!int x
            raise SettingsError(f"{self.place}: cannot be read: {one_line(error)}") from None


def read_config(file: Path) -> dict[str, Entry]:
    """The top-level entries of a YAML or JSON settings file, and below them those of its `base`, if it names one."""
    entries, read = _entries_of(file), {file.resolve()}
    while BASE in entries:
        named = entries.pop(BASE)
        if not isinstance(named.node, yaml.ScalarNode) or named.node.tag == _NULL:
            raise SettingsError(f"{named.place}: {BASE}: expected one file name")
        file = named.file.parent / str(named.node.value)
        if file.resolve() in read:
            raise SettingsError(f"{named.place}: {BASE}: {file} is read already: a file cannot build on itself")
        read.add(file.resolve())
        entries = _entries_of(file) | entries
    return entries


def _entries_of(file: Path) -> dict[str, Entry]:
    """Those of one file, each key once."""
    text = _text_of(file)
    try:
        # JSON is YAML's flow style, but for tabs between its tokens.
        root = yaml.compose(text.expandtabs(1) if file.suffix == ".json" else text, Loader=Loader)
        if root is None:
            return {}
        if not (isinstance(root, yaml.MappingNode) and all(isinstance(key, yaml.ScalarNode) for key, _ in root.value)):
            raise SettingsError(f"{_place(file, root)}: expected 'key: value' lines at the top level")
        _refuse_duplicates(root)
    except yaml.YAMLError as error:
        raise _unreadable(file, error) from None
    except RecursionError:
        raise SettingsError(f"{file}: cannot be read: it is nested more than {DEEPEST} deep") from None
    return {str(key.value): Entry(value, file) for key, value in root.value}


def _text_of(file: Path) -> str:
    if file.suffix not in SUFFIXES:
        raise SettingsError(f"--config {file}: expected a file that ends in {', '.join(SUFFIXES)}")
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise IsADirectoryError("it is not a file")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        present = sorted(other.name for other in file.parent.glob("*") if other.suffix in SUFFIXES)
        raise SettingsError(
            f"--config {file}: {unknown('file', file.name, present) if present else 'no such file'}"
        ) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"--config {file}: cannot be read as UTF-8 text ({error})") from None


def _place(file: Path, node: yaml.Node) -> str:
    return f"{file}:{node.start_mark.line + 1}"


def _unreadable(file: Path, error: yaml.YAMLError) -> SettingsError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = f":{mark.line + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return SettingsError(f"{file}{line}: cannot be read: {one_line(problem)}")


def _refuse_unfolding(node: yaml.Node) -> None:
    """Refuse what only YAML can say: types of its own, and anchors that unfold without end."""
    for number, (inner, depth) in enumerate(_unfolded(node)):
        if depth > DEEPEST:
            problem = f"it is nested more than {DEEPEST} deep, or in itself"
        elif number > MOST:
            problem = f"its anchors unfold to more than {MOST} values"
        elif inner.tag not in _PLAIN:
            problem = f"a value of the type {inner.tag!r} is none that JSON has"
        else:
            continue
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=inner.start_mark)


def _unfolded(node: yaml.Node) -> Iterator[tuple[yaml.Node, int]]:
    """The nodes with every anchor in its places, and how deep each is."""
    waiting = [(node, 0)]
    while waiting:
        inner, depth = waiting.pop()
        yield inner, depth
        if isinstance(inner, yaml.SequenceNode):
            waiting += [(item, depth + 1) for item in inner.value]
        elif isinstance(inner, yaml.MappingNode):
            waiting += [(item, depth + 1) for pair in inner.value for item in pair]


def _refuse_duplicates(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name = str(key.value)
        if name in lines:
            raise yaml.MarkedYAMLError(
                problem=f"{name!r} is given twice, first on line {lines[name] + 1}", problem_mark=key.start_mark
            )
        lines[name] = key.start_mark.line


class Loader(yaml.SafeLoader):
    """Plain scalars as YAML 1.2 reads them: `1e-4` is a number; `no`, `on`, `2024-01-01` are texts. No key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the class attribute that PyYAML reads)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_duplicates(node)
        return super().construct_mapping(node, deep=deep)


_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_NULL = "tag:yaml.org,2002:null"
_RESOLVED = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _kind, _pattern in _RESOLVED.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), None)
