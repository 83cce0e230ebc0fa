"""Fingerprints of the data that a run is made of: the same rows have the same, wherever they are read from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from metaxl_evo.training.isolation import kept_random_state

LENGTH = 16  # hexadecimal digits
PLAIN = (str, bytes, bool, int, float, complex, np.generic, Path, type(None))


class _NoContent(TypeError):
    """Of a stream, a generator, a function."""


def fingerprints(data: Any) -> dict[str, str]:
    """The parts of a task's data -> the fingerprint of what stands in each; of what has no content to read, none.

    Parts are the fields of a dataclass, the entries of a mapping or the items of a tuple, and entries and fields of
    these: `test`, `sources.en`, `0`. A data set, an array and whatever else has a length is one part.
    """
    with kept_random_state():  # an item may be augmented where it is read
        parts = _parts(dict(enumerate(data)) if isinstance(data, tuple) else data)
        found = {name: _fingerprint(part) for name, part in parts}
    return {name: digest for name, digest in found.items() if digest is not None}


def _parts(data: Any, *names: str) -> Iterator[tuple[str, Any]]:
    if not _is_record(data):
        yield ".".join(names) or "all", data
        return
    for key, part in _fields(data).items():
        yield from _parts(part, *names, str(key))


def _is_record(value: Any) -> bool:
    """Whether it is made of named parts, and not itself a set of rows."""
    return isinstance(value, Mapping) or (not hasattr(value, "__len__") and bool(_fields(value)))


def _fields(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    return getattr(value, "__dict__", {})


def _fingerprint(part: Any) -> str | None:
    digest = hashlib.sha256()
    try:
        _read(part, digest)
    except Exception:  # of whatever a task's own data are made of, such as a cycle or rows that are not numbered
        return None
    return digest.hexdigest()[:LENGTH]


def _read(value: Any, digest: Any) -> None:
    """Feed all of a value, with what tells it from others of the same bytes, to a digest."""
    digest.update(f"{type(value).__name__}(".encode())
    if isinstance(value, PLAIN):
        digest.update(repr(value).encode())
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest.update(f"{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    elif isinstance(value, Dataset):
        for rows in value.with_format("arrow").iter(1000):
            digest.update(repr(rows.to_pydict()).encode())
    elif isinstance(value, Set):
        _read(sorted(map(repr, value)), digest)
    elif isinstance(value, Sequence | np.ndarray) or _is_rows(value):
        for item in (value[index] for index in range(len(value))):
            _read(item, digest)
    elif _is_record(value) or is_dataclass(value):
        for key, item in _fields(value).items():
            digest.update(f"{key}=".encode())
            _read(item, digest)
    else:
        raise _NoContent
    digest.update(b")")


def _is_rows(value: Any) -> bool:
    """Rows by number, as torch's map-style data sets have them."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not _is_record(value)
