"""The folder of a run by the script of every task: foreign, held, told to stop, killed near its end, of other data.

What is resumed ends as a run that nobody disturbed, up to the bits; what is refused has changed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest

from metaxl_evo.cli import main as metaxl_evo
from metaxl_evo.experiments.folders import RESULTS
from metaxl_evo.experiments.run_folder import HOLDER, MARK, PASSING, State, state_of
from metaxl_evo.training.checkpoint import require_whole
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.weighting.drawn import (
    CLASSES as TEXT_CLASSES,
)
from metaxl_evo.weighting.drawn import (
    draw_classifier,
    draw_documents,
    draw_language_model,
    draw_sentences,
)
from scripts.train_fewshot import main as train_fewshot
from scripts.train_hyper_cleaning import main as train_hyper_cleaning
from scripts.train_ner import main as train_ner
from scripts.train_noisy_labels import main as train_noisy_labels
from scripts.train_rotation import main as train_rotation
from scripts.train_schedule import main as train_schedule
from tests.experiments.test_life import contents, left_by, unlike
from tests.processes import FORKSERVER
from tests.scripts.refusals import assert_is_one_line, assert_refused
from tests.scripts.runs import argv, text_of, write_data, write_model
from tests.vision_tasks.small import pack, random_images
from vision_tasks.images import ImageSet

FORK = multiprocessing.get_context("fork")
TEST_OF_NER, TEST_OF_TEXTS, IMAGES = "family/beru/test", "texts/test.csv", "images.npz"
DOMAINS_OF_TEXT = ("twos", "fives")
TRAINING = {"max_steps": 4, "learning_rate": 1e-2, "use_cpu": "true", "disable_tqdm": "true", "report_to": "none"}
SAVED = {"logging_steps": 1, "meta_history": "false", "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
RUN = TRAINING | SAVED | {"push_to_hub": "true", "hub_model_id": "me/run", "hub_strategy": "end"}
BATCHES: dict[str, Any] = dict.fromkeys((f"per_device_{part}_batch_size" for part in ("train", "meta", "eval")), 8)


@dataclass(frozen=True)
class Script:
    """What a command line runs: its own settings; those that name files below the folder of the data; a user's file
    that it would overwrite."""

    main: Callable[[Sequence[str]], Any]
    settings: Mapping[str, Any]
    places: Mapping[str, str] = field(default_factory=lambda: {"data": IMAGES})
    sign: str = "config.json"
    words: tuple[str, ...] = ()
    further: tuple[int, ...] = ()  # steps of a training behind the one that is resumed


DOMAINS = {"domains": '["images.npz?classes=whole", "synthetic:chalk"]', "aux_domain": "images", "image_size": 16}
EPISODES = {"n_way": 3, "n_shot": 1, "n_query": 1, "test_n_query": 2, "test_episodes": 2, "episodes_per_epoch": 3}
FEW_SHOT = DOMAINS | EPISODES | {"width": 2, "aux_images": 4}
ROTATION = BATCHES | {"backbone": "convnet", "meta_size": 10, "degrees": 90}
NOISY = BATCHES | {"backbone": "convnet", "meta_size": 10, "noise_rate": 0.3, "method": "meta_weight_net"}
SCHEDULE = BATCHES | {
    "backbone": "convnet", "inner_steps": 2, "outer_steps": 2, "n_lr": 2, "retrain_steps": 1, "max_steps": -1
}  # fmt: skip
NER = BATCHES | {"source_languages": "aru", "target_languages": "beru", "max_length": 64, "eval_max_length": 64}
TASK = {"episode_length": 4, "episode_reset": "reptile", "optimizer_class": "SGD", "max_grad_norm": 0}
CLASSES = {"train_classes": 4, "validation_classes": 3, "test_classes": 3, "n_way": 2, "domains": '["images.npz"]'}
NET = {"image_size": 8, "conv_layers": 2, "conv_channels": 2, "batch_images": 4, "test_images": 4}
TASKS = {"meta_batch": 2, "test_tasks": 3, "validation_tasks": 2, "lr_scheduler_type": "constant"}
MANY_SHOT = TASK | CLASSES | NET | TASKS
SINUSOID = TASK | TASKS | {"shots": 3, "test_points": 4, "hidden": 5}
TEXTS = BATCHES | {"train_size": 40, "eval_size": 20, "meta_size": 20}
MIXED = BATCHES | {"target": "twos", "domains": "twos,fives", "train_size": 30, "meta_size": 20, "test_size": 20}
OF_TEXTS = {"data": "texts", "model_name_or_path": "classifier"}
SCHEDULE_TEXT = BATCHES | {
    "train_size": 40, "eval_size": 20, "inner_steps": 2, "outer_steps": 2, "n_lr": 2, "retrain_steps": 1,
    "validation_share": 0.2, "max_grad_norm": 0, "max_steps": -1,
}  # fmt: skip
SCRIPTS = {
    "many_shot": Script(metaxl_evo, MANY_SHOT, {"data": "."}, "start", words=("many-shot",)),
    "sinusoid": Script(metaxl_evo, SINUSOID, {}, "start", words=("sinusoid",)),
    "weight_text": Script(metaxl_evo, TEXTS, OF_TEXTS, "weights.csv", words=("weight-text",)),
    "weight_tags": Script(
        metaxl_evo,
        TEXTS | {"language": "beru", "meta_size": 6, "max_length": 64},
        {"dataset": "family", "model_name_or_path": "model"},
        "weights.csv",
        words=("weight-tags",),
    ),
    "mix_text": Script(
        metaxl_evo,
        MIXED,
        {"data": "domains", "model_name_or_path": "language_model"},
        "mixture.csv",
        words=("mix-text",),
    ),
    "schedule_text": Script(
        metaxl_evo, SCHEDULE_TEXT, OF_TEXTS, "schedule.json", words=("schedule-text",), further=(0,)
    ),
    "ner": Script(train_ner, NER, {"dataset": "family", "model_name_or_path": "model"}, "rtn"),
    "noisy_labels": Script(train_noisy_labels, NOISY, sign="weight_net"),
    "rotation": Script(train_rotation, ROTATION, sign="rotation"),
    "fewshot": Script(train_fewshot, FEW_SHOT, {"data": "."}, "feature_transform"),
    "hyper_cleaning": Script(train_hyper_cleaning, BATCHES | {"train_size": 60}, sign="weights.png"),
    "schedule": Script(train_schedule, SCHEDULE, sign="schedule.json", further=(0,)),
}
STUDY = ("study", "{data}/study.yaml", "--engine", "inline", "--seeds", "0")
WITH_STUDY = SCRIPTS | {"study": Script(metaxl_evo, ROTATION, words=STUDY)}


def options(script: Script, data: Path, out: Path, resume: bool = False) -> list[str]:
    places = {name: data / place for name, place in script.places.items()} | {"output_dir": out}
    going_on = {"resume_from_checkpoint": "latest"} if resume else {}
    return [
        *(word.format(data=data) for word in script.words),
        *argv({**RUN, **script.settings, **places, **going_on}),
    ]


class Hub:
    """Takes all that is uploaded."""

    uploads: ClassVar[list[Path]] = []

    def __init__(self, *of: Any, **named: Any):
        pass

    def create_repo(self, repo_id: str, **named: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path: Path, **named: Any) -> None:
        self.uploads.append(folder_path)


def prepare(patch: pytest.MonkeyPatch) -> None:
    """A Hub on this machine, and no pictures, which take half a second."""
    patch.setattr("transformers.trainer.hf_api", Hub)
    patch.setattr("metaxl_evo.experiments.run.HfApi", Hub)
    patch.setattr("metaxl_evo.experiments.run.find_spec", lambda name: None)


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that this process makes, by the number that were made before."""
    prepare(monkeypatch)
    monkeypatch.setattr(Hub, "uploads", [])
    made: list[int] = []
    monkeypatch.setattr(MetaTrainer, "training_step", before_step(lambda number: made.append(number)))
    return made


