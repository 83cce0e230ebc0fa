"""Signals to stop: the step ends, a checkpoint keeps it, and what is resumed ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from metaxl_evo.training import preemption
from metaxl_evo.training.checkpoint import MANIFEST
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.preemption import Interrupted
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from tests.training.tiny import final_state, logged, random_rows, same, tiny_trainer

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Told(TrainerCallback):
    """Sends a signal to this process in an event of a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM, event: str = "on_step_begin"):
        self.step, self.number = step, number
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


class ToldByRow:
    """Rows of which the first that a worker reads sends a signal to all processes, as a scheduler does."""

    def __init__(self, number: int):
        self.rows, self.number = random_rows(24, seed=1, language=0), number

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None and self.number:
            for process in (os.getppid(), os.getpid()):
                os.kill(process, self.number)
            self.number = 0
        return self.rows[index]


def trainer_of(folder: Path | str, told: TrainerCallback | None = None, **fields: Any) -> MetaTrainer:
    """Eight steps, six an epoch."""
    further = {"eval_dataset": random_rows(6, seed=9, language=None), "callbacks": [told] if told else []}
    return tiny_trainer(folder, max_steps=8, trainer=further, **fields)


def stopped(trainer: MetaTrainer) -> Interrupted:
    """What ends it, without the frames, which would hold the workers of data loaders."""
    try:
        trainer.train()
    except Interrupted as error:
        assert [signal.getsignal(one) for one in SIGNALS] == HANDLERS
        return error.with_traceback(None)
    raise AssertionError("it was not stopped")


HANDLERS = [signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL]
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
CASES: dict[str, tuple[Told, int, dict[str, Any]]] = {
    "Ctrl-C within a step": (Told(3, signal.SIGINT), 4, {"gradient_accumulation_steps": 2}),
    "in the last step of an epoch": (Told(5), 6, {"eval_strategy": "epoch"}),
    "in the last step": (Told(7), 8, {"eval_strategy": "epoch"}),
    "the best is kept": (Told(4), 5, {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", **BEST}),
}
SLOW: dict[str, tuple[Told, int, dict[str, Any]]] = {
    "SLURM's, behind a step": (Told(4, signal.SIGUSR1, "on_step_end"), 4, {}),
    "in an evaluation": (Told(4, event="on_evaluate"), 4, {"eval_strategy": "steps", "eval_steps": 4}),
    "in a save": (Told(4, event="on_save"), 4, {"save_strategy": "steps", "save_steps": 4}),
    "checkpoints of the model only": (
        Told(4),
        5,
        {"save_strategy": "steps", "save_steps": 5, "save_only_model": True},
    ),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)])
def test_a_stopped_run_goes_on_bit_by_bit(case: str, tmp_path: Path) -> None:
    told, step, fields = (CASES | SLOW)[case]
    error = stopped(trainer_of(tmp_path, told, **fields))
    assert (tmp_path / f"checkpoint-{step}" / MANIFEST).is_file()
    assert str(error).startswith(f"stopped by {signal.Signals(told.number).name} after step {step} of 8, which ")
    assert error.code == 75
    assert_goes_on(tmp_path, step, **fields)


def assert_goes_on(folder: Path, step: int, **fields: Any) -> None:
    """From that step to the end of a run that nobody disturbed."""
    whole, again = trainer_of(folder / "whole", **fields), trainer_of(folder, **fields)
    whole.train()
    torch.rand(9), np.random.rand(9), random.random()  # noqa: NPY002
    again.train("latest")
    assert again._initial_global_step == step
    expected, found = final_state(whole), final_state(again)
    assert {key: same(found[key], expected[key]) for key in found} == dict.fromkeys(found, True)
    assert again.state.best_metric == whole.state.best_metric
    assert logged(again, "eval_loss") == logged(whole, "eval_loss")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_a_signal_to_all_processes(tmp_path: Path, number: int) -> None:
    """The first step waits for them."""
    error = stopped(tiny_trainer(tmp_path, max_steps=8, dataloader_num_workers=1, train=ToldByRow(number)))
    assert "after step 1 of 8, which" in str(error)
    assert (tmp_path / "checkpoint-1" / MANIFEST).is_file()


