"""The command end to end on each problem, made small, and what it does with estimators that fail."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import TrainerCallback

from metaxl_evo.benchmark import arguments, run
from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.memory import live_tensors
from metaxl_evo.benchmark.problems import Episode, regression, tagger
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.benchmark.steps import NO_META_STEP, measure_task
from metaxl_evo.benchmark.trajectories import by_estimator, through_all_steps
from metaxl_evo.bilevel import InnerStep, PassContext, Response, tree
from metaxl_evo.estimators import ESTIMATORS, OneStep
from scripts.benchmark_estimators import main

CONFIGS = Path(__file__).parents[2] / "configs/benchmark"
SMALL_TAGGER = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 20,
}  # fmt: skip
ENGINES = [{"engine": engine} for engine in ("finite_difference", "jvp", "double_backward")]


def bench(folder: Path, config: str, *options: str) -> tuple[list[Row], dict[str, Any]]:
    rows = main(["--config", str(CONFIGS / f"{config}.yaml"), "--output_dir", str(folder), *options])
    return rows, json.loads((folder / "results.json").read_text(encoding="utf-8"))


def small(**fields: Any) -> BenchmarkArguments:
    training = {"use_cpu": True, "per_device_train_batch_size": 4, "per_device_meta_batch_size": 4}
    training |= fields.pop("training", {})
    plain: dict[str, Any] = {
        "problem": "tagger", "model": SMALL_TAGGER, "rtn_layer": [1], "length": 8, "repeats": 1, "warmup": 1,
        "noise_draws": 2, "orders": ["after_step"],
    }  # fmt: skip
    return BenchmarkArguments(**plain | fields, output_dir=fields.get("output_dir", "unused"), training=training)


@dataclass(frozen=True)
class Broken(OneStep):
    """Fails in its third step."""

    def respond(self, passes: PassContext, step: InnerStep, state: Any, diagnostics: dict[str, float]) -> Response:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("boom\n at last")
        return super().respond(passes, step, state, diagnostics)


@dataclass(frozen=True)
class NeverFinite(OneStep):
    """Its hypergradients are not numbers."""

    def respond(self, passes: PassContext, step: InnerStep, state: Any, diagnostics: dict[str, float]) -> Response:
        response = super().respond(passes, step, state, diagnostics)
        return Response(response.value, lambda v: tree.scale(response.vjp(v), float("nan")))


calls: list[int] = []


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    monkeypatch.setitem(ESTIMATORS, "broken", Broken)
    monkeypatch.setitem(ESTIMATORS, "never_finite", NeverFinite)


def test_every_problem_has_a_measure() -> None:
    assert tuple(run.MEASURES) == arguments.PROBLEMS


# Episodes of a plain function ----------------------------------------------------------------------------------------


def test_toy_runs_every_registered_estimator(tmp_path: Path) -> None:
    rows, results = bench(tmp_path, "toy", "--warmup", "0", "--repeats", "1", "--noise_draws", "2")
    assert {row["estimator"] for row in results["rows"]} == ESTIMATORS.keys()
    assert {row.estimator for row in rows if row.error is not None} == {"first_order"}
    assert all("direct term" in (row.error or "direct term") for row in rows)
    assert {row.case["horizon"] for row in rows} == {1, 8}
    for row in rows:
        if row.error is None:
            assert None not in (row.time_ratio or row.untimed, row.memory_ratio, row.cosine, row.counts)
            assert (row.noise_to_signal is not None) == row.make().stochastic
            assert row.relative_error is not None
            if row.make().exact == "always" and (not row.make().online or row.case["horizon"] == 1):
                assert row.relative_error < 1e-10
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("\n| ") == len(rows)


def test_only_the_estimators_asked_for(tmp_path: Path) -> None:
    rows, _ = bench(tmp_path, "toy", "--estimators", "sama,one_step", "--repeats", "1", "--horizons", "2")
    assert [row.estimator for row in rows] == ["sama", "one_step", "one_step", "one_step"]


def test_exact_is_what_central_differences_say() -> None:
    episode = regression(BenchmarkArguments("unused"), 5)
    exact = through_all_steps(episode)["decay"]

    def outer(decay: torch.Tensor) -> float:
        lam = {"decay": decay}
        moved = Episode(episode.problem, episode.w, lam, episode.train, episode.val)
        w = by_estimator(moved, Row("one_step", {}, "after_step"))(0).w
        assert w is not None
        return float(episode.problem.outer_loss(w, lam, episode.val))

    for index in (0, 7, 19):
        step = torch.zeros_like(exact)
        step[index] = 1e-5
        slope = (outer(episode.lam["decay"] + step) - outer(episode.lam["decay"] - step)) / 2e-5
        assert slope == pytest.approx(float(exact[index]), rel=1e-6)


def test_an_error_stays_in_its_row(tmp_path: Path, broken: None) -> None:
    rows, results = bench(tmp_path, "toy", "--estimators", "broken,one_step", "--horizons", "1,2,3", "--repeats", "1")
    failed = [row for row in rows if row.error is not None]
    assert [row.error for row in failed] == ["RuntimeError: boom at last"] * len(failed)
    assert {row.estimator for row in failed} == {"broken"}
    assert all(row.time_ratio or row.untimed for row in rows if row.estimator == "one_step")
    assert [row["error"] for row in results["rows"]] == [row.error for row in rows]


# Steps of a MetaTrainer ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tagger_in_both_orders() -> None:
    settings = small(estimators=["first_order", "one_step"], orders=["after_step", "lookahead"])
    settings.variants = {"one_step": ENGINES}
    rows = measure_task(settings, tagger(settings, 1), {"rtn_layer": 1})
    refused, answered = rows[:2], rows[2:]
    assert all("keeps only the direct term" in str(row.error) for row in refused)
    assert [row.error for row in answered] == [None] * 6
    for after, before in zip(answered[::2], answered[1::2], strict=True):
        assert (after.order, before.order) == ("after_step", "lookahead")
        assert after.counts is not None
        assert before.counts is not None
        assert before.counts["forwards"] > after.counts["forwards"], "the step to come takes a pass more"
        assert after.relative_error == before.relative_error
    errors = [row.relative_error for row in answered[::2]]
    assert None not in errors
    assert errors[0] < 1e-2  # type: ignore[operator]
    assert errors[1] < 1e-5  # type: ignore[operator]
    assert errors[2] == 0.0
    assert all(row.memory_increment_mib is not None and row.memory_increment_mib > 0 for row in answered)
    memory = [row.memory_ratio for row in answered[::2]]
    assert memory[2] == max(memory, key=lambda ratio: ratio or 0.0), "double backward holds the larger graph"


def test_the_yardstick_is_a_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows that are refused, nothing but plain steps is made: no meta step, no RTN, another base."""
    settings = small(estimators=["first_order"], repeats=3)
    trainer = tagger(settings, 1)
    meta, base = (tree.clone(one) for one in (trainer.model.meta_parameters(), trainer.model.base_parameters()))
    monkeypatch.setattr(type(trainer.model.meta), "active", lambda *given, **named: pytest.fail("the RTN was on"))
    measure_task(settings, trainer, {})
    assert all(torch.equal(meta[name], leaf) for name, leaf in trainer.model.meta_parameters().items())
    assert not torch.equal(*(one["classifier.weight"] for one in (base, trainer.model.base_parameters())))


