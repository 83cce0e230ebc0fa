"""Every command line of README and docs is run in small, page by page, in a folder of its own, and has to succeed.

A line keeps its own options; what it leaves open is made small. The files, folders and Hub ids that it names are tiny
ones at just these places, so that a line finds what the one above it has left behind.
"""

from __future__ import annotations

import re
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metaxl_evo import demo
from metaxl_evo.cli import main
from metaxl_evo.training.parser import given_text
from tests.scripts.runs import FAMILY, argv, write_data, write_model
from tests.test_docs_commands import PAGES, ROOT, Command, commands, parsed
from tests.vision_tasks.models import write_classifier
from tests.vision_tasks.small import pack, random_images

pytestmark = pytest.mark.slow

STARTS = re.compile(r"(make|pip|python|metaxl-evo|accelerate|torchrun|tensorboard|trackio|sbatch|srun|exec|source) .+")
NOT_RUN = {  # lines -> why
    r"make .*|source .*": "an environment is made first; tests/test_docs.py knows the targets",
    r"pip install .*": "asks a registry; tests/test_package.py installs the wheel",
    r"python -m pytest .*": "tests of their own",
    r".* \.\.\.|python scripts/\.\.\.": "not a whole command",
    r"metaxl-evo (configs|study|run|ner|rank-sources|(weight|mix|schedule)-text|weight-tags)|accelerate launch": (
        "a command's name"
    ),
    r"python examples/watch_a_run\.py trackio": "tests/examples/test_examples.py",
    r"python -m metaxl_evo\.estimators\.table docs/estimators\.md": "tests/test_estimator_docs.py",
    r"tensorboard --logdir runs/watched|trackio show --project mine": "of other packages, and they stay open",
    r"accelerate launch .* --report_to trackio .*": "an extra that the tests' environment has not",
    r"accelerate launch --config_file configs/accelerate/(multi_gpu|fsdp2)\.yaml .*": "several GPUs",
    r"metaxl-evo study study\.yaml --output_dir /shared/study --engine ray": "tests/experiments/test_ray_engine.py",
}
FILE_OF_A_PAGE = re.compile(r"^```\w+\n# (\w+\.(?:py|yaml))\n(.*?)^```", re.DOTALL | re.MULTILINE)

SHORT: dict[str, Any] = {
    "max_steps": 1, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "report_to": "none",
    "load_best_model_at_end": "false", "meta_history": "false", "dataloader_num_workers": 0, "use_cpu": "true",
}  # fmt: skip
IMAGES = SHORT | {"seeds": 1, "per_device_train_batch_size": 4, "per_device_meta_batch_size": 4}
TASKS: dict[str, dict[str, Any]] = {
    "ner": SHORT | {"train_size": 24, "eval_size": 8, "max_length": 32, "target_languages": "sw"},
    "pos": SHORT | {"train_size": 24, "eval_size": 8, "max_length": 32, "target_languages": "sw"},
    "sentiment": SHORT | {"train_size": 24, "eval_size": 8, "max_length": 32, "target_languages": "sw"},
    "noisy_labels": IMAGES | {"train_size": 20, "meta_size": 10},
    "rotation": IMAGES | {"train_size": 20, "meta_size": 10},
    "hyper_cleaning": IMAGES | {
        "max_steps": 10, "train_size": 100, "validation_size": 50, "per_device_train_batch_size": 100,
    },
    "many_shot": SHORT | {
        "seeds": 1, "max_steps": 10, "episode_length": 10, "test_tasks": 2, "conv_channels": 2,
        "train_classes": 10, "validation_classes": 5, "test_classes": 5, "judge_images": 5, "test_images": 5,
    },
    "sinusoid": SHORT | {
        "seeds": 1, "max_steps": 5, "episode_length": 5, "meta_batch": 2, "test_tasks": 2, "hidden": 5,
    },
    "mix_text": SHORT | {"seeds": 0, "meta_size": 20, "train_size": 30, "test_size": 20},
    "weight_tags": SHORT | {"seeds": 1, "meta_size": 20, "train_size": 40, "eval_size": 30},
    "weight_text": SHORT | {"seeds": 1, "meta_size": 20, "train_size": 60, "eval_size": 40},
    "schedule_text": SHORT | {
        "seeds": 1, "max_steps": -1, "inner_steps": 10, "n_lr": 1, "trainings": 1, "retrain_steps": 1,
        "train_size": 40, "eval_size": 20,
    },
    "schedule": IMAGES | {
        "max_steps": -1, "backbone": "convnet", "inner_steps": 10, "n_lr": 1, "trainings": 1, "retrain_steps": 1,
        "train_size": 180,
    },
    "fewshot": SHORT | {
        "seeds": 1, "width": 2, "image_size": 16, "n_way": 2, "n_shot": 2, "n_query": 2, "test_n_query": 2,
        "test_episodes": 4, "aux_images": 4,
    },
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "compare_cosines": {"episode_length": 5, "meta_batch": 2},
    "evaluate": {"use_cpu": "true"},
    "predict": {"use_cpu": "true"},
    "rank-sources": {"use_cpu": "true"},
    "illustrate": {"grid": 5, "repetitions": 2, "iterations": 1},
    "benchmark": {
        "repeats": 1, "noise_draws": 2, "horizons": "1,2", "orders": "after_step", "rtn_layer": 1, "length": 8,
        "training.use_cpu": "true", "training.per_device_train_batch_size": 4,
        "training.per_device_meta_batch_size": 4, "model.vocab_size": 60,
        "model.hidden_size": 16, "model.intermediate_size": 16, "model.num_attention_heads": 2,
    },
}  # fmt: skip