def before_step(act: Callable[[int], Any]) -> Callable[..., Any]:
    """A training step before which something happens."""
    step = MetaTrainer.training_step

    def training_step(self: MetaTrainer, *args: Any, **named: Any) -> Any:
        act(self.state.global_step)
        return step(self, *args, **named)

    return training_step


# Processes that something happens to

Event = Callable[[Path], None]  # takes the folder of the run


def be_told(out: Path) -> None:
    """In the third step."""
    MetaTrainer.training_step = before_step(lambda number: number == 2 and os.kill(os.getpid(), signal.SIGTERM))


def wait(out: Path) -> None:
    """In the third step, for a sign."""

    def until_told(number: int) -> None:
        if number == 2:
            sign_of(out, "waits").touch()
            wait_for(sign_of(out, "goes on"))

    MetaTrainer.training_step = before_step(until_told)


def sign_of(out: Path, word: str) -> Path:
    return out.with_name(word)


def wait_for(file: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < until, file
        time.sleep(0.02)


def die(*of: Any, **named: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_the_card(out: Path) -> None:
    MetaTrainer.create_model_card = die


def die_at_the_upload(out: Path) -> None:
    Hub.upload_folder = die


class Ended(NamedTuple):
    """The exit code of a process, and what it said."""

    code: int
    said: str


class Nursery:
    """A process that has imported all scripts, and whose forks run them."""

    def __init__(self, log: Path):
        self._log = log
        self._pipe, theirs = FORKSERVER.Pipe()
        self._process = FORKSERVER.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def begin(self, name: str, given: Sequence[str], out: Path, event: Event) -> None:
        self._pipe.send((name, given, out, event, self._log))

    def ended(self) -> Ended:
        assert self._pipe.poll(120)
        return Ended(self._pipe.recv(), self._log.read_text(encoding="utf-8"))

    def run(self, name: str, given: Sequence[str], out: Path, event: Event) -> Ended:
        self.begin(name, given, out, event)
        return self.ended()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve(pipe: Connection) -> None:
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        for job in iter(pipe.recv, None):
            child = FORK.Process(target=_run, args=job)
            child.start()
            child.join()
            pipe.send(child.exitcode)


def _run(name: str, given: Sequence[str], out: Path, event: Event, log: Path) -> None:
    with log.open("w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    event(out)
    WITH_STUDY[name].main(given)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("said") / "stderr")
    yield made
    made.close()


# Runs that nobody disturbs


def pack_images(file: Path, test: ImageSet) -> None:
    train = random_images(120, seed=1, classes=10)
    pack(file, x_train=train.images[..., 0], y_train=train.labels, x_test=test.images[..., 0])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the scripts read."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "family")
    write_model(folder / "model")
    pack_images(folder / IMAGES, random_images(20, seed=2))
    (folder / "texts").mkdir()
    draw_sentences(60, seed=1).to_csv(folder / "texts/train.csv", index=False)
    of_other_sentences(folder / TEST_OF_TEXTS, seed=2)
    (folder / "domains").mkdir()
    for domain in DOMAINS_OF_TEXT:
        of_other_documents(folder / f"domains/{domain}.txt", seed=2)
    for name, parts in (("classifier", draw_classifier(TEXT_CLASSES)), ("language_model", draw_language_model())):
        for part in parts:
            part.save_pretrained(folder / name)
    (folder / "study.yaml").write_text("task: rotation", encoding="utf-8")
    return folder


class Operation(NamedTuple):
    """A file or folder that is synced, or a file that is renamed to `path`, from `source`."""

    path: Path
    source: Path | None = None


@contextmanager
def recorded() -> Iterator[list[Operation]]:
    """What is synced and renamed inside, in order."""
    found: list[Operation] = []
    opened: dict[int, Path] = {}
    open_, fsync, replace = os.open, os.fsync, os.replace

    def open_noted(path: Any, *of: Any, **named: Any) -> int:
        number = open_(path, *of, **named)
        opened[number] = Path(os.fsdecode(path))
        return number

    def fsync_noted(number: int) -> None:
        fsync(number)
        found.append(Operation(opened[number]))

    def replace_noted(source: Any, path: Any, **named: Any) -> None:
        replace(source, path, **named)
        found.append(Operation(Path(path), Path(source)))

    with pytest.MonkeyPatch.context() as patch:
        for name, noted in (("open", open_noted), ("fsync", fsync_noted), ("replace", replace_noted)):
            patch.setattr(os, name, noted)
        yield found


class Whole(NamedTuple):
    """The folder of a run, what is the same of any such run, and what was synced and renamed for it."""

    folder: Path
    left: dict[str, Any]
    operations: list[Operation]


def run_in(out: Path) -> Path:
    """The folder of the one run below."""
    (mark,) = out.rglob(MARK)
    return mark.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[str], Whole]:
    made: dict[str, Whole] = {}

    def of(name: str) -> Whole:
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "run"
            with recorded() as operations:
                WITH_STUDY[name].main(options(WITH_STUDY[name], data, out))
            made[name] = Whole(run_in(out), left_by(run_in(out)), operations)
        return made[name]

    return of


each_script = pytest.mark.parametrize("name", SCRIPTS)


# What is there before


@each_script
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_the_users_is_refused(tmp_path: Path, data: Path, name: str, resume: bool) -> None:
    script, out = SCRIPTS[name], tmp_path / "run"
    out.mkdir()
    (out / script.sign).write_text("mine", encoding="utf-8")
    line = f"run holds {script.sign}, and no run to resume: choose another output_dir"
    assert_refused(script.main, options(script, data, out, resume), line, out)


@contextmanager
def edited(file: Path, edit: Callable[[Path], Any]) -> Iterator[None]:
    before = file.read_bytes()
    try:
        edit(file)
        yield
    finally:
        file.write_bytes(before)


def of_dev(file: Path) -> None:
    file.write_text(text_of("beru", "dev"), encoding="utf-8")


def of_other_pixels(file: Path) -> None:
    pack_images(file, random_images(20, seed=5))


def of_other_sentences(file: Path, seed: int = 5) -> None:
    draw_sentences(20, seed).to_csv(file, index=False)


def of_other_documents(file: Path, seed: int = 5) -> None:
    file.write_text("\n".join(draw_documents(file.stem, 80, seed)["text"][:]), encoding="utf-8")


EDITS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "ner": (TEST_OF_NER, of_dev),
    "weight_tags": (TEST_OF_NER, of_dev),
    "weight_text": (TEST_OF_TEXTS, of_other_sentences),
    "schedule_text": (TEST_OF_TEXTS, of_other_sentences),
    "mix_text": ("domains/twos.txt", of_other_documents),
}


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "sinusoid"])  # whose data are its settings
def test_changed_data_are_refused(
    tmp_path: Path, data: Path, whole: Callable[[str], Whole], steps: list[int], name: str
) -> None:
    """By the results of a finished run, and by the mark of one that was cut off."""
    script, out = SCRIPTS[name], whole(name).folder
    file, edit = EDITS.get(name, (IMAGES, of_other_pixels))
    steps.clear()
    with edited(data / file, edit):
        for kept in (RESULTS, MARK):
            copy = tmp_path / kept / "run"
            copy.mkdir(parents=True)
            for one in (file for file in out.iterdir() if file.name in (kept, MARK, "model.safetensors")):
                (copy / one.name).write_bytes(one.read_bytes())
            place = kept if kept == RESULTS else "run"
            line = rf"{place} was made with another [\w., ]+ data: give the data of that run"
            assert_refused(script.main, options(script, data, copy, resume=True), line, copy)
    assert steps == []


