"""Settings for a script: a YAML file first, the command line over it, one dataclass instance a type out of both.

    model_args, training_args = parse_arguments((ModelArguments, MetaTrainingArguments))

    train.py --config run.yaml --learning_rate 1e-4 --languages sw,ig,rw --estimator_kwargs.copies 8

A YAML entry becomes the command-line token that says the same, in front of the user's own. So both pass through the
same converters (`1e-4` is a float although YAML 1.1 calls it a string, the language `no` is not a boolean), and the
later one wins. Whatever is wrong with either raises `SettingsError`: one line with the place, the key and the way out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from metaxl_evo.messages import one_line, unknown

_NOTHING = "\0"  # in place of null on a command line
SUFFIXES = (".yaml", ".yml", ".json")
DEEPEST, MOST = 50, 10_000  # what a settings file may nest, and the values of one entry
Settings = TypeVar("Settings")
Result = TypeVar("Result")


class SettingsError(SystemExit, ValueError):
    """Bad input. Code may catch it as a ValueError; uncaught, it ends a script with its one line, no traceback."""


def parse_arguments(types: tuple[type, ...], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """An instance of each of `types`, from `--config FILE` and the options of `argv` (default: the process's own)."""
    parser = _Parser(types)
    given = list(sys.argv[1:] if argv is None else argv)
    config_file, given = _take_config(given)
    entries = read_config(Path(config_file)) if config_file is not None else {}
    for key, entry in entries.items():
        if key not in parser.fields:
            raise SettingsError(f"{entry.place}: {unknown('key', key, parser.fields)}")
    tokens = [token for key, entry in entries.items() for token in entry.tokens(key, parser.fields[key])]
    dotted, given = parser.take_dotted(given)
    settings = parser.settings(tokens, given, places={key: entry.place for key, entry in entries.items()})
    for key, overrides in dotted.items():
        settings[key] = _merged(key, settings.get(key, parser.fields[key].default), overrides)
    return tuple(
        make_settings(one, {name: settings[name] for name in settings if name in _names(one)}) for one in types
    )


def typed(types: tuple[type, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of some settings, as a mapping within a settings file holds them, converted as the file's own are.

    Raises:
        SettingsError: for a value that its setting cannot take, named.
    """
    parser = _Parser(types)
    tokens: list[str] = []
    nothing = {key for key, value in values.items() if value is None}
    for key in nothing:
        if parser.fields[key].default is not None:
            raise SettingsError(f"{key}: null is no value of it")
    for key in values.keys() - nothing:
        node = yaml.compose(json.dumps(values[key]), Loader=_Loader)
        assert node is not None
        tokens += _Entry(node, Path("settings")).tokens(key, parser.fields[key])
    return dict.fromkeys(nothing) | parser.settings(tokens, [], places={})


def make_settings(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """An instance of a settings dataclass, whose own check may be a library's.

    Raises:
        ValueError: whatever the check raised, as one line that names the settings to blame.
    """
    try:
        return cls(**values)
    except Exception as error:
        text = one_line(error)
        if isinstance(error, ValueError) and any(name in text for name in values):
            raise
        blamed = ", ".join(_blamed(cls, values, error)) or cls.__name__
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise SettingsError(f"{blamed}: cannot be used ({kind}{text})") from error


def ends_with_one_line(main: Callable[[Sequence[str] | None], Result]) -> Callable[..., Result]:
    """Decorates the `main` of a script: bad input ends it with one line, whether it is run or called."""

    @functools.wraps(main)
    def ended(argv: Sequence[str] | None = None) -> Result:
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            raise SettingsError(f"error: {one_line(error)}") from error

    return ended


def _blamed(cls: type, values: Mapping[str, Any], error: Exception) -> list[str]:
    """The settings without which this error does not come."""

    def is_needed(name: str) -> bool:
        try:
            cls(**{other: value for other, value in values.items() if other != name})
        except Exception as other:
            return (type(other), str(other)) != (type(error), str(error))
        return True

    return [name for name in values if is_needed(name)]


def _names(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls) if field.init}


# --- the parser ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Field:
    """What the command line must know of one dataclass field beyond its `argparse` action."""

    takes_text: bool
    takes_list: bool
    takes_mapping: bool
    default: Any

    @classmethod
    def of(cls, field: dataclasses.Field[Any], hint: Any) -> _Field:
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = [get_origin(member) or member for member in members]
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        return cls(
            takes_text=str in kinds,
            takes_list=list in kinds,
            takes_mapping=dict in kinds,
            default=None if default is dataclasses.MISSING else default,
        )


class _Part(list[Any]):
    """The items of one token of a list-valued option: two in `sw,ig`, one in `sw`."""


class _Parser(HfArgumentParser):
    """HfArgumentParser with full option names only, comma lists, JSON mappings, and one-line errors that name the key.

    Options that are not given stay out of the result, so that defaults come from the dataclasses and nowhere else."""

    def __init__(self, types: tuple[type, ...]) -> None:
        super().__init__(cast(Any, types), allow_abbrev=False, exit_on_error=False)
        self.fields: dict[str, _Field] = {}
        for one in types:
            hints = get_type_hints(one)
            self.fields |= {f.name: _Field.of(f, hints[f.name]) for f in dataclasses.fields(one) if f.init}
        for action in self._actions:
            if action.dest in self.fields:
                self._refine(action, self.fields[action.dest])
        self.add_argument(
            "--config", metavar="FILE", help="YAML or JSON file of settings; options given here win over it"
        )

    def _refine(self, action: argparse.Action, field: _Field) -> None:
        default = "" if action.default is None or action.required else f" (default: {action.default})"
        action.help = _printable((action.help or "") + default)
        action.default = argparse.SUPPRESS
        if action.nargs == 0:  # the --no_x of a boolean takes no value
            return
        one = _checked(action)
        if field.default is None and not action.required:
            one = _or_null(one)
        if field.takes_mapping:
            action.type = _mapping_or_text if field.takes_text else _mapping
        elif field.takes_list:
            action.type, action.nargs, action.choices = _items(one, commas=not field.takes_text), "+", None
        else:
            action.type = one

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)

    def option(self, token: str) -> argparse.Action | None:
        return self._option_string_actions.get(token.partition("=")[0])

    def take_dotted(self, given: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """`--key.path VALUE` pairs of mapping-valued fields as {key: {path: value}}, and the tokens that remain."""
        taken: dict[str, dict[str, Any]] = {}
        rest: list[str] = []
        tokens = iter(given)
        for token in tokens:
            name, equals, text = token.partition("=")
            key, dot, path = name.removeprefix("--").partition(".")
            if not (name.startswith("--") and dot and key in self.fields and self.fields[key].takes_mapping):
                rest.append(token)
                continue
            if not equals:
                text = next(tokens, "--")
            if not path or (not equals and text.startswith("--")):
                raise SettingsError(f"{name}: expected one value, as in --{key}.name VALUE")
            taken.setdefault(key, {})[path] = _plain_value(name, text)
        return taken, rest

    def settings(self, tokens: list[str], given: list[str], places: dict[str, str]) -> dict[str, Any]:
        """The converted values of all options that are given; `places` says where in the file `tokens` come from."""
        for token in given:
            name = token.partition("=")[0]
            if name.startswith("--") and " " not in name and name != "--" and self.option(token) is None:
                raise SettingsError(unknown("option", name, (f"--{key}" for key in (*self.fields, "config"))))
        try:
            namespace, extra = self.parse_known_args([*tokens, *self._unset(given)])
        except argparse.ArgumentError as error:
            key = (error.argument_name or "").split("/")[0].removeprefix("--")
            here = {action.dest for action in map(self.option, given) if action is not None}
            place = f"{places[key]}: " if key in places and key not in here else ""
            raise SettingsError(f"{place}{key}: {error.message}" if key else error.message) from None
        if extra:
            raise SettingsError(f"unexpected argument {extra[0]!r}: values follow their option, as in --option VALUE")
        return {key: self._whole(key, value) for key, value in vars(namespace).items() if key in self.fields}

    def _unset(self, given: Sequence[str]) -> Iterator[str]:
        """The tokens, `null` for an option that a settings file may have set marked; a file's own 'null' is a text."""
        before = ""
        for token in given:
            name, equals, text = token.partition("=")
            option = name if equals else before
            known = option.removeprefix("--") in self.fields and self.option(option)
            if known and not known.required and (text if equals else token) == "null":
                nothing = self.fields[known.dest].default is None
                token = (f"{name}={_NOTHING}" if equals else _NOTHING) if nothing else token
            yield token
            before = token

    def _whole(self, key: str, value: Any) -> Any:
        if not (isinstance(value, list) and any(isinstance(part, _Part) for part in value)):
            return value
        items = [item for part in value for item in part]
        if items == [None]:
            return None
        # A field that takes a text or a list of texts keeps a single text as it is.
        return items[0] if self.fields[key].takes_text and len(items) == 1 else items


def _take_config(given: list[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        namespace, rest = parser.parse_known_args(given)
    except argparse.ArgumentError:
        raise SettingsError("--config: expected one file name") from None
    return namespace.config, rest


def _printable(help_text: str) -> str:
    """argparse formats help by %: a lone one becomes %%, `%(prog)s` and %% stay."""
    return re.sub(r"%%|%(?!\(\w+\)[sdr])", "%%", help_text)


# --- converters of one token -----------------------------------------------------------------------------------------


def _checked(action: argparse.Action) -> Callable[[str], Any]:
    """The action's own converter, with an error that shows the value and what was expected."""
    convert: Any = action.type or str
    choices = list(action.choices or ())
    names = {int: "an integer", float: "a number", string_to_bool: "true or false"}
    expected = names.get(convert, getattr(convert, "__name__", str(convert)))

    def converted(text: str) -> Any:
        try:
            value = convert(text)
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(unknown("value", text, map(str, choices)))
        return value

    return converted


def _or_null(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == _NOTHING else convert(text)


def _items(one: Callable[[str], Any], commas: bool) -> Callable[[str], _Part]:
    """`a,b` (where `commas` separate) or the JSON list `["a", "b"]`, each item by the converter `one`."""

    def split(text: str) -> list[str]:
        if text.startswith("["):
            try:
                return [str(item) for item in json.loads(text)]
            except json.JSONDecodeError:
                pass
        return [item.strip() for item in text.split(",") if item.strip()] if commas else [text]

    return lambda text: _Part(one(item) for item in split(text))


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""expected a JSON mapping such as '{{"copies": 8}}', found {text!r}""")
    return value


def _mapping_or_text(text: str) -> dict[str, Any] | str:
    return _mapping(text) if text.lstrip().startswith("{") else text


def _plain_value(name: str, text: str) -> Any:
    """A dotted override's value, typed as it would be inside a YAML mapping: 8, 1e-2, true, null, [1, 2] or a text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise SettingsError(f"{name}: {text!r} is not a value that YAML can read; quotes may help") from None


def _merged(key: str, base: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    if base is not None and not isinstance(base, dict):
        raise SettingsError(f"--{key}.{next(iter(overrides))}: {key} is {base!r} here, not a mapping")
    merged: dict[str, Any] = dict(base or {})
    for path, value in overrides.items():
        *parents, last = path.split(".")
        inner = merged
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise SettingsError(f"--{key}.{path}: {parent} is {inner!r} here, not a mapping")
        inner[last] = value
    return merged


# --- the file --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One top-level entry of a settings file: its node, untyped as yet, and where it stands."""

    node: yaml.Node
    file: Path

    @property
    def place(self) -> str:
        return _place(self.file, self.node)

    def tokens(self, key: str, field: _Field) -> Iterator[str]:
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
            return _Loader("").construct_document(node)
        except yaml.YAMLError as error:
            raise _unreadable(self.file, error) from None
        except ValueError as error:  # !!int x
            raise SettingsError(f"{self.place}: cannot be read: {one_line(error)}") from None


def read_config(file: Path) -> dict[str, _Entry]:
    """The top-level entries of a YAML or JSON settings file, each key once."""
    if file.suffix not in SUFFIXES:
        raise SettingsError(f"--config {file}: expected a file that ends in {', '.join(SUFFIXES)}")
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise IsADirectoryError("it is not a file")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        present = sorted(other.name for other in file.parent.glob("*") if other.suffix in SUFFIXES)
        raise SettingsError(
            f"--config {file}: {unknown('file', file.name, present) if present else 'no such file'}"
        ) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"--config {file}: cannot be read as UTF-8 text ({error})") from None
    try:
        # JSON is YAML's flow style, but for tabs between its tokens.
        root = yaml.compose(text.expandtabs(1) if file.suffix == ".json" else text, Loader=_Loader)
        if root is None:
            return {}
        if not (isinstance(root, yaml.MappingNode) and all(isinstance(key, yaml.ScalarNode) for key, _ in root.value)):
            raise SettingsError(f"{_place(file, root)}: expected 'key: value' lines at the top level")
        _refuse_duplicates(root)
    except yaml.YAMLError as error:
        raise _unreadable(file, error) from None
    except RecursionError:
        raise SettingsError(f"{file}: cannot be read: it is nested more than {DEEPEST} deep") from None
    return {str(key.value): _Entry(value, file) for key, value in root.value}


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


class _Loader(yaml.SafeLoader):
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
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), None)
