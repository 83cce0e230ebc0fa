"""Reading domains: packed arrays, image folders, Omniglot's zip files, Hub data sets, and generated images.

A domain is named by one text, `SOURCE` or `SOURCE?option=value&option=value`:

| SOURCE | what |
|---|---|
| `synthetic:LOOK` | drawn symbols, nothing is downloaded; LOOK is one of LOOKS |
| `FILE.npz` | `x_train y_train x_test y_test`, all their images together |
| `FILE.zip`, or a folder of them | Omniglot: ALPHABET/CHARACTER/*.png, a class a character |
| another folder | CLASS/IMAGE, or {base,val,novel}/CLASS/IMAGE; train and test are other names of base and novel |
| anything else | a data set of the Hub, its splits together |

| option | what |
|---|---|
| `name` | in messages and results; by default that of the source |
| `classes` | `interleaved` (the benchmark's split, the default) or `whole` (every class in every split) |
| `images_per_class` | the first ones by name |
| `largest_classes` | only that many |
| `alphabets` | of Omniglot, with commas between |
| `config` | of a Hub data set that has several |
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from datasets import ClassLabel, concatenate_datasets

from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.hub import Instead, load_from_hub, require_reachable
from vision_tasks.fewshot_episodes import SPLITS, Domain, interleaved, whole
from vision_tasks.image_files import EncodedImages, TableImages, class_files, subfolders
from vision_tasks.image_sources import IMAGE_COLUMNS, LABEL_COLUMNS, read_npz
from vision_tasks.symbols import LOOKS, draw_symbols

SYNTHETIC = "synthetic:"
CLASS_SPLITS: dict[str, Callable[[int], dict[str, tuple[int, ...]]]] = {"interleaved": interleaved, "whole": whole}
SPLIT_FOLDERS = (SPLITS, ("train", "val", "test"))
INSTEAD = Instead("an image folder or an .npz file", "CIFAR-100: uoft-cs/cifar100")


@dataclass(frozen=True)
class Options:
    """What may follow the `?` of a source."""

    name: str | None = None
    classes: str = "interleaved"
    images_per_class: int | None = None
    largest_classes: int | None = None
    alphabets: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        if self.classes not in CLASS_SPLITS:
            raise ValueError(unknown("classes", self.classes, CLASS_SPLITS))
        for number in ("images_per_class", "largest_classes"):
            if getattr(self, number) is not None and getattr(self, number) < 1:
                raise ValueError(f"{number} must be at least 1, got {getattr(self, number)}")


@dataclass
class Raw:
    """Images as they were found: `images[i]` is of class `names[labels[i]]`; `splits` are those of folders."""

    images: Any
    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    splits: dict[str, tuple[int, ...]] | None = None


def read_domain(text: str) -> Domain:
    """The domain that a text names (see above), all of whose images can be decoded.

    Raises:
        ValueError: in one line, where it cannot be read or is not what it should be.
        OSError: the same, for what is neither a path nor a Hub id that can be reached.
    """
    source, options = parse_source(text)
    raw = _read(source, options)
    if not len(raw.labels):
        raise ValueError(f"{source} has no images")
    domain = _made(name_of(text), raw, options)
    for _ in domain.images:  # decodes each: none may turn out damaged when training is over
        pass
    return domain


def located_domains(data: str, named: Sequence[str]) -> list[str]:
    """The texts of domains as `read_domain` takes them: relative paths begin in the folder `data`.

    Raises:
        ValueError: for a path that there is not, or more domains than can be generated (`data: synthetic`).
    """
    if data == SYNTHETIC.removesuffix(":"):
        if len(named) > len(LOOKS):
            raise ValueError(
                f"data: {data} has {len(LOOKS)} domains, {len(named)} are asked for: name fewer, or give the "
                "folder of real ones"
            )
        return [f"{SYNTHETIC}{look}" for look in LOOKS][: len(named)]
    folder = Path(data).expanduser()
    if not folder.is_dir():
        generated = SYNTHETIC.removesuffix(":")
        raise ValueError(f"data must be {generated} or the folder where the domains are, {data} is neither")
    return [_located(text, folder) for text in named]


def _located(text: str, folder: Path) -> str:
    source, _ = parse_source(text)
    if source.startswith(SYNTHETIC) or Path(source).is_absolute():
        return text
    if (folder / source).exists():
        return f"{folder / source}{text.removeprefix(source)}"
    if source.count("/") == 1 and not source.startswith(".") and not Path(source).suffix:
        return text  # a Hub id
    present = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    raise ValueError(f"{folder}: {unknown('domain', source, present)} (or ORGANISATION/NAME of the Hub)")


def name_of(text: str) -> str:
    """The name of the domain that a text names."""
    source, options = parse_source(text)
    if options.name is not None:
        return options.name
    return source.removeprefix(SYNTHETIC).rstrip("/").rsplit("/", 1)[-1].removesuffix(".npz").removesuffix(".zip")


def parse_source(text: str) -> tuple[str, Options]:
    """The source, and its options."""
    source, _, query = text.partition("?")
    numbers = {one.name for one in fields(Options) if "int" in str(one.type)}
    settings: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in (valid := [one.name for one in fields(Options)]):
            raise ValueError(f"{text}: {unknown('option', key, valid)}")
        if key in numbers and not value.isdecimal():
            raise ValueError(f"{text}: {key} must be a whole number, got {value!r}")
        settings[key] = int(value) if key in numbers else value
    try:
        return source, Options(**settings)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None


def _read(source: str, options: Options) -> Raw:
    path = Path(source)
    if source.startswith(SYNTHETIC):
        return _synthetic(source.removeprefix(SYNTHETIC))
    if path.suffix == ".npz":
        return _packed(path)
    archives = [path] if path.suffix == ".zip" else sorted(path.glob("*.zip")) if path.is_dir() else []
    if archives:
        return _omniglot(archives, options.alphabets)
    if path.is_dir():
        return _folder(path)
    if source.startswith((".", "/")) or source.count("/") > 1:
        raise ValueError(f"{source} does not exist: give an image folder, an .npz file or a Hub id")
    return _hub(source, options.config)


def _made(name: str, raw: Raw, options: Options) -> Domain:
    """The domain of what was found, as far as the options want it."""
    labels = np.asarray(raw.labels, dtype=np.int64)
    kept = _largest(labels, raw.names, options.largest_classes)
    places: list[int] = []
    for label in kept:
        places += np.flatnonzero(labels == label)[: options.images_per_class].tolist()
    number = {label: position for position, label in enumerate(kept)}
    if raw.splits is None:
        splits = CLASS_SPLITS[options.classes](len(kept))
    elif options.classes == "whole":
        splits = whole(len(kept))
    else:
        splits = {split: tuple(number[c] for c in held if c in number) for split, held in raw.splits.items()}
    return Domain(
        name,
        _Chosen(raw.images, places),
        np.asarray([number[int(labels[place])] for place in places], dtype=np.int64),
        tuple(raw.names[label] for label in kept),
        splits,
    )


def _largest(labels: np.ndarray, names: Sequence[str], how_many: int | None) -> list[int]:
    """The classes with most images (the first by name among equals), in their order."""
    sizes = Counter(labels.tolist())
    by_size = sorted(range(len(names)), key=lambda label: (-sizes[label], label))
    return sorted(by_size[:how_many])


@dataclass(frozen=True, eq=False)
class _Chosen(Sequence[Any]):
    """Some of the images."""

    images: Any
    places: list[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.images[self.places[index]]


# Packed arrays


def _packed(path: Path) -> Raw:
    parts = list(read_npz(path).values())
    shapes = {part.images.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"{path}: the images of x_train and x_test differ in shape: {sorted(shapes)}")
    labels = np.concatenate([part.labels for part in parts])
    return Raw(np.concatenate([part.images for part in parts]), labels.tolist(), list(parts[0].names))


# Image files


def _folder(path: Path) -> Raw:
    """CLASS/IMAGE, or {base,val,novel}/CLASS/IMAGE; everything in sorted order."""
    tops = {top.name for top in subfolders(path)}
    given = next((names for names in SPLIT_FOLDERS if tops and tops <= set(names)), None)
    if given is None:
        held = {"": class_files(path)}
    else:
        held = {split: class_files(path / name) for split, name in zip(SPLITS, given, strict=True) if name in tops}
    raw, sources, splits = Raw(None), list[Path](), dict[str, tuple[int, ...]]()
    for split, classes in held.items():
        splits[split] = tuple(range(len(raw.names), len(raw.names) + len(classes)))
        for number, files in zip(splits[split], classes.values(), strict=True):
            raw.labels += [number] * len(files)
            sources += files
        raw.names += classes
    if not sources:
        raise ValueError(f"{path} has no folder of images: it should hold CLASS/IMAGE or base/CLASS/IMAGE")
    if given not in (None, SPLITS):
        _require_different_classes(path, raw.names, tops)
    raw.images = EncodedImages(sources, [str(file) for file in sources])
    raw.splits = splits if given else None
    return raw


def _require_different_classes(path: Path, names: Sequence[str], folders: Collection[str]) -> None:
    """Refuse folders train, val and test of the same classes, which are no splits of few-shot learning."""
    double = [name for name, count in Counter(names).items() if count > 1]
    if double:
        raise ValueError(
            f"{path}: class {double[0]!r} is in several of {', '.join(sorted(folders))}, and few-shot tests are of "
            "other classes than training: name one of these folders as the domain"
        )


def _omniglot(archives: Sequence[Path], alphabets: str | None) -> Raw:
    """A class a character; one that is in several archives counts once."""
    found: dict[str, dict[str, bytes]] = {}
    for archive in archives:
        for character, files in _characters(archive).items():
            found.setdefault(character, files)
    held = sorted({_alphabet(character) for character in found})
    wanted = held if alphabets is None else alphabets.split(",")
    for alphabet in wanted:
        if alphabet not in held:
            raise ValueError(unknown("alphabet", alphabet, held))
    raw, sources, names = Raw(None), list[Path | bytes](), list[str]()
    for character in sorted(one for one in found if _alphabet(one) in wanted):
        names += found[character]
        sources += found[character].values()
        raw.labels += [len(raw.names)] * len(found[character])
        raw.names.append(character)
    raw.images = EncodedImages(sources, names)
    return raw


def _alphabet(character: str) -> str:
    return character.split("/")[0]


def _characters(archive: Path) -> dict[str, dict[str, bytes]]:
    """The image files of each `ALPHABET/CHARACTER` of one archive, sorted, by name."""
    found: dict[str, dict[str, bytes]] = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            for file in sorted(opened.namelist()):
                parts = file.split("/")
                hidden = "__MACOSX" in parts or parts[-1].startswith(".")
                if len(parts) > 2 and file.lower().endswith(".png") and not hidden:
                    found.setdefault("/".join(parts[-3:-1]), {})[f"{archive}:{file}"] = opened.read(file)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive} cannot be read as a zip file ({one_line(error)})") from error
    if not found:
        raise ValueError(f"{archive} holds no ALPHABET/CHARACTER/*.png")
    return found


# The Hub


def _hub(source: str, config: str | None) -> Raw:
    require_reachable(source, INSTEAD)
    held = load_from_hub(source, config, instead=INSTEAD)
    rows = concatenate_datasets(list(held.values()))
    image, label = (_column(source, rows.column_names, names) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
    values, feature = list(rows[label]), rows.features[label]
    if isinstance(feature, ClassLabel):
        return Raw(TableImages(rows, image, source), values, list(feature.names))
    names = sorted(set(values))
    number = {name: place for place, name in enumerate(names)}
    return Raw(TableImages(rows, image, source), [number[value] for value in values], [str(name) for name in names])


def _column(source: str, columns: Sequence[str], known: Sequence[str]) -> str:
    for name in known:
        if name in columns:
            return name
    raise ValueError(f"{source} has no column {' or '.join(known)}: it has {', '.join(columns)}")


# Generated images


def _synthetic(look: str) -> Raw:
    if look not in LOOKS:
        raise ValueError(unknown("look", look, LOOKS))
    images, labels = draw_symbols(look)
    return Raw(images, labels.tolist(), [f"symbol{number:02}" for number in range(labels.max() + 1)])