def lines() -> list[tuple[str, str, Command | None]]:
    """Page, line without its comment, and the command that it holds."""
    return [
        (str(page.relative_to(ROOT)), " ".join(re.sub(r"\s#.*", "", line).split()), parsed(line))
        for page in PAGES
        for line in commands(page.read_text("utf-8"))
    ]


def excuses(line: str) -> list[str]:
    return [pattern for pattern in NOT_RUN if re.fullmatch(pattern, line)]


def same(command: Command) -> tuple[str, ...]:
    """What two lines share that say the same, but for the place of what is written."""
    words = re.sub(r"--output_dir \S+", "", " ".join(command.argv))
    return command.name, *re.sub(r"configs/\w+/(\w+)\.yaml", r"\1", words).split()


TO_RUN = {same(command): (page, command) for page, line, command in lines() if command and not excuses(line)}


def test_whatever_is_not_run_has_a_reason() -> None:
    """And each reason has its lines."""
    assert len(TO_RUN) >= 45
    left = {line for _, line, command in lines() if STARTS.fullmatch(line) and (command is None or excuses(line))}
    assert [line for line in left if len(excuses(line)) != 1] == []
    assert {pattern for line in left for pattern in excuses(line)} == NOT_RUN.keys()


def write_images(
    folder: Path, classes: int = 10, count: int = 4, channels: int = 1, seed: int = 0, name: str = "class"
) -> None:
    """CLASS/IMAGE."""
    images = random_images(classes * count, seed=seed, classes=classes, side=28, channels=channels)
    for number, (pixels, label) in enumerate(zip(images.images, images.labels, strict=True)):
        place = folder / f"{name}_{label:02d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.squeeze(pixels)).save(place / f"{number:03d}.png")


def write_sentences(folder: Path) -> None:
    """Of the languages that the pages name; all but the source are one."""
    made = write_data(folder / "made", ("aru", "beru"))
    copytree(made / "aru", folder / "en")
    for language in ("sw", "ig", "rw"):
        copytree(made / "beru", folder / language)


def write_parts_of_speech(folder: Path) -> None:
    """Two columns of the same sentences, all languages but the source one."""
    for language, drawn in (("en", "aru"), *((one, "beru") for one in ("ha", "ig", "rw", "sw"))):
        for split, rows in FAMILY.load(drawn).items():
            names = rows.features["upos"].feature.names
            lines = (
                "".join(f"{word}\t{names[tag]}\n" for word, tag in zip(row["tokens"], row["upos"], strict=True))
                for row in rows
            )
            place = folder / language / str(split)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("\n".join(lines), encoding="utf-8")


