"""Studies on a real Ray cluster, of which a worker or a node is lost on the way."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from metaxl_evo.experiments import ray_engine  # noqa: E402
from metaxl_evo.experiments.engines import at_work  # noqa: E402
from metaxl_evo.experiments.ray_engine import RayEngine  # noqa: E402
from metaxl_evo.experiments.study import PLAN, Study  # noqa: E402
from metaxl_evo.training.preemption import Interrupted  # noqa: E402
from tests.experiments import gated_task  # noqa: E402

pytestmark = pytest.mark.slow
HELD_UP = r"process (\d+) is held up"
SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node with two cores, and two GPUs on paper."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, **SMALL})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", found.address)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        yield found
    found.shutdown()


def planned(folder: Path, **options: Any) -> Study:
    fixed = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "use_cpu": True, "disable_tqdm": True}
    settings = {"task": f"{gated_task.__file__}:GatedTask", "output_dir": folder, **fixed, **options}
    study = Study([f"--{name}={value}" for name, value in settings.items()])
    study.try_runs()
    study.write_plan()
    return study


def made(study: Study, engine: RayEngine, meanwhile: Callable[[], object] = lambda: None) -> dict[int, str | None]:
    """Why each run failed, None where it did not, in the order in which they ended."""
    errors = {}
    for ended in engine(study.folder / PLAN, {number: run.folder for number, run in enumerate(study.runs)}):
        if ended is None:
            meanwhile()
        else:
            errors[ended.number] = ended.error
    return errors


def scores(study: Study) -> list[Any]:
    return [json.loads((run.folder / "results.json").read_text())["test"] for run in study.runs]


def found_in_logs(study: Study, pattern: str) -> list[list[str]]:
    return [re.findall(pattern, log.read_text()) for log in sorted(study.folder.rglob("_run.log"))]


def test_a_run_whose_node_is_lost_goes_on_from_its_checkpoint_on_another(cluster: Cluster, tmp_path: Path) -> None:
    gate, lost = tmp_path / "gate", cluster.add_node(num_cpus=1, num_gpus=1, **SMALL)
    study = planned(tmp_path / "ray", seeds="0,1,2", gate=gate)

    def lose_the_node() -> None:
        held_up = [int(one) for log in found_in_logs(study, HELD_UP) for one in log]
        if len(held_up) == 3 and lost in cluster.worker_nodes:
            cluster.remove_node(lost, allow_graceful=False)
        elif not all(map(psutil.pid_exists, held_up)):
            gate.touch()

    assert made(study, RayEngine(), lose_the_node) == {0: None, 1: None, 2: None}
    assert sorted(found_in_logs(study, "from step (.)")) == [["0"], ["0"], ["0", "2"]]
    assert all(len(gpus) == 1 for log in found_in_logs(study, "GPUs (.*)") for gpus in log)
    assert not ray.is_initialized()
    inline = planned(tmp_path / "inline", seeds="0,1,2", gate=gate)
    for number in range(3):
        inline.make(number)
    assert scores(study) == scores(inline)


def test_a_run_that_fails_is_told_and_the_others_go_on(cluster: Cluster, tmp_path: Path) -> None:
    runs = {"fails": {"event": "raise"}, "kills": {"event": "kill"}, "works": {}}
    study = planned(tmp_path, runs=json.dumps(runs))
    errors = made(study, RayEngine(jobs=1, retries=1))
    log = study.runs[0].folder / "_run.log"
    assert list(errors.items()) == [(0, f"not this one (see {log})"), (1, errors[1]), (2, None)]
    assert "worker died" in str(errors[1])
    assert found_in_logs(study, "from step (.)") == [["0"], ["0", "2"], ["0"]]


def test_runs_end_with_their_study_and_a_cluster_joined_before_stays(cluster: Cluster, tmp_path: Path) -> None:
    study = planned(tmp_path, gate=tmp_path / "never")
    with ray.init():
        ends = RayEngine()(study.folder / PLAN, {0: study.runs[0].folder})
        while not any(found := found_in_logs(study, HELD_UP)):
            next(ends)
        process = psutil.Process(int(found[0][0]))
        ends.close()
        process.wait(timeout=30)
        assert ray.is_initialized()


def test_runs_that_are_told_keep_their_step(cluster: Cluster, tmp_path: Path) -> None:
    study = planned(tmp_path, gate=tmp_path / "gate", save_strategy="no")
    events = RayEngine()(study.folder / PLAN, {0: study.runs[0].folder})

    def tell() -> None:
        with at_work(events):
            while not any(found_in_logs(study, HELD_UP)):
                next(events)
            threading.Timer(3, (tmp_path / "gate").touch).start()
            raise Interrupted("told")

    with pytest.raises(Interrupted):
        tell()
    assert (study.runs[0].folder / f"checkpoint-{gated_task.EVENT}/manifest.json").is_file()
    assert "stopped by SIGTERM after step" in next(tmp_path.rglob("_run.log")).read_text()


def test_what_only_some_nodes_see_is_told(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, elsewhere = planned(tmp_path / "study"), tmp_path / "elsewhere"
    folder = study.runs[0].folder
    with monkeypatch.context() as patched:  # as a driver on another filesystem than the node's
        patched.setattr(ray_engine, "os", SimpleNamespace(listdir=lambda folder: [], environ=os.environ))
        (unseen,) = filter(None, RayEngine()(study.folder / PLAN, {0: folder}))
    assert str(unseen.error).startswith(f"{folder / 'results.json'} is not to be seen here: output_dir must be on")
    (blind,) = filter(None, RayEngine()(elsewhere / PLAN, {0: elsewhere}))
    assert f"does not see {elsewhere / PLAN}: output_dir must be on" in str(blind.error)


def test_what_no_node_can_make_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads: a run needs 3 cores of a node, and the largest has 2"):
        made(planned(tmp_path), RayEngine(threads=3))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"])
def test_where_no_cluster_answers_one_line_says_so(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"no cluster can be joined \(\[Errno \d+\] .*\): see RAY_ADDRESS"):
        next(RayEngine()(Path(PLAN), {}))


def test_without_ray_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, RayEngine.__module__)
    with pytest.raises(ValueError, match=re.escape("pip install 'metaxl_evo[ray]'")):
        importlib.import_module(RayEngine.__module__)