def test_a_step_that_a_signal_breaks_is_no_error_of_the_run(tmp_path: Path) -> None:
    """What a training needs may have been told as well."""

    class Broken(Told):
        def send(self, *args: Any, **kwargs: Any) -> None:
            super().send(*args, **kwargs)
            raise ConnectionError("the other side is gone")

    error = stopped(trainer_of(tmp_path, Broken(0)))
    assert str(error).startswith("stopped by SIGTERM within a step, which keeps nothing (the other side is gone): ")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it comes with the first, from a launcher; SIGTERM may come any number of times."""
    monkeypatch.setattr(preemption, "TWICE", 0.05)
    sent = []

    class Twice(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
                sent.append(number)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            sent.append("not to be seen")

    with pytest.raises(KeyboardInterrupt) as caught:
        trainer_of(tmp_path, Twice()).train()
    assert not isinstance(caught.value, Interrupted)
    assert len(sent) == 3
    assert not list(tmp_path.glob("checkpoint-*"))


def test_handlers_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do ignored signals, as under nohup; a thread has no say in signals, and trains all the same."""
    heard = list[int]()
    before = {one: signal.signal(one, held) for one, held in ((15, lambda *of: heard.append(15)), (2, signal.SIG_IGN))}
    try:
        for told in (Told(3), Told(3, signal.SIGINT)):
            trainer_of(tmp_path, told).train()
    finally:
        for one, held in before.items():
            signal.signal(one, held)
    assert heard == [15]
    thread = threading.Thread(target=trainer_of(tmp_path).train)
    thread.start()
    thread.join()


def test_weights_that_diverged_are_not_kept(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Told(3), logging_strategy="no")

    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            next(model.base.parameters()).data.fill_(torch.inf)

    trainer.add_callback(Broken())
    with pytest.raises(Interrupted, match=r"which keeps nothing \(step 4: .* weights are not finite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# Several processes


def stopped_on_one(folder: str) -> tuple[str, int]:
    """On one of two ranks, of which the second is told."""
    rank = int(os.environ["RANK"])
    error = stopped(trainer_of(folder, Told(3, signal.SIGTERM if rank else 0)))
    again = trainer_of(folder)
    again.train("latest")
    whole = trainer_of(f"{folder}/whole")
    whole.train()
    expected, found = final_state(whole), final_state(again)
    assert {key: same(found[key], expected[key]) for key in found} == dict.fromkeys(found, True)
    return str(error), again._initial_global_step


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_agree_on_the_step(tmp_path: Path) -> None:
    (first, one), (second, two) = on_processes(2, stopped_on_one, str(tmp_path))
    assert (one, two) == (4, 4)
    assert first.startswith("stopped by a signal to another process after step 4 of 8, which ")
    assert second.startswith("stopped by SIGTERM after step 4 of 8, which ")


class Waiting(TrainerCallback):
    """Says that a step is reached, and makes it a long one."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            (Path(args.output_dir) / "_here").touch()
            time.sleep(3)


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_passes_it_on(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", __name__, str(tmp_path)]
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True) as launcher:
        while launcher.poll() is None and not (tmp_path / "_here").exists():
            time.sleep(0.1)
        launcher.terminate()
        _, said = launcher.communicate(timeout=120)
    assert said.count(f"stopped by SIGTERM after step 4 of 8, which {tmp_path / 'checkpoint-4'} keeps") == 1
    assert (tmp_path / "checkpoint-4" / MANIFEST).is_file()
    assert launcher.returncode == 1  # its own: it was told as well


# Outside of a training


def test_all_else_ends_at_once_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    @ends_with_one_line
    def main(argv: Any = None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    with pytest.raises(Interrupted) as caught:
        main([])
    assert caught.value.code == 75
    (line,) = caplog.messages
    assert line == "stopped by SIGTERM: start it again; a training may go on with resume_from_checkpoint: latest"


def test_a_signal_behind_the_last_step_is_passed_on(tmp_path: Path) -> None:
    main = ends_with_one_line(lambda argv: trainer_of(tmp_path, Told(8, event="on_train_end")).train())
    with pytest.raises(Interrupted, match="stopped by SIGTERM: start it again"):
        main([])


if __name__ == "__main__":
    trainer_of(sys.argv[1], Waiting()).train()