# What happens while it is made


@each_script
def test_it_is_on_the_disk_before_it_is_finished(whole: Callable[[str], Whole], name: str) -> None:
    """And its results before it is uploaded."""
    folder, _, operations = whole(name)
    taken = {one.path: number for number, one in enumerate(operations) if one.source is not None}
    finished = taken[folder / RESULTS]
    files = [one for one in folder.rglob("*") if one.is_file() and "checkpoint-4" not in one.parts]
    before = [one for one in files if one.name not in (RESULTS, MARK)]
    assert {"model.safetensors", "README.md", "outcomes.csv"} <= {one.name for one in before}
    for file in (*before, folder / RESULTS):
        number = taken[file]
        assert Operation(operations[number].source) in operations[:number], file
        until = None if file.name == RESULTS else finished
        assert Operation(file.parent) in operations[number:until], file
        assert number <= finished
    assert Operation(folder) in operations[finished : taken[folder / MARK]]


@pytest.mark.slow
@each_script
def test_of_two_at_once_the_second_is_refused(
    tmp_path: Path, data: Path, whole: Callable[[str], Whole], nursery: Nursery, name: str
) -> None:
    script, out = SCRIPTS[name], tmp_path / "run"
    nursery.begin(name, options(script, data, out), out, wait)
    wait_for(sign_of(out, "waits"))
    before, holder = contents(out), (out / HOLDER).read_text(encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(SystemExit) as caught:
            script.main(options(script, data, out, resume))
        assert_is_one_line(caught.value.code, f"run: {holder} makes this run: wait for it, or end it$")
    assert contents(out) == before
    sign_of(out, "goes on").touch()
    assert nursery.ended().code == 0
    assert unlike(left_by(out), whole(name).left) == []


@pytest.mark.slow
@each_script
def test_told_to_stop_it_keeps_its_step_and_goes_on(
    tmp_path: Path, data: Path, whole: Callable[[str], Whole], nursery: Nursery, steps: list[int], name: str
) -> None:
    script, out = SCRIPTS[name], tmp_path / "run"
    code, said = nursery.run(name, options(script, data, out), out, be_told)
    assert code == 75
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "stopped by" in line]
    assert line.startswith(f"stopped by SIGTERM after step 3 of 4, which {out / 'checkpoint-3'} keeps: ")
    assert state_of(out) is State.INTERRUPTED
    require_whole(out / "checkpoint-3")
    expected = whole(name).left
    steps.clear()
    script.main(options(script, data, out, resume=True))
    assert steps == [3, *script.further]
    assert unlike(left_by(out), expected) == []
    require_whole(out / "checkpoint-4")
    assert not [one for one in PASSING if (out / one).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_STUDY)
def test_killed_at_its_end_it_is_resumed_to_all_of_it(
    tmp_path: Path, data: Path, whole: Callable[[str], Whole], nursery: Nursery, steps: list[int], name: str
) -> None:
    """Before its card, then before its upload."""
    script, out, expected = WITH_STUDY[name], tmp_path / "run", whole(name).left
    steps.clear()
    assert nursery.run(name, options(script, data, out), out, die_at_the_card).code == -signal.SIGKILL
    folder = run_in(out)
    assert state_of(folder) is State.INTERRUPTED
    given = options(script, data, out, resume=True)
    assert nursery.run(name, given, out, die_at_the_upload).code == -signal.SIGKILL
    assert state_of(folder) is State.FINISHED
    assert unlike(left_by(folder), expected) == []
    trained = (folder / "model.safetensors").stat().st_mtime_ns
    Hub.uploads.clear()
    for _ in range(2):  # the second time there is nothing to do
        script.main(given)
    assert Hub.uploads == [folder]
    assert (state_of(folder), steps) == (State.PUBLISHED, [])
    assert (folder / "model.safetensors").stat().st_mtime_ns == trained
    assert unlike(left_by(folder), expected) == []
