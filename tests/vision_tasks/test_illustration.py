"""EvoGrad's one-dimensional problem: the estimates, the two studies, and what the script leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import hypergradient
from metaxl_evo.estimators import ESTIMATORS, EvoGrad, make_estimator
from metaxl_evo.training.parser import parse_arguments
from scripts.illustrate import main
from tests.scripts.refusals import assert_refused
from vision_tasks import illustration_report
from vision_tasks.illustration import (
    FILES,
    STARTS,
    IllustrationArguments,
    Panel,
    correlation,
    estimate,
    estimated_trajectories,
    estimates_over_grid,
    evograd_estimates,
    evograd_noise,
    exact_hypergradient,
    exact_trajectories,
    examine,
    grid_of,
    one_dimensional,
    sign_agreement,
)

CONFIG = Path(__file__).parents[2] / "configs/vision/illustration.yaml"
PAPER_NOISE: dict[str, Any] = {"sigma": 1.0, "temperature": 0.5, "noise": "gaussian"}
SMALL = ["--grid", "4", "--repetitions", "3", "--iterations", "2", "--episode_length", "3"]

# Measured by others over 1e5 and more samples: lam -> (mean, standard deviation) of one estimate, x ~ N(0, 1)
EXPECTATION = {
    2: {0.1: (-0.1751, 0.94), 0.25: (-0.1072, 0.77), 0.5: (-0.0410, 0.57), 1.0: (0.0047, 0.40), 1.5: (0.0151, 0.30),
        2.0: (0.0164, 0.25)},
    10: {0.1: (-0.3261, 0.41), 0.25: (-0.2006, 0.28), 0.5: (-0.0849, 0.17), 1.0: (-0.0003, 0.10), 1.5: (0.0216, 0.08),
         2.0: (0.0264, 0.07)},
    100: {0.1: (-0.3216, 0.29), 0.25: (-0.1898, 0.20), 0.5: (-0.0744, 0.11), 1.0: (0.0083, 0.05), 1.5: (0.0284, 0.03),
          2.0: (0.0314, 0.02)},
}  # fmt: skip
REFERENCE_SAMPLES, SAMPLES = 100_000, {2: 200_000, 10: 50_000, 100: 10_000}
CELLS = [(copies, lam) for copies, row in EXPECTATION.items() for lam in row]


def settings(**fields: Any) -> IllustrationArguments:
    return IllustrationArguments(output_dir="unused", **fields)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def estimate_at(name: str, x: Tensor, lam: Tensor, episode_length: int = 10, **fields: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return estimate(settings(episode_length=episode_length), make_estimator(name, **fields), x, lam, generator)


def one_step_by_hand(x: float, lam: float, rate: float = 0.1) -> float:
    """d (x' - 1/2)^2 / d lam through one step of gradient descent x' = x - rate (2 (x - 1) + 2 lam x)."""
    after = x - rate * (2 * (x - 1) + 2 * lam * x)
    return 2 * (after - 0.5) * (-2 * rate * x)


def by_the_estimator(estimator: EvoGrad, x: float, lam: float, noise: Tensor) -> float:
    """EvoGrad's own estimate in one cell, with given perturbations (K,)."""
    cell = {"x": torch.tensor(x, dtype=torch.float64)}, {"l2": torch.tensor(lam, dtype=torch.float64)}
    trees = [{"x": eps} for eps in noise]
    return hypergradient(one_dimensional(0.1), estimator, *cell, None, None, noise=trees).grads["l2"].item()


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib were not installed."""
    monkeypatch.setattr(illustration_report, "find_spec", lambda name: None)


# --- the problem and the estimates -----------------------------------------------------------------------------------


def test_the_exact_hypergradient_is_that_at_the_inner_optimum() -> None:
    problem = one_dimensional(0.1)
    lam = grid_of(settings()).requires_grad_()
    optimum = 1 / (1 + lam)
    x = optimum.detach().requires_grad_()
    (slope,) = torch.autograd.grad(problem.inner_loss({"x": x}, {"l2": lam.detach()}, None).sum(), x)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-14)
    (found,) = torch.autograd.grad(problem.outer_loss({"x": optimum}, {"l2": lam}, None).sum(), lam)
    torch.testing.assert_close(exact_hypergradient(lam.detach()), found, rtol=1e-12, atol=1e-14)


def test_one_step_at_the_golden_points() -> None:
    found = estimate_at("one_step", vector(-1, 0.3, 1), vector(0.5, 0.5, 0.5))
    torch.testing.assert_close(found, vector(-0.4, 0.0108, -0.16), rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ["auto", "double_backward"])
def test_one_step_is_its_closed_form(engine: str) -> None:
    x, lam = torch.randn(20, generator=torch.Generator().manual_seed(3)).double(), torch.linspace(0.1, 2, 20).double()
    expected = vector(*map(one_step_by_hand, x.tolist(), lam.tolist()))
    torch.testing.assert_close(estimate_at("one_step", x, lam, engine=engine), expected, rtol=1e-9, atol=1e-12)


def test_conjugate_gradient_is_the_implicit_derivative_at_x() -> None:
    x, lam = vector(-1, 0.3, 1, 2 / 3), vector(0.5, 0.5, 2, 0.5)
    expected = -2 * (x - 0.5) * 2 * x / (2 * (1 + lam))
    torch.testing.assert_close(estimate_at("conjugate_gradient", x, lam, damping=0.0), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(expected[3], exact_hypergradient(lam[3]))  # 2/3 is the inner optimum of 1/2


@pytest.mark.parametrize("name", ["unroll", "forward_mode", "hyperdistill", "drmad", "greedy"])
def test_what_remembers_is_asked_at_the_end_of_an_episode(name: str) -> None:
    """One inner step is one_step, for all of them; a second one adds what the first did."""
    x, lam = vector(-1, 0.3), vector(0.5, 1.5)
    short, longer = (estimate_at(name, x, lam, episode_length=steps) for steps in (1, 2))
    torch.testing.assert_close(short, vector(*map(one_step_by_hand, x.tolist(), lam.tolist())), rtol=1e-9, atol=1e-12)
    assert float((longer - short).abs().min()) > 1e-3


def test_a_long_unrolled_episode_ends_at_the_exact_hypergradient() -> None:
    lam = vector(0.1, 1.7)
    found = estimate_at("unroll", vector(-1, 1), lam, episode_length=150)
    torch.testing.assert_close(found, exact_hypergradient(lam), rtol=1e-9, atol=0)


evograd_fields = pytest.mark.parametrize(
    "fields",
    [PAPER_NOISE, {}, {**PAPER_NOISE, "sigma": 0.3, "antithetic": True}, {"share_randomness": False}],
    ids=["paper", "default", "antithetic", "own_randomness"],
)


@evograd_fields
def test_evograd_in_a_single_cell_is_the_estimator_with_noise_of_its_own(fields: dict[str, Any]) -> None:
    """Of one cell the noise too is that which the estimator draws from the same generator."""
    estimator, x, lam = EvoGrad(copies=10, **fields), vector(0.3), vector(0.5)
    found = estimate(settings(), estimator, x, lam, torch.Generator().manual_seed(3))
    cell, generator = ({"x": x[0]}, {"l2": lam[0]}), torch.Generator().manual_seed(3)
    expected = hypergradient(one_dimensional(0.1), estimator, *cell, None, None, generator=generator).grads["l2"]
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-15)
    assert expected != 0


@evograd_fields
def test_evograd_in_all_cells_at_once_is_the_estimator_cell_by_cell(fields: dict[str, Any]) -> None:
    estimator = EvoGrad(copies=10, **fields)
    x, lam = torch.randn(12, generator=torch.Generator().manual_seed(5)).double(), torch.linspace(0.1, 2, 12).double()
    noise = evograd_noise(estimator, x, seed=7)
    assert len(noise.unique()) == noise.numel() or estimator.noise == "sign"
    found = evograd_estimates(one_dimensional(0.1), estimator, x, lam, noise)
    cells = zip(x.tolist(), lam.tolist(), noise.unbind(1), strict=True)
    expected = vector(*(by_the_estimator(estimator, *cell) for cell in cells))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert float(found.abs().min()) > 0


def test_the_curve_of_evograd_is_made_of_the_estimators_own_estimates() -> None:
    """x and the noise are drawn again here; every cell of the grid is then asked of `hypergradient`."""
    given, estimator = settings(grid=3, repetitions=4, seed=11), EvoGrad(copies=5, **PAPER_NOISE)
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    expected = []
    for row, lam in enumerate((0.1, 1.05, 2.0)):
        seed = int(torch.randint(2**62, (), generator=generator))
        noise = evograd_noise(estimator, x[row], seed)
        expected.append([by_the_estimator(estimator, one, lam, noise[:, n]) for n, one in enumerate(x[row].tolist())])
    found = estimates_over_grid(given, estimator)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-15)


# --- EvoGrad's mean and noise on this problem ------------------------------------------------------------------------


@pytest.mark.parametrize(("copies", "lam"), CELLS)
def test_mean_and_noise_of_evograd(copies: int, lam: float) -> None:
    """Within four standard errors of the table, whose last digit of the deviation is rounded."""
    count, (mean, std) = SAMPLES[copies], EXPECTATION[copies][lam]
    generator = torch.Generator().manual_seed(copies)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    where = x, torch.full_like(x, lam)
    found = estimate(settings(), EvoGrad(copies=copies, **PAPER_NOISE), *where, generator)
    error = found.std().item() * math.sqrt(1 / count + 1 / REFERENCE_SAMPLES)
    assert abs(found.mean().item() - mean) < 4 * error + 5e-5
    fourth = ((found - found.mean()) ** 4).mean().item()
    error_of_variance = math.sqrt((fourth - found.var().item() ** 2) * (1 / count + 1 / REFERENCE_SAMPLES))
    assert abs(found.std().item() - std) < 4 * error_of_variance / (2 * found.std().item()) + 5e-3


def test_the_table_is_complete() -> None:
    assert len(CELLS) == 18


@pytest.mark.parametrize(("x", "expected"), [(-1, 0.03499), (0.3, -0.0802), (1, -0.1749)])
def test_many_copies_come_to_a_proximal_step_and_not_to_the_optimum(x: float, expected: float) -> None:
    """The closed form for Gaussian noise: x* = argmin L_T / tau + (x' - x)^2 / (2 sigma^2)."""
    estimator, cells = EvoGrad(copies=2000, **PAPER_NOISE), 200
    where = torch.full((cells,), float(x), dtype=torch.float64), torch.full((cells,), 0.5, dtype=torch.float64)
    found = estimate(settings(), estimator, *where, torch.Generator().manual_seed(1))
    stiffness, pull = 1 + 2 * 1.5 / 0.5, x + 2 / 0.5
    proximal = 2 * (pull / stiffness - 0.5) * (-(2 / 0.5) * pull / stiffness**2)
    assert proximal == pytest.approx(expected, abs=6e-5)
    # the mean's own bias is of the order of 1 / copies
    assert abs(found.mean().item() - proximal) < 4 * found.std().item() / math.sqrt(cells) + 2e-4
    assert abs(proximal - exact_hypergradient(vector(0.5)).item()) > 0.02


@pytest.fixture(scope="module")
def paper_panels() -> dict[int, Panel]:
    """The paper's three panels at its own sizes, by copies."""
    return {copies: examine(settings(), str(copies), EvoGrad(copies=copies, **PAPER_NOISE)) for copies in (2, 10, 100)}


def test_more_copies_follow_the_exact_curve(paper_panels: dict[int, Panel]) -> None:
    """Correlation, sign and spread, as measured elsewhere: 0.75, 0.98, 0.99 and 71, 94, 96 %."""
    few, more, many = (paper_panels[copies] for copies in (2, 10, 100))
    assert few.correlation is not None
    assert more.correlation is not None
    assert many.correlation is not None
    assert 0.5 < few.correlation < 0.9 < min(more.correlation, many.correlation)
    assert 60 < few.sign_agreement < 85 < 90 < min(more.sign_agreement, many.sign_agreement)
    assert few.spread > 1.5 * more.spread > 1.5 * 1.3 * many.spread
    assert [len(few.mean), len(few.std)] == [100, 100]


def test_a_panel_holds_all_fields_of_its_estimator_and_the_average_deviation(paper_panels: dict[int, Panel]) -> None:
    assert EvoGrad(**paper_panels[10].settings) == EvoGrad(copies=10, **PAPER_NOISE)
    assert paper_panels[10].spread == pytest.approx(sum(paper_panels[10].std) / 100)


def test_correlation_and_sign_agreement() -> None:
    exact = vector(-1, -0.5, 1e-4, 0.5, 1)
    assert correlation(3 * exact - 7, exact) == pytest.approx(1)
    assert correlation(-exact, exact) == pytest.approx(-1)
    assert correlation(torch.ones(5).double(), exact) is None
    assert sign_agreement(vector(-9, 0.1, -3, 1, 1), exact) == 75  # the one near zero does not count
    assert sign_agreement(vector(0, 0, 0, 0, 1), exact) == 25


# --- learning lam together with x ------------------------------------------------------------------------------------


def by_hand(hypergradient_at: Any, iterations: int = 5) -> list[list[list[float]]]:
    """Trajectories in plain Python, steps of 0.1."""
    paths = []
    for x, lam in STARTS:
        path = [[x, lam]]
        for _ in range(iterations):
            x -= 0.1 * (2 * (x - 1) + 2 * lam * x)
            lam -= 0.1 * hypergradient_at(x, lam)
            path.append([x, lam])
        paths.append(path)
    return paths


def assert_same_paths(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_the_exact_trajectory_follows_its_own_lam() -> None:
    expected = by_hand(lambda x, lam: (lam - 1) / (lam + 1) ** 3)
    assert_same_paths(exact_trajectories(settings()), expected)
    assert [path[0] for path in expected] == [list(start) for start in STARTS]
    assert [len(path) for path in expected] == [6] * 5


def test_an_estimated_trajectory_takes_the_estimate_at_the_new_x() -> None:
    found = estimated_trajectories(settings(), make_estimator("one_step"))
    assert_same_paths(found, by_hand(one_step_by_hand))


def test_the_exact_trajectory_is_the_same_in_every_panel(tmp_path: Path, no_figures: None) -> None:
    """It does not see the estimates: the distances of a panel are to the one that results.json holds."""
    results = main(["--output_dir", str(tmp_path), "--estimators", "evograd", "one_step", *SMALL])
    assert len(results["panels"]) == 4
    assert_same_paths(results["exact"]["trajectories"], by_hand(lambda x, lam: (lam - 1) / (lam + 1) ** 3, 2))
    for panel in results["panels"]:
        ends = zip(panel["trajectories"], results["exact"]["trajectories"], strict=True)
        assert panel["distance"] == [abs(path[-1][1] - exact[-1][1]) for path, exact in ends]


def test_every_panel_is_seeded_alike(tmp_path: Path, no_figures: None) -> None:
    """The first and the last panel differ in a setting that this problem does not see, whatever was drawn between."""
    same, seeds = {"copies": 3, **PAPER_NOISE}, (1, 2)
    variants = [same, {"copies": 10}, {**same, "share_randomness": False}]
    found = {}
    for seed in seeds:
        given = ["--output_dir", str(tmp_path / str(seed)), "--estimators", "evograd", "--seed", str(seed), *SMALL]
        first, between, last = main([*given, "--variants", json.dumps({"evograd": variants})])["panels"]
        for key in ("mean", "std", "trajectories", "distance"):
            assert first[key] == last[key]
            assert first[key] != between[key]
        found[seed] = first
    assert found[1]["mean"] != found[2]["mean"]


# --- what is left behind ---------------------------------------------------------------------------------------------


def test_the_config_is_the_papers_and_the_default() -> None:
    (found,) = parse_arguments((IllustrationArguments,), ["--config", str(CONFIG), "--output_dir", "unused"])
    assert found == settings()
    assert (found.grid, found.repetitions, found.iterations, found.seed) == (100, 100, 5, 1)
    assert (found.learning_rate, found.meta_learning_rate) == (0.1, 0.1)
    assert found.variants["evograd"] == [{"copies": copies, **PAPER_NOISE} for copies in (2, 10, 100)]
    assert [*found.contenders()] == [
        "evograd, copies 2", "evograd, copies 10", "evograd, copies 100", "one_step", "conjugate_gradient",
    ]  # fmt: skip
    lams = grid_of(found)
    assert [len(lams), lams[0].item(), lams[-1].item()] == [100, 0.1, 2.0]


def test_every_registered_estimator_is_drawn_or_its_refusal_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(ESTIMATORS) >= 11
    given = ["--output_dir", str(tmp_path), "--estimators", *ESTIMATORS, "--variants", "{}", *SMALL]
    results = main(given)
    drawn, refused = [panel["label"] for panel in results["panels"]], results["refused"]
    assert sorted([*drawn, *refused]) == sorted(ESTIMATORS)
    assert [*refused] == ["first_order"]
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in drawn)
    assert "not drawn: first_order: first_order keeps only the direct term" in table
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    for name in ("hypergradients.png", "trajectories.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_without_matplotlib_the_numbers_are_written_and_a_line_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_figures: None
) -> None:
    main(["--output_dir", str(tmp_path), "--estimators", "evograd", *SMALL])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert "pip install 'metaxl_evo[plot]'" in capsys.readouterr().out.splitlines()[0]


REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown_estimator": (["--estimators", "evogard"], "unknown estimator 'evogard': did you mean 'evograd'"),
    "unknown_in_variants": (["--variants", '{"evogard": [{}]}'], "unknown estimator 'evogard'"),
    "no_estimator": (["--estimators", "[]"], "estimators is empty: name one or more of first_order, one_step"),
    "twice": (["--estimators", "one_step", "one_step"], "one_step is there twice"),
    "variants_alike": (["--variants", '{"evograd": [{}, {"copies": 2}]}'], "evograd is there twice"),
    "no_list": (["--variants", '{"evograd": {"copies": 2}}'], r"evograd must be a list of mappings, as in \[\{\}\]"),
    "no_variant": (["--variants", '{"evograd": []}'], "evograd must be a list of mappings"),
    "unknown_field": (["--variants", '{"evograd": [{"copy": 2}]}'], "unknown field of evograd 'copy': did you mean"),
    "bad_field": (["--variants", '{"evograd": [{"copies": 1}]}'], "copies must be an integer of at least 2, not 1"),
    "repetitions": (["--repetitions", "0"], "repetitions must be at least 1, not 0"),
    "grid": (["--grid", "1"], "grid must be at least 2, not 1"),
    "iterations": (["--iterations", "0"], "iterations must be at least 1, not 0"),
    "episode_length": (["--episode_length", "-3"], "episode_length must be at least 1, not -3"),
    "negative_seed": (["--seed", "-1"], "seed must be at least 0, not -1"),
    "large_seed": (["--seed", str(2**63)], r"seed must be below 2\^63"),
    "learning_rate": (["--learning_rate", "0"], "learning_rate must be a positive number, not 0"),
    "infinite_rate": (["--meta_learning_rate", "inf"], "meta_learning_rate must be a positive number, not inf"),
    "only_refusals": (["--estimators", "first_order"], "nothing to draw: first_order keeps only the direct term"),
    "unmatched": (["--estimators", "evograd", "--variants", '{"evograd": [{"parameters": "y"}]}'], "finds none of"),
    "no_folder": (["--output_dir", ""], "output_dir must be the name of a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(case: str, tmp_path: Path) -> None:
    given, message = REFUSED[case]
    assert_refused(main, ["--output_dir", str(tmp_path / "out"), *given], message, kept=tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_with_another_illustration_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    message = rf"holds another illustration \({name}\): choose another output_dir"
    assert_refused(main, ["--output_dir", str(tmp_path), *SMALL], message, kept=tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    given = ["--output_dir", str(tmp_path / "file" / "out"), *SMALL]
    assert_refused(main, given, "output_dir: .* cannot be written", kept=tmp_path)


def test_other_files_of_the_folder_stay(tmp_path: Path, no_figures: None) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    main(["--output_dir", str(tmp_path), "--estimators", "evograd", *SMALL])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "results.json"]


@pytest.mark.parametrize(
    "rates", [["--learning_rate", "1000"], ["--meta_learning_rate", "1e9"]], ids=["inner", "meta"]
)
def test_what_diverges_is_one_line(rates: list[str], tmp_path: Path) -> None:
    given = ["--output_dir", str(tmp_path), "--estimators", "one_step", *SMALL, *rates, "--iterations", "9"]
    assert_refused(main, given, "one_step diverges: lower learning_rate", kept=tmp_path)
