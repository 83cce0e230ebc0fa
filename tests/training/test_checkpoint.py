"""Checkpoints under attack: bits flipped, files cut, disks full, pickles with code, another run's; nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from metaxl_evo.training import checkpoint as checkpoint_module
from metaxl_evo.training.checkpoint import (
    MANIFEST,
    META_STATE,
    SaveFailed,
    find_checkpoint,
    made_by,
    remove_incomplete,
    require_same,
    require_whole,
    rotate,
    seal,
    unseal,
)
from metaxl_evo.training.trainer import MetaTrainer
from tests.attack import WRAPS, in_zip
from tests.training.tiny import (
    base_weights,
    different,
    reseal,
    tiny_tagger,
    tiny_trainer,
)

FILES = [  # of a tagger's checkpoint, beside the manifest
    *("config.json", "meta_state.pt", "model.safetensors", "optimizer.pt", "rng_state.pth", "rtn/config.json"),
    *("rtn/model.safetensors", "scheduler.pt", "trainer_state.json", "training_args.bin"),
]


def saving_trainer(folder: Path, **fields: Any) -> MetaTrainer:
    """Six steps, a checkpoint after each second one."""
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    return tiny_trainer(folder, **settings | fields)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    saving_trainer(folder).train()
    return folder


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """An output folder with checkpoints 2 and 4."""
    for step in (2, 4):
        shutil.copytree(finished / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def one_line(message: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    with pytest.raises(kind, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


# The manifest


def test_what_a_manifest_says(finished: Path) -> None:
    """Against what coreutils would say: sizes and digests by another road."""
    checkpoint = finished / "checkpoint-2"
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    assert sorted(manifest["files"]) == sorted(FILES)
    assert contents(checkpoint).keys() == {*FILES, MANIFEST}
    for name, held in manifest["files"].items():
        printed = os.popen(f"sha256sum {checkpoint / name}").read().split()[0]
        assert held == {"size": (checkpoint / name).stat().st_size, "sha256": printed}
    assert manifest["processes"] == 1
    assert manifest["made_by"]["labels"] == [f"LABEL_{number}" for number in range(5)]
    assert manifest["made_by"]["estimator"] == "OneStep(engine='auto', radius=0.01)"  # as by earlier versions
    assert require_whole(checkpoint)["processes"] == 1


def test_the_manifest_is_written_last_and_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is on the disk before the manifest has its name."""
    for name in ("a.pt", "sub/b.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    replace = Path.replace

    def replaced(source: Path, target: Path) -> Path:
        done.append(f"{source.name} -> {target.name}")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", replaced)
    seal(tmp_path, {}, 1)
    assert done == ["a.pt", "b.json", f"{MANIFEST}.tmp", f"{MANIFEST}.tmp -> {MANIFEST}", tmp_path.name]
    assert sorted(contents(tmp_path)) == ["a.pt", MANIFEST, "sub/b.json"]


def test_a_checkpoint_that_is_written_over_has_no_manifest_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    save = torch.save
    trainer = saving_trainer(tmp_path, max_steps=2)
    trainer.train()

    def watched(*args: Any, **kwargs: Any) -> None:
        seen.append((tmp_path / "checkpoint-2" / MANIFEST).exists())
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", watched)
    trainer.train()
    assert len(seen) > 4
    assert not any(seen)
    require_whole(tmp_path / "checkpoint-2")


def test_a_save_that_was_cut_off_in_its_manifest_is_made_good(tmp_path: Path) -> None:
    """The draft that it left behind is none of the files of the next save into that folder."""
    (tmp_path / "a.pt").write_text("a")
    (tmp_path / f"{MANIFEST}.tmp").write_text('{"made_by"')
    seal(tmp_path, {}, 1)
    assert require_whole(tmp_path)["files"].keys() == {"a.pt"}


# Damage


def flipped(file: Path, generator: random.Random) -> None:
    held = bytearray(file.read_bytes())
    held[generator.randrange(len(held))] ^= 1 << generator.randrange(8)
    file.write_bytes(held)


def cut(file: Path, generator: random.Random) -> None:
    os.truncate(file, generator.randrange(file.stat().st_size))


def gone(file: Path, generator: random.Random) -> None:
    file.unlink()


DAMAGES: dict[Callable[[Path, random.Random], None], str] = {
    flipped: "is damaged or truncated",
    cut: "is damaged or truncated",
    gone: "is missing",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_named_and_skipped(
    output: Path, name: str, damage: Callable[[Path, random.Random], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the bit, wherever the cut."""
    file = output / "checkpoint-4" / name
    held = file.read_bytes()
    for seed in range(4):
        file.write_bytes(held)
        damage(file, random.Random(seed))
        with one_line(f"{re.escape(str(file))} {DAMAGES[damage]}.*: resume from an earlier checkpoint, or start anew"):
            find_checkpoint(str(output / "checkpoint-4"), output)
        caplog.clear()
        assert find_checkpoint("latest", output) == str(output / "checkpoint-2")
        named, chosen = caplog.messages
        assert named.startswith(f"{file} ")
        assert re.search(DAMAGES[damage], named)
        assert chosen == f"the run goes on from {output / 'checkpoint-2'}"


def test_a_flipped_bit_of_the_manifest_itself(output: Path) -> None:
    """It may fall on white space; else it is found, and never taken for another content."""
    file = output / "checkpoint-4" / MANIFEST
    held, whole, generator = file.read_bytes(), require_whole(output / "checkpoint-4"), random.Random(0)
    found = 0
    for _ in range(300):
        file.write_bytes(held)
        flipped(file, generator)
        try:
            same_content = json.loads(file.read_bytes()) == json.loads(held)
        except ValueError:
            same_content = False
        if same_content:
            assert require_whole(output / "checkpoint-4") == whole
        else:
            found += 1
            with one_line(f"{MANIFEST} is damaged"):
                require_whole(output / "checkpoint-4")
    assert found > 150


def signed(**content: Any) -> str:
    """A manifest of one's own making."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest})


OF_NO_FORM = [signed(), signed(made_by={}, processes=1), signed(made_by=None, processes=1, files={})]
OF_NO_FORM += [signed(made_by={}, processes=1, files={"a.pt": size}) for size in (None, {"size": "1", "sha256": "0"})]


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"sha256": "0"}', '{"sha256": ', "\xff", "[" * 200_000, *OF_NO_FORM]
)
def test_what_is_no_manifest(output: Path, text: str) -> None:
    (output / "checkpoint-4" / MANIFEST).write_text(text, encoding="latin-1")
    with one_line(f"checkpoint-4/{MANIFEST} is damaged"):
        require_whole(output / "checkpoint-4")


def test_which_one_is_the_latest(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    def latest() -> str | None:
        caplog.clear()
        found = find_checkpoint("latest", output)
        return None if found is None else Path(found).name

    assert latest() == "checkpoint-4"
    assert caplog.records == []
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-10")
    for name in ("best", "²"):  # which Python takes for a digit
        (output / f"checkpoint-{name}").mkdir()
    assert latest() == "checkpoint-10"  # by number, not by letters
    unseal(output / "checkpoint-10")
    assert latest() == "checkpoint-4"
    assert f"checkpoint-10 has no {MANIFEST} (a save that was cut off)" in caplog.text
    with one_line(f"checkpoint-10 has no {MANIFEST}"):
        find_checkpoint(str(output / "checkpoint-10"), output)
    unseal(output / "checkpoint-4")
    unseal(output / "checkpoint-2")
    assert latest() is None  # no save was completed: there is nothing to lose
    assert len(caplog.records) == 4
    assert caplog.messages[-1] == f"{output} holds no complete checkpoint: the run starts at step 0"
    with one_line("holds no complete checkpoint: leave resume_from_checkpoint out"):
        find_checkpoint(True, output)
    reseal_as_weights_only(output / "checkpoint-4")
    with one_line(r"trainer_state.json is missing \(save_only_model"):
        latest()


def reseal_as_weights_only(checkpoint: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (checkpoint / name).unlink()
    seal(checkpoint, {}, 1)


# Of another run

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "estimator": ({"estimator": "evograd"}, r"estimator \(OneStep\(.*\) there, EvoGrad\(.*\) here\)"),
    "its settings": (
        {"estimator_kwargs": {"engine": "double_backward"}},
        r"estimator \(OneStep\(engine='auto'.* there, OneStep\(engine='double_backward'.* here",
    ),
    "no meta level": ({"estimator": "none"}, r"estimator \(OneStep.* there, none here\), meta_optim \(AdamW there"),
    "meta optimiser": ({"meta_optim": "Adam"}, r"meta_optim \(AdamW there, Adam here\)"),
    "optimiser": ({"optimizer_class": "SGD"}, r"optimiser \(adamw_torch_fused there, SGD here\)"),
    "episode length": ({"episode_length": 2}, r"episode_length \(None there, 2 here\)"),
    "episode reset": (
        {"episode_length": 2, "episode_reset": "restart"},
        r"episode_length .*, episode_reset \(continue there, restart here\)",
    ),
    "labels": (
        {"tagger": {"base": {"num_labels": 7}}},
        r"labels \(5: LABEL_0, .* there, 7: LABEL_0, .* here\), base parameters \(39 tensors of 19269 numbers",
    ),
    "label names": (
        {"tagger": {"base": {"id2label": dict(enumerate("ABCDE"))}}},
        r"labels \(5: LABEL_0, .*LABEL_4 there, 5: A, B, C, D, E here\)",
    ),
    "size": ({"tagger": {"base": {"intermediate_size": 40}}}, r"base parameters \(.* there, .* here\)"),
    "layers": ({"tagger": {"layers": (1, 2)}}, r"meta parameters \(4 tensors of 1089 numbers .* there"),
    "kind": ({"tagger": {"kind": "perceptron"}}, r"meta parameters \(.* there"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_run_is_refused(output: Path, name: str) -> None:
    fields, message = OTHERS[name]
    before = contents(output)
    fields = dict(fields)
    trainer = saving_trainer(output, tagger=tiny_tagger(**fields.pop("tagger", {})), **fields)
    start = base_weights(trainer)
    with one_line(f"checkpoint-4 was made with another .*{message}.*give the settings of that run, or start anew"):
        trainer.train("latest")
    assert different(base_weights(trainer), start) == []
    assert contents(output) == before


def test_a_run_does_not_start_among_the_checkpoints_of_another(output: Path) -> None:
    """Its own, of any training before, are no other's; a learning rate stands in no checkpoint of a plain trainer."""
    before = contents(output)
    with pytest.raises(
        ValueError, match=rf"^{output} holds another run \(checkpoint-4\): choose another output_dir, or"
    ):
        saving_trainer(output, learning_rate=0.5, max_steps=2).train()
    assert contents(output) == before
    shutil.rmtree(output / "checkpoint-4")
    shutil.rmtree(output / "checkpoint-2")
    own = saving_trainer(output, max_steps=2)
    for _ in range(2):
        own.train()
    resumed = saving_trainer(output, max_steps=4)
    resumed.train(resume_from_checkpoint="latest")
    resumed.train()
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_a_run_that_is_to_go_on_starts_beside_what_was_cut_off(output: Path) -> None:
    for step in (2, 4):
        unseal(output / f"checkpoint-{step}")
    trainer = saving_trainer(output, max_steps=2)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 2


def test_what_may_change_between_halves(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields: dict[str, Any] = {"learning_rate": 2e-3, "meta_learning_rate": 1e-2, "logging_steps": 3, "max_steps": 5}
    saving_trainer(output, **fields).train("latest")
    assert [one for one in caplog.records if one.name == checkpoint_module.__name__] == []


def test_another_number_of_processes_is_a_warning(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = saving_trainer(output)
    require_same(output / "checkpoint-4", made_by(trainer.model, trainer.args), 4)
    assert "is of a run on 1 process(es), this one has 4: it goes on, but not bit by bit" in caplog.text


# Saving


def test_old_ones_go_when_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[str, list[str]]] = []

    def complete() -> list[str]:
        return sorted(file.parent.name for file in tmp_path.glob(f"*/{MANIFEST}"))

    class Watching(MetaTrainer):
        def _save_rng_state(self, output_dir: str) -> None:
            kept.append(("before", complete()))
            super()._save_rng_state(output_dir)

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            require_whole(Path(checkpoint_folder))
            kept.append(("pushed", complete()))

    trainer = saving_trainer(tmp_path, trainer_class=Watching, save_total_limit=1)
    trainer.args.push_to_hub, trainer.args.hub_token = True, "hf_secret"
    trainer.train()
    assert trainer.args.hub_token == "hf_secret"
    assert kept == [
        *(("before", []), ("pushed", ["checkpoint-2"])),
        *(("before", ["checkpoint-2"]), ("pushed", ["checkpoint-2", "checkpoint-4"])),
        *(("before", ["checkpoint-4"]), ("pushed", ["checkpoint-4", "checkpoint-6"])),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6"]
    saved = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert (saved.save_total_limit, saved.push_to_hub, saved.hub_token) == (1, True, None)  # it may be uploaded


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8, 10]),
        (0, None, [2, 4, 6, 8, 10]),
        (9, None, [2, 4, 6, 8, 10]),
        (4, None, [2, 6, 8, 10]),
        (3, None, [2, 6, 8]),
        (2, None, [6, 8]),
        (1, None, [6]),
        (3, 2, [2, 6, 8]),
        (2, 4, [4, 6]),
        (1, 4, [4, 6]),
        (1, 6, [6]),
    ],
)
def test_rotation(tmp_path: Path, limit: int | None, best: int | None, left: list[int]) -> None:
    """6 is the newest by time, 8 of a run before; 4 and 10 were cut off."""
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step not in (4, 10):
            seal(tmp_path / f"checkpoint-{step}", {}, 1)
    (tmp_path / "checkpoint-best").mkdir()
    rotate(tmp_path / "checkpoint-6", limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    found = sorted(tmp_path.iterdir())
    assert {path.name for path in found} == {f"checkpoint-{step}" for step in [*left, "best"]}


def test_what_a_killed_deletion_has_left_goes(output: Path) -> None:
    unseal(output / "checkpoint-2")
    (output / "checkpoint-best").mkdir()
    remove_incomplete(output)
    assert {path.name for path in output.iterdir()} == {"checkpoint-4", "checkpoint-best"}


@pytest.mark.parametrize("name", ["config.json", "meta_state.pt", "optimizer.pt", "tokenizer.json", f"{MANIFEST}.tmp"])
def test_a_full_disk_in_any_file(output: Path, name: str) -> None:
    """/dev/full refuses every byte as a full disk does. Checkpoints before that are untouched, and resumed from.

    Safetensors files get their names when they are written: the next test has them.
    """
    before = contents(output)
    file = output / "checkpoint-6" / name
    file.parent.mkdir(parents=True)
    file.symlink_to("/dev/full")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    trainer = saving_trainer(output, trainer={"processing_class": words})
    with one_line(r"checkpoint-6 could not be written \(.+\): .*/checkpoint-4 is intact; mend", SaveFailed):
        trainer.train("latest")
    assert {name: held for name, held in contents(output).items() if "checkpoint-6" not in name} == before
    assert not (output / "checkpoint-6").exists()  # what was written makes room
    again = saving_trainer(output)
    again.train("latest")
    assert again._initial_global_step == 4
    require_whole(output / "checkpoint-6")


@pytest.mark.parametrize("limit", [500, 50_000, 100_000], ids=["config.json", "model.safetensors", "optimizer.pt"])
def test_a_limit_on_the_size_of_files(tmp_path: Path, limit: int) -> None:
    """What the kernel says to each kind of writer, of a checkpoint and of the final model."""
    trainer = saving_trainer(tmp_path)
    with (
        files_of_at_most(limit),
        one_line(r"checkpoint-2 could not be written \(.+\): there is no earlier", SaveFailed),
    ):
        trainer.train()
    trainer = saving_trainer(tmp_path)
    trainer.train()
    message = rf"{tmp_path} could not be written \(.*too large.* MiB are free\): .*/checkpoint-6 is intact; mend"
    if limit < 100_000:
        with files_of_at_most(limit), one_line(message, SaveFailed):
            trainer.save_model()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("place", ["/proc/nowhere", "a file/run", "a file"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").write_text("mine", encoding="utf-8")
    with one_line(r"output_dir: .* cannot be written \(.*\): choose another one"):
        tiny_trainer(tmp_path / place)
    assert (tmp_path / "a file").read_text(encoding="utf-8") == "mine"


def test_a_full_disk_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    with one_line(r"cannot be written \(\[Errno 28\] No space left on device\)"):
        tiny_trainer(tmp_path)


# Code in a pickle


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        *zip(("optimizer.pt", "scheduler.pt", "rng_state.pth"), (*WRAPS, WRAPS[0]), strict=True),
        *((META_STATE, wrap) for wrap in WRAPS),
    ],
)
def test_no_code_is_run_on_resume(output: Path, name: str, wrap: Callable[[Path, Path], None]) -> None:
    """By the manifest where the attacker left it, and by loading tensors only where a new one was made."""
    checkpoint, mark = output / "checkpoint-4", output / "attacked"
    wrap(checkpoint / name, mark)
    with one_line(f"{name} is damaged or truncated"):
        saving_trainer(output).train(str(checkpoint))
    reseal(checkpoint)
    trainer = saving_trainer(output)
    with one_line(f"checkpoint-4/{name} cannot be read, or holds more than tensors and plain values"):
        trainer.train(str(checkpoint))
    assert trainer.state.global_step == 4  # as loaded: no step was made
    assert not mark.exists()


def test_the_attack_is_one(tmp_path: Path) -> None:
    """The control: a careless reader runs it; and a scaler, which no run of ours has, is not read at all."""
    for number, wrap in enumerate(WRAPS):
        file, mark = tmp_path / "scaler.pt", tmp_path / f"attacked-{number}"
        wrap(file, mark)
        saving_trainer(tmp_path)._load_scaler(str(tmp_path))
        assert not mark.exists()
        torch.load(file, weights_only=False) if wrap is in_zip else pickle.loads(file.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize("wrap", WRAPS)
def test_no_code_is_run_in_the_weights_of_a_checkpoint(output: Path, wrap: Callable[[Path, Path], None]) -> None:
    checkpoint, mark = output / "checkpoint-4", output / "attacked"
    (checkpoint / "model.safetensors").unlink()
    wrap(checkpoint / "pytorch_model.bin", mark)
    reseal(checkpoint)
    with one_line("checkpoint-4/model.safetensors is missing, and the weights beside it are more than tensors"):
        saving_trainer(output).train(str(checkpoint))
    assert not mark.exists()


def test_states_that_do_not_fit_are_one_line(output: Path) -> None:
    checkpoint = output / "checkpoint-4"
    for alter in (lambda state: state.pop("rows"), lambda state: state["optimizer"]["param_groups"].clear()):
        state = torch.load(checkpoint / META_STATE, weights_only=True)
        alter(state)
        torch.save(state, checkpoint / META_STATE)
        reseal(checkpoint)
        with one_line(r"checkpoint-4 does not fit this run \(.+\): resume from an earlier"):
            saving_trainer(output).train("latest")


def test_a_checkpoint_that_cannot_be_written_over_stays(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is discarded after a failed save is what this save has written, never a complete one of before."""
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-6")
    before = contents(output)

    def refuse(checkpoint: Path) -> None:
        raise PermissionError("Operation not permitted")

    trainer = saving_trainer(output)
    monkeypatch.setattr("metaxl_evo.training.task_trainer.unseal", refuse)
    with one_line(r"checkpoint-6 could not be written \(Operation not permitted; ", SaveFailed):
        trainer.train(str(output / "checkpoint-4"))
    assert contents(output) == before
