"""Settings for a script: a YAML file first, the command line over it, one dataclass instance a type out of both.

    model_args, training_args = parse_arguments((ModelArguments, MetaTrainingArguments))

    train.py --config run.yaml --learning_rate 1e-4 --languages sw,ig,rw --estimator_kwargs.copies 8

A YAML entry becomes the command-line token that says the same, in front of the user's own. So both pass through the
same converters (`1e-4` is a float although YAML 1.1 calls it a string, the language `no` is not a boolean), and the
later one wins. An entry `base: FILE` takes the entries of another file, from the folder of this one, that it does not
have itself. Whatever is wrong with either raises `SettingsError`: one line with the place, the key and the way out.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, cast, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.cli import SettingsError
from metaxl_evo.training.converters import NOTHING, FieldKind, Part, checked, items, mapping, mapping_or_text, or_null
from metaxl_evo.training.settings_file import Entry, Loader, read_config
from metaxl_evo.training.shipped_configs import find_config
from metaxl_evo.training.short_help import HelpAll, short_help

Settings = TypeVar("Settings")


def parse_arguments(
    types: tuple[type, ...], argv: Sequence[str] | None = None, room: str | None = None
) -> tuple[Any, ...]:
    """An instance of each of `types`, from `--config FILE` and the options of `argv` (default: the process's own).

    Args:
        room: the folder of `configs/` in which a file that is named without a path is looked for first.
    """
    parser = _Parser(types)
    entries, given = _read(argv, room)
    tokens = _tokens(parser, entries)
    dotted, given = parser.take_dotted(given)
    settings = parser.settings(tokens, given, places={key: entry.place for key, entry in entries.items()})
    for key, overrides in dotted.items():
        settings[key] = _merged(key, settings.get(key, parser.fields[key].default), overrides)
    return tuple(
        make_settings(one, {name: settings[name] for name in settings if name in _names(one)}) for one in types
    )


def resolve_config(types: tuple[type, ...], argv: Sequence[str], room: str | None = None) -> list[str]:
    """The options that say the same without `--config FILE`: those of the file first."""
    entries, given = _read(argv, room)
    return [*_tokens(_Parser(types), entries), *given]


def given_text(key: str, argv: Sequence[str], room: str | None = None) -> str | None:
    """What `argv` or its settings file says of one setting, before it is known which others there are."""
    entries, given = _read(argv, room)
    text, _ = _take(key, given)
    return str(entries[key].node.value) if text is None and key in entries else text


def _read(argv: Sequence[str] | None, room: str | None) -> tuple[dict[str, Entry], list[str]]:
    """The entries of the settings file, and the other options."""
    config_file, given = _take("config", list(sys.argv[1:] if argv is None else argv))
    return read_config(find_config(config_file, room)) if config_file is not None else {}, given


def _tokens(parser: _Parser, entries: Mapping[str, Entry]) -> list[str]:
    for key, entry in entries.items():
        if key not in parser.fields:
            raise SettingsError(f"{entry.place}: {unknown('key', key, parser.fields)}")
    return [token for key, entry in entries.items() for token in entry.tokens(key, parser.fields[key])]


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
        tokens += Entry.of(values[key]).tokens(key, parser.fields[key])
    return dict.fromkeys(nothing) | parser.settings(tokens, [], places={})


def make_settings(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """An instance of a settings dataclass, whose own check may be a library's.

    Raises:
        ValueError: whatever the check raised, as one line that names the setting to blame.
    """
    try:
        return cls(**values)
    except Exception as error:
        text = one_line(error)
        if isinstance(error, ValueError) and any(name in text for name in values):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise SettingsError(f"{_blamed(cls, values, error)}: cannot be used ({kind}{text})") from error


def _blamed(cls: Any, values: Mapping[str, Any], error: Exception) -> str:
    """The setting that was read last before this error, where the error does not come without it; else the class."""
    read = [""]

    def reading(self: Any, name: str) -> Any:
        if name in values:
            read.append(name)
        return cls.__getattribute__(self, name)

    _complaint(type(cls.__name__, (cls,), {"__getattribute__": reading}), values)
    others = {name: value for name, value in values.items() if name != read[-1]}
    return cls.__name__ if _complaint(cls, others) == repr(error) else read[-1]


def _complaint(cls: type, values: Mapping[str, Any]) -> str | None:
    try:
        cls(**values)
    except Exception as error:
        return repr(error)
    return None


def _names(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls) if field.init}


# --- the parser ------------------------------------------------------------------------------------------------------


class _Parser(HfArgumentParser):
    """HfArgumentParser with full option names only, comma lists, JSON mappings, and one-line errors that name the key.

    Options that are not given stay out of the result, so that defaults come from the dataclasses and nowhere else."""

    def __init__(self, types: tuple[type, ...]) -> None:
        super().__init__(cast(Any, types), allow_abbrev=False, exit_on_error=False)
        self.types, self.fields = types, dict[str, FieldKind]()
        for one in types:
            hints = get_type_hints(one)
            self.fields |= {f.name: FieldKind.of(f, hints[f.name]) for f in dataclasses.fields(one) if f.init}
        for action in self._actions:
            if action.dest in self.fields:
                self._refine(action, self.fields[action.dest])
        self.add_argument(
            "--config", metavar="FILE", help="YAML or JSON file of settings; options given here win over it"
        )
        self.add_argument("--help_all", action=HelpAll, dest=argparse.SUPPRESS, default=argparse.SUPPRESS)

    def print_help(self, file: Any = None) -> None:
        actions = {action.dest: action for action in reversed(self._actions)}  # of --x and --no_x the first
        self._print_message(short_help(self.types, actions), file or sys.stdout)

    def _refine(self, action: argparse.Action, field: FieldKind) -> None:
        default = "" if action.default is None or action.required else f" (default: {action.default})"
        action.help = _printable((action.help or "") + default)
        action.default = argparse.SUPPRESS
        if action.nargs == 0:  # the --no_x of a boolean takes no value
            return
        one: Callable[[str], Any] = checked(action)
        if field.takes_mapping:
            one = mapping_or_text if field.takes_text else mapping
        if field.default is None and not action.required:
            one = or_null(one)
        if field.takes_mapping:
            action.type = one
        elif field.takes_list:
            action.type, action.nargs, action.choices = items(one, commas=not field.takes_text), "+", None
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
                token = (f"{name}={NOTHING}" if equals else NOTHING) if nothing else token
            yield token
            before = token

    def _whole(self, key: str, value: Any) -> Any:
        if not (isinstance(value, list) and any(isinstance(part, Part) for part in value)):
            return value
        joined = [item for part in value for item in part]
        if joined == [None]:
            return None
        # A field that takes a text or a list of texts keeps a single text as it is.
        return joined[0] if self.fields[key].takes_text and len(joined) == 1 else joined


def _take(key: str, given: list[str]) -> tuple[str | None, list[str]]:
    """The text of one option, and the other tokens."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{key}", dest="text")
    try:
        namespace, rest = parser.parse_known_args(given)
    except argparse.ArgumentError:
        raise SettingsError(f"--{key}: expected one value") from None
    return namespace.text, rest


def _printable(help_text: str) -> str:
    """argparse formats help by %: a lone one becomes %%, `%(prog)s` and %% stay."""
    return re.sub(r"%%|%(?!\(\w+\)[sdr])", "%%", help_text)


# --- dotted overrides ------------------------------------------------------------------------------------------------


def _plain_value(name: str, text: str) -> Any:
    """A dotted override's value, typed as it would be inside a YAML mapping: 8, 1e-2, true, null, [1, 2] or a text."""
    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader  # nosec B506
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