def test_a_plain_step_holds_nothing_of_the_estimator_before_it() -> None:
    trainer, held = tagger(small(), 1), []

    class Turn(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (0, 3):
                trainer.use(None if state.global_step else Row("hyperdistill", {"scale": "fixed"}, "after_step", {}))
            held.append(sum(tensor.nbytes for tensor in live_tensors()))

    trainer.args.max_steps = 5
    trainer.add_callback(Turn())
    weights = tree.size(trainer.model.base_parameters()) * 4
    trainer.train()
    assert held[2] - held[4] > weights  # the averages of w


def test_memory_of_a_plain_step_is_four_times_the_weights_and_the_activations() -> None:
    settings = small(estimators=["sama"], warmup=1, model=SMALL_TAGGER | {"vocab_size": 20_000})
    trainer = tagger(settings, 1)
    (row,) = measure_task(settings, trainer, {})
    weights = 4 * tree.size(trainer.model.base_parameters()) / 2**20
    assert row.memory_ratio is not None
    assert row.memory_increment_mib is not None
    plain = (row.memory_increment_mib + 4 * weights) / row.memory_ratio  # less the RTN, which is tiny
    assert 4 * weights < plain < 4.2 * weights


def test_what_bf16_meta_passes_cost_in_accuracy() -> None:
    """Against the exact hypergradient in float32, and each estimate against its own in float32."""
    settings = small(estimators=["one_step", "evograd"], training={"meta_precision": "bf16"})
    settings.variants = {"one_step": [{"engine": "double_backward"}], "evograd": [{"parameters": "^classifier"}]}
    exact, noisy = measure_task(settings, tagger(settings, 1), {})
    assert exact.precision_error == exact.relative_error
    for row in (exact, noisy):
        assert row.precision_error is not None
        assert 1e-4 < row.precision_error < 0.3
        assert row.precision_error <= (row.relative_error or 0.0)


def test_a_step_that_raises_costs_its_row_only(broken: None) -> None:
    settings = small(estimators=["broken", "never_finite", "one_step"], repeats=3)
    rows = measure_task(settings, tagger(settings, 1), {})
    assert [row.error for row in rows] == ["RuntimeError: boom at last", NO_META_STEP, None]
    assert rows[2].time_ratio or rows[2].untimed
    assert [row.time_ratio for row in rows[:2]] == [None, None]


def test_a_step_that_raises_while_memory_is_counted_ends_the_count(broken: None) -> None:
    settings = small(estimators=["one_step", "broken"])
    rows = measure_task(settings, tagger(settings, 1), {})
    assert [row.error for row in rows] == [None, "RuntimeError: boom at last"]
    assert _get_current_dispatch_mode() is None


def test_offline_estimators_need_an_episode() -> None:
    offline = [name for name, cls in ESTIMATORS.items() if not cls().online]
    assert "unroll" in offline
    settings = small(estimators=["unroll"], orders=["after_step", "lookahead"])
    alone = measure_task(settings, tagger(settings, 1), {})
    assert all("set episode_length" in str(row.error) for row in alone)
    settings.training["episode_length"] = 3
    after, before = measure_task(settings, tagger(settings, 1), {})
    assert after.counts is not None
    assert after.counts["hvps"] == 3
    assert "set meta_order: after_step" in str(before.error)


def test_what_cannot_serve_is_refused_before_a_step() -> None:
    settings = small(estimators=["forward_mode", "drmad"], training={"episode_length": 2})
    few, sgd = measure_task(settings, tagger(settings, 1), {})
    assert "meant for at most 64 meta parameters" in str(few.error)
    assert "the inner optimiser is AdamW" in str(sgd.error)


def test_weight_net(tmp_path: Path) -> None:
    variants = {"one_step": [{"engine": "jvp"}], "evograd": [{"copies": 2, "parameters": "^classifier"}]}
    options = ["--estimators", "one_step,evograd", "--repeats", "1", "--noise_draws", "2"]
    options += ["--variants", json.dumps(variants)]
    training = ["--training.per_device_train_batch_size", "8", "--training.per_device_meta_batch_size", "8"]
    rows, _ = bench(tmp_path, "weight_net", *options, *training, "--training.use_cpu", "true")
    assert [row.error for row in rows] == [None] * len(rows)
    assert {row.estimator for row in rows} == {"one_step", "evograd"}
    exact = [row for row in rows if row.settings == {"engine": "jvp"}]
    assert [row.order for row in exact] == ["after_step", "lookahead"]
    assert all(row.relative_error is not None and row.relative_error < 1e-4 for row in exact)


@pytest.mark.parametrize("config", ["rotation", "fewshot"])
def test_the_other_vision_tasks(config: str, tmp_path: Path) -> None:
    options = ["--estimators", "one_step", "--repeats", "1", "--warmup", "0", "--orders", "after_step"]
    options += ["--variants", '{"one_step": [{"engine": "jvp"}]}', "--image_size", "16", "--training.use_cpu", "true"]
    options += ["--widths", "4"] if config == "fewshot" else ["--training.per_device_train_batch_size", "8"]
    ((row,), _) = bench(tmp_path, config, *options, "--training.episode_length", "1")
    assert row.error is None
    assert row.time_ratio or row.untimed
    assert row.relative_error is not None
    assert row.relative_error < 1e-4


def test_the_scaling_study_varies_one_thing_at_a_time(tmp_path: Path) -> None:
    options = ["--blocks", "1", "--image_size", "8", "--widths", "1,2", "--weight_net_hidden", "100,200"]
    batches = [f"--training.per_device_{level}_batch_size=4" for level in ("train", "meta")]
    rows, _ = bench(tmp_path, "weight_net_scaling_cpu", "--estimators", "sama", "--repeats", "1", *options, *batches)
    found = [row.case for row in rows]
    assert found == [
        {"width": 1, "meta_parameters": 301},
        {"width": 1, "meta_parameters": 601},
        {"width": 2, "meta_parameters": 301},
    ]
    assert {file.name for file in tmp_path.iterdir()} >= {"width.png", "meta_parameters.png"}


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--estimators", "one_stepp"], "unknown estimator 'one_stepp': did you mean 'one_step'"),
        (["--variants", '{"evo": [{}]}'], "unknown estimator 'evo'"),
        (["--variants", '{"evograd": {"copies": 2}}'], r"variants: evograd must be a list of mappings"),
        (["--problem", "toy"], "unknown problem 'toy'"),
        (["--orders", "after"], "unknown order 'after'"),
        (["--model", '{"layers": 2}'], "unknown model field 'layers'"),
        (["--training.lr", "1"], "unknown training field 'lr'"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--horizons", "0,2"], "horizons must be whole numbers of at least 1"),
        (["--warmup", "-1"], "warmup must be at least 0"),
        (["--blocks", "0"], "blocks must be at least 1"),
        (["--backbone", "resnet18"], "unknown backbone 'resnet18'"),
        (["--problem", "fewshot"], "unknown backbone 'convnet': .*Valid: resnet10"),
        (["--image_channels", "2"], "image_channels must be 1 or 3, not 2"),
        (["--widths", "1,2"], "widths are of resnet32, .* not of the backbone convnet: leave them out"),
        (["--problem", "peers", "--cases", '{"a": {"problem": "toy"}}'], "cases: a must be .* of weight_net, tagger"),
        (["--problem", "peers", "--cases", '{"a": {"problem": "tagger", "lengt": 8}}'], "of the case a 'lengt'"),
        (["--blocks", "2"], "blocks are of resnet32, not of the backbone convnet"),
    ],
)
def test_bad_settings_say_the_fix(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_settings_that_the_estimator_refuses_are_in_its_row(tmp_path: Path) -> None:
    variants = '{"evograd": [{"copies": 1}, {"copiez": 2}]}'
    rows, _ = bench(tmp_path, "toy", "--estimators", "evograd", "--variants", variants, "--repeats", "1")
    assert ["copies must be" in str(row.error) for row in rows] == [True, False] * 2
    assert ["unknown field" in str(row.error) for row in rows] == [False, True] * 2


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="measures one process"):
        BenchmarkArguments("unused")
