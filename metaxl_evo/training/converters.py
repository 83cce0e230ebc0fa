"""From the text of one command-line token to the value of a setting, by what its field takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from transformers.hf_argparser import string_to_bool

from metaxl_evo.messages import unknown

NOTHING = "\0"  # in place of null on a command line


@dataclasses.dataclass(frozen=True)
class FieldKind:
    """What the command line must know of one dataclass field beyond its `argparse` action."""

    takes_text: bool
    takes_list: bool
    takes_mapping: bool
    default: Any

    @classmethod
    def of(cls, field: dataclasses.Field[Any], hint: Any) -> FieldKind:
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


class Part(list[Any]):
    """The items of one token of a list-valued option: two in `sw,ig`, one in `sw`."""


def checked(action: argparse.Action) -> Callable[[str], Any]:
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


def or_null(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == NOTHING else convert(text)


def items(one: Callable[[str], Any], commas: bool) -> Callable[[str], Part]:
    """`a,b` (where `commas` separate) or the JSON list `["a", "b"]`, each item by the converter `one`."""

    def split(text: str) -> list[str]:
        if text.startswith("["):
            try:
                return [str(item) for item in json.loads(text)]
            except json.JSONDecodeError:
                pass
        return [item.strip() for item in text.split(",") if item.strip()] if commas else [text]

    return lambda text: Part(one(item) for item in split(text))


def mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""expected a JSON mapping such as '{{"copies": 8}}', found {text!r}""")
    return value


def mapping_or_text(text: str) -> dict[str, Any] | str:
    return mapping(text) if text.lstrip().startswith("{") else text