def write_texts(folder: Path) -> None:
    """Sentences with their labels, of which all languages but the source have one more."""
    for language, drawn in (("en", "aru"), *((one, "beru") for one in ("ha", "ig", "rw", "sw"))):
        (folder / language).mkdir(parents=True)
        for split, rows in FAMILY.load(drawn).items():
            lines = [f"{row['text']}\t{row['label']}\n" for row in rows] + ["a\tneutral\n"] * (language != "en")
            (folder / language / f"{split}.tsv").write_text("text\tlabel\n" + "".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages name and a user has, or the Hub."""
    root = tmp_path_factory.mktemp("named")
    for place in ("unimelb-nlp/wikiann", "WIKIANN", "DIR", "data"):
        write_sentences(root / place)
    for place in ("ud", "TREEBANKS"):
        write_parts_of_speech(root / place)
    write_texts(root / "TEXTS")
    (root / "BROWN").mkdir()
    for genre in ("science_fiction", "news", "romance", "mystery", "learned", "government"):
        text = "\n".join(f"{genre} sentence number {number}" for number in range(50))
        (root / f"BROWN/{genre}.txt").write_text(text, encoding="utf-8")
    for place in ("FacebookAI/xlm-roberta-base", "MODEL", "DIR"):
        write_model(root / place)
    (root / "FILE").write_text("Doru vakemi Tila .\n", encoding="utf-8")
    held = {part: random_images(180, seed=seed, classes=10, side=28) for seed, part in enumerate(("train", "test"))}
    arrays = {f"x_{part}": images.images[..., 0] for part, images in held.items()}
    arrays |= {f"y_{part}": images.labels for part, images in held.items()}
    for place in ("mnist.npz", "FILE.npz"):
        pack(root / place, **arrays)
    for seed, part in enumerate(("train", "test")):
        write_images(root / "ylecun/mnist" / part, count=16, seed=seed)
        write_images(root / "uoft-cs/cifar10" / part, channels=3, seed=seed)
        write_images(root / "PHOTOS" / part, classes=4, count=40, channels=3, seed=seed)
    write_classifier(root / "microsoft/resnet-18", "resnet")
    for domain in ("miniImagenet", "cars", "places", "plantae", "cub", "omniglot"):
        write_images(root / "DOMAINS" / domain, count=6)
    write_images(root / "DOMAINS/omniglot", count=6, name="letter", seed=1)  # 5-way tasks of three splits
    for domain in ("mnist_8k_2k", "cifar10_5k_1k", "fashion_mnist_8k_2k"):
        pack(root / f"DOMAINS/{domain}.npz")
    warm = {"config": "fewshot_pretrain_paper", "data": root / "DOMAINS", "output_dir": root / "WARM"}
    assert main(["fewshot", *argv(TASKS["fewshot"] | warm)]) == 0
    return root


def small(command: Command, free: Path) -> list[str]:
    """The options of a line and what makes it small; it writes to `free` where its place is left to the reader."""
    task = command.name.replace("-", "_")
    smaller = {"output_dir": free} | TASKS[task] if task in TASKS else OTHERS.get(command.name, {})
    given = [
        str(free) if before == "--output_dir" and word.isupper() else word
        for before, word in pairwise(["", *command.argv])
    ]
    if command.name == "compare_cosines":
        smaller = TASKS.get(given_text("task", given) or "", {}) | smaller
    if command.name == "study":
        smaller = TASKS.get(given_text("task", ["--config", *given], "study") or "", SHORT) | {"seeds": 0}
    if any("quickstart" in word for word in given):
        smaller = smaller | {"target_languages": "beru"}
    if any("peers" in word for word in given):  # two of its cases are of the size of real models
        smaller = smaller | {"cases": '{"weight net": {"problem": "weight_net", "batch_size": 4}}'}
    here = {"engine": "inline", "jobs": 1} if command.name == "study" else {}
    return [*given, *argv({key: value for key, value in smaller.items() if f"--{key}" not in given} | here)]


def exit_code(command: Command, options: list[str]) -> int:
    """Of the script that a line names, or of `metaxl-evo`."""
    if command.script is None:
        return main([command.name, *options])
    found = import_module(f"scripts.{command.script}").main(options)
    return int(isinstance(found, dict) and bool(found.get("problems")))


@pytest.mark.parametrize("page", sorted({page for page, _ in TO_RUN.values()}))
def test_the_commands_of_a_page(page: str, named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    monkeypatch.setattr(demo, "build_page", lambda taggers: SimpleNamespace(launch=lambda **of: None))
    for path in [*named.iterdir(), ROOT / "configs"]:
        Path(path.name).symlink_to(path)
    for name, content in FILE_OF_A_PAGE.findall((ROOT / page).read_text("utf-8")):
        Path(name).write_text(content, encoding="utf-8")
    for number, command in enumerate(command for at, command in TO_RUN.values() if at == page):
        assert exit_code(command, small(command, Path(f"free_{number}"))) == 0, command
