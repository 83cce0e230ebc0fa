"""EvoGrad's one-dimensional problem: what the estimators make of a hypergradient that is known exactly.

    L_T(x, lam) = (x - 1)^2 + lam x^2        L_V(x) = (x - 0.5)^2

The inner optimum is x* = 1 / (1 + lam), so the hypergradient there is (lam - 1) / (lam + 1)^3, and lam = 1 is best.

Two studies: the estimates at random x over a grid of lam, and lam learned together with x from five starts. A *cell*
is one pair (x, lam), a problem of its own; cells stand side by side in vectors.

Source: Bohdal et al., EvoGrad, NeurIPS 2021, section 4.1, figures 2 and 3.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from metaxl_evo.bilevel import SGD, BilevelProblem, hypergradient, run_episode
from metaxl_evo.estimators import ESTIMATORS, Estimator, EvoGrad, make_estimator
from metaxl_evo.estimators.noise import Perturbations
from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.checkpoint import require_writable
from metaxl_evo.training.figures import figure

LAM_RANGE = (0.1, 2.0)  # of the grid, as in the published code; the text says 0 to 2
STARTS = ((-1.8, 0.2), (-0.9, 1.2), (0.9, 0.8), (1.3, 0.2), (1.5, 1.7))  # (x, lam) of the published code
FILES = ("results.json", "hypergradients.png", "trajectories.png")
DIVERGED = 1e6  # far beyond any x, lam or estimate of a run that works
NEAR_ZERO = 1e-3  # of the largest exact value: below it the exact hypergradient has no sign to agree with
Paths = list[list[list[float]]]  # of each start the points [x, lam], the start first


@dataclass
class IllustrationArguments:
    """Which estimators are drawn, and the sizes of the two studies.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    output_dir: str = field(metadata={"help": f"Where {', '.join(FILES)} are written; it may not hold them yet."})
    estimators: list[str] = field(
        default_factory=lambda: ["evograd", "one_step", "conjugate_gradient"],
        metadata={"help": "Names of the estimators."},
    )
    variants: dict[str, Any] = field(
        default_factory=lambda: {
            "evograd": [
                {"copies": copies, "sigma": 1.0, "temperature": 0.5, "noise": "gaussian"} for copies in (2, 10, 100)
            ],
            "one_step": [{"engine": "double_backward"}],
            "conjugate_gradient": [{"engine": "double_backward"}],
        },
        metadata={"help": "Estimator -> list of its settings, a panel each (not named: its default settings)."},
    )
    seed: int = field(default=1, metadata={"help": "Of x and of the noise, alike for every panel."})
    grid: int = field(default=100, metadata={"help": "Values of lam, evenly from 0.1 to 2."})
    repetitions: int = field(default=100, metadata={"help": "Estimates at each lam, x ~ N(0, 1)."})
    iterations: int = field(default=5, metadata={"help": "Updates of x and lam from each of five starts."})
    learning_rate: float = field(default=0.1, metadata={"help": "Of x, also in the inner steps of an estimator."})
    meta_learning_rate: float = field(default=0.1, metadata={"help": "Of lam."})
    episode_length: int = field(
        default=10, metadata={"help": "Inner steps from x that an estimator sees which answers from an episode."}
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir must be the name of a folder")
        for name in (*self.estimators, *self.variants):
            if name not in ESTIMATORS:
                raise ValueError(unknown("estimator", name, ESTIMATORS))
        for name, least in {"grid": 2, "repetitions": 1, "iterations": 1, "episode_length": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, not {self.seed}")
        for name in ("learning_rate", "meta_learning_rate"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        self.contenders()

    def contenders(self) -> dict[str, Estimator]:
        """An estimator for each panel, by a label that tells it from the others of its name.

        Raises:
            ValueError: for settings that an estimator does not have, or for two panels alike.
        """
        made: dict[str, Estimator] = {}
        for name in self.estimators:
            variants = self.variants.get(name, [{}])
            if not (isinstance(variants, list) and variants and all(isinstance(one, dict) for one in variants)):
                raise ValueError(f"variants: {name} must be a list of mappings, as in [{{}}], not {variants!r}")
            ones = [make_estimator(name, **variant) for variant in variants]
            differing = [f.name for f in fields(ones[0]) if len({getattr(one, f.name) for one in ones}) > 1]
            for one in ones:
                label = ", ".join([name, *(f"{setting} {getattr(one, setting)}" for setting in differing)])
                if label in made:
                    raise ValueError(f"estimators: {label} is there twice: give each panel settings of its own")
                made[label] = one
        if not made:
            raise ValueError(f"estimators is empty: name one or more of {', '.join(ESTIMATORS)}")
        return made


@dataclass(frozen=True)
class Panel:
    """What the two studies found out about one estimator.

    Args:
        settings: all fields of the estimator.
        mean, std: of the estimates at each lam of the grid, over the repetitions.
        correlation: of `mean` with the exact hypergradients over the grid; None where it is constant.
        sign_agreement: percent of the grid where `mean` has the sign of the exact hypergradient (not near its zero).
        spread: the average of `std`.
        trajectories: of each start the points [x, lam].
        distance: of each start |lam - the lam of the exact trajectory| at the end.
    """

    label: str
    settings: dict[str, Any]
    mean: list[float]
    std: list[float]
    correlation: float | None
    sign_agreement: float
    spread: float
    trajectories: Paths
    distance: list[float]


# --- the problem -----------------------------------------------------------------------------------------------------


def one_dimensional(learning_rate: float) -> BilevelProblem:
    """The problem with w = {"x"} and lam = {"l2"}, inner steps by SGD; elementwise, so vectors are many cells."""
    return BilevelProblem(
        inner_loss=lambda w, lam, batch: (w["x"] - 1) ** 2 + lam["l2"] * w["x"] ** 2,
        outer_loss=lambda w, lam, batch: (w["x"] - 0.5) ** 2,
        update=SGD(lr=learning_rate),
        direct_term=False,
    )


def exact_hypergradient(lam: Tensor) -> Tensor:
    """d L_V(x*(lam)) / d lam, elementwise."""
    return (lam - 1) / (lam + 1) ** 3


# --- estimates -------------------------------------------------------------------------------------------------------


def estimate(
    settings: IllustrationArguments, estimator: Estimator, x: Tensor, lam: Tensor, generator: torch.Generator
) -> Tensor:
    """The hypergradient estimated once in each cell, (n,).

    An estimator that answers from what it remembers is asked at the end of an episode of inner steps from x, any other
    at x itself. EvoGrad takes all cells at once: 10,000 estimates of 100 copies one by one would take seven minutes.

    Args:
        x, lam: of the cells, (n,) each, in float64.
        generator: where the randomness of the estimates is drawn from.
    """
    problem, batches = one_dimensional(settings.learning_rate), [None] * settings.episode_length
    if isinstance(estimator, EvoGrad):
        seed = int(torch.randint(2**62, (), generator=generator))
        return evograd_estimates(problem, estimator, x, lam, evograd_noise(estimator, x, seed))
    found = []
    for one_x, one_lam in zip(x, lam, strict=True):
        cell = {"x": one_x}, {"l2": one_lam}
        if estimator.remembers == "nothing":
            one = hypergradient(problem, estimator, *cell, None, None, generator=generator)
        else:
            one = run_episode(problem, estimator, *cell, batches, None, generator=generator)
        found.append(one.grads["l2"])
    return torch.stack(found)


def evograd_noise(estimator: EvoGrad, x: Tensor, seed: int) -> Tensor:
    """The estimator's own perturbations of n cells, (copies, n)."""
    noise = Perturbations(
        {"x": x},
        seed,
        copies=estimator.copies,
        kind=estimator.noise,
        sigma=estimator.sigma,
        antithetic=estimator.antithetic,
    )
    return torch.stack([noise[k]["x"] for k in range(estimator.copies)])


def evograd_estimates(problem: BilevelProblem, estimator: EvoGrad, x: Tensor, lam: Tensor, noise: Tensor) -> Tensor:
    """EvoGrad in n cells at once, each with a softmax of its own, (n,): autograd through its equations 3 to 5.

    The same numbers as `hypergradient` with this noise, cell by cell.

    Args:
        x, lam: of the cells, (n,) each.
        noise: the perturbations, (copies, n).
    """
    with torch.enable_grad():
        l2 = lam.detach().requires_grad_()
        losses = problem.inner_loss({"x": x + noise}, {"l2": l2}, None)  # (copies, n)
        weights = torch.softmax(-losses / estimator.temperature, dim=0)
        moved = x + (weights * noise).sum(0)
        outer_loss = problem.outer_loss({"x": moved}, {"l2": l2}, None).sum()  # no cell reads another's lam
        return torch.autograd.grad(outer_loss, l2)[0]


# --- the two studies -------------------------------------------------------------------------------------------------


def grid_of(settings: IllustrationArguments) -> Tensor:
    """The values of lam, (grid,)."""
    return torch.linspace(*LAM_RANGE, settings.grid, dtype=torch.float64)


def estimates_over_grid(settings: IllustrationArguments, estimator: Estimator) -> Tensor:
    """Study A: estimates at x ~ N(0, 1) for every lam of the grid, (grid, repetitions)."""
    generator = torch.Generator().manual_seed(settings.seed)  # anew: the same x and noise in every panel
    x = torch.randn(settings.grid, settings.repetitions, generator=generator, dtype=torch.float64)
    name = type(estimator).__name__
    rows = [
        estimate(settings, estimator, x[row], lam.expand(settings.repetitions), generator)
        for row, lam in enumerate(tqdm(grid_of(settings), desc=name, leave=False))
    ]
    return torch.stack(rows)


def learn(settings: IllustrationArguments, hypergradient_at: Callable[[Tensor, Tensor], Tensor]) -> Paths:
    """Study B: from each start a step of x, then one of its own lam by the hypergradient at the new x, and again."""
    problem = one_dimensional(settings.learning_rate)
    x, lam = torch.tensor(STARTS, dtype=torch.float64).unbind(1)
    points = [torch.stack([x, lam], dim=1)]
    for _ in range(settings.iterations):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(problem.inner_loss({"x": leaf}, {"l2": lam}, None).sum(), leaf)
        x = x - settings.learning_rate * slope
        lam = lam - settings.meta_learning_rate * hypergradient_at(x, lam)
        points.append(torch.stack([x, lam], dim=1))
    return torch.stack(points, dim=1).tolist()


def exact_trajectories(settings: IllustrationArguments) -> Paths:
    """Study B by the exact hypergradient of the trajectory's own lam."""
    return learn(settings, lambda x, lam: exact_hypergradient(lam))


def estimated_trajectories(settings: IllustrationArguments, estimator: Estimator) -> Paths:
    """Study B by an estimator; every panel draws from the same seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    return learn(settings, lambda x, lam: estimate(settings, estimator, x, lam, generator))


def examine(settings: IllustrationArguments, label: str, estimator: Estimator) -> Panel:
    """Both studies of one estimator and what they come to.

    Raises:
        FloatingPointError: where x, lam or an estimate diverges.
    """
    found, exact = estimates_over_grid(settings, estimator), exact_hypergradient(grid_of(settings))
    mean, std = found.mean(1), found.std(1, correction=0)
    trajectories, exact_paths = estimated_trajectories(settings, estimator), exact_trajectories(settings)
    distance = [abs(path[-1][1] - best[-1][1]) for path, best in zip(trajectories, exact_paths, strict=True)]
    for numbers in (found, torch.tensor(trajectories), torch.tensor(distance)):
        if not numbers.abs().max() < DIVERGED:
            raise FloatingPointError(f"{label} diverges: lower learning_rate or meta_learning_rate, or leave it out")
    return Panel(
        label=label,
        settings=asdict(estimator),
        mean=mean.tolist(),
        std=std.tolist(),
        correlation=correlation(mean, exact),
        sign_agreement=sign_agreement(mean, exact),
        spread=std.mean().item(),
        trajectories=trajectories,
        distance=distance,
    )


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's; None where one of them is constant."""
    found = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    return found if math.isfinite(found) else None


def sign_agreement(found: Tensor, exact: Tensor) -> float:
    """Percent of the values with the sign of the exact ones, those left out that are next to zero."""
    told = exact.abs() > NEAR_ZERO * exact.abs().max()
    return 100 * (found.sign() == exact.sign())[told].double().mean().item()


# --- what is left behind ---------------------------------------------------------------------------------------------


def run_illustration(settings: IllustrationArguments) -> dict[str, Any]:
    """Run both studies, write `FILES` and print a table; returns what results.json holds.

    Without matplotlib the figures are left out, which a line says.

    Raises:
        ValueError: where the folder cannot be written or holds another illustration, or no estimator can be drawn.
    """
    folder = Path(settings.output_dir)
    contenders = settings.contenders()
    refused = refusals(contenders)
    if len(refused) == len(contenders):
        raise ValueError(f"nothing to draw: {next(iter(refused.values()))}")
    for name in FILES:
        if (folder / name).exists():
            raise ValueError(f"{folder} holds another illustration ({name}): choose another output_dir")
    require_writable(folder)
    panels = [examine(settings, label, one) for label, one in contenders.items() if label not in refused]
    lams = grid_of(settings)
    results = {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "exact": {
            "lam": lams.tolist(),
            "hypergradient": exact_hypergradient(lams).tolist(),
            "trajectories": exact_trajectories(settings),
        },
        "panels": [asdict(panel) for panel in panels],
        "refused": refused,
    }
    (folder / FILES[0]).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if find_spec("matplotlib"):
        draw_hypergradients(folder / FILES[1], lams, panels, refused)
        draw_trajectories(folder / FILES[2], exact_trajectories(settings), panels, refused)
    else:
        print("no figures without matplotlib: pip install 'metaxl_evo[plot]'")
    print(markdown(panels, refused))
    return results


def refusals(contenders: dict[str, Estimator]) -> dict[str, str]:
    """Of those that cannot serve the problem the reason, by label."""
    point = torch.ones((), dtype=torch.float64)
    refused = {}
    for label, estimator in contenders.items():
        try:
            estimator.check(one_dimensional(0.1), {"x": point}, {"l2": point})
        except ValueError as reason:
            refused[label] = one_line(reason)
    return refused


def markdown(panels: Sequence[Panel], refused: dict[str, str]) -> str:
    """A row for each panel, and a line for each estimator that refused."""
    lines = [
        "| estimator | correlation | sign agreement | spread | distance of the final lam |",
        "|---|---:|---:|---:|---:|",
    ]
    for panel in panels:
        alike = "-" if panel.correlation is None else f"{panel.correlation:.2f}"
        numbers = f"{panel.sign_agreement:.0f} % | {panel.spread:.2g} | {_mean(panel.distance):.2g}"
        lines.append(f"| {panel.label} | {alike} | {numbers} |")
    return "\n".join([*lines, *_notes(refused)])


def draw_hypergradients(file: Path, lams: Tensor, panels: Sequence[Panel], refused: dict[str, str]) -> None:
    """Study A: mean and standard deviation of the estimates at each lam beside the exact hypergradient."""
    exact = exact_hypergradient(lams)
    with _figure(file, panels, refused, "meta parameter λ", "hypergradient") as axes:
        for axis, panel in zip(axes, panels, strict=True):
            mean, std = torch.tensor(panel.mean), torch.tensor(panel.std)
            axis.fill_between(lams, mean - std, mean + std, color="C0", alpha=0.2, linewidth=0, label="± std")
            axis.plot(lams, mean, color="C0", label="mean of the estimates")
            axis.plot(lams, exact, color="black", linestyle="--", label="exact")
            # A scale of its own, which the band may leave where it is widest: it would flatten both curves.
            limit = max(1.1 * exact.abs().max().item(), (mean.abs() + std).quantile(0.9).item())
            axis.set_ylim(-limit, limit)
            alike = "" if panel.correlation is None else f"correlation {panel.correlation:.2f}, "
            agreement = f"sign {panel.sign_agreement:.0f} %, spread {panel.spread:.2g}"
            axis.set_title(f"{panel.label}\n{alike}{agreement}", fontsize="small")


def draw_trajectories(file: Path, exact: Paths, panels: Sequence[Panel], refused: dict[str, str]) -> None:
    """Study B: (x, lam) from each start, by the estimates and by the exact hypergradients."""
    optima = torch.linspace(0, 2, 100)
    with _figure(file, panels, refused, "base parameter x", "meta parameter λ") as axes:
        for axis, panel in zip(axes, panels, strict=True):
            axis.plot(1 / (1 + optima), optima, color="0.75", linewidth=1, label="inner optimum x*(λ)")
            axis.plot(0.5, 1, "*", color="gold", markeredgecolor="black", markersize=12, label="best")
            for number, (path, exact_path) in enumerate(zip(panel.trajectories, exact, strict=True)):
                told = number == 0
                axis.plot(*zip(*exact_path, strict=True), "--", color="black", label="exact" if told else None)
                axis.plot(*zip(*path, strict=True), ".-", color="C0", label="estimated" if told else None)
                axis.plot(*path[0], "o", color="C1", label="start" if told else None)
            axis.set_title(f"{panel.label}\nλ off by {_mean(panel.distance):.2g}", fontsize="small")


@contextmanager
def _figure(file: Path, panels: Sequence[Panel], refused: dict[str, str], x: str, y: str) -> Iterator[list[Any]]:
    """Axes for the panels, three in a row; saved at the end, with a legend above and the refusals below."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 1 + 3 * max(2, columns)  # inches; the legend needs two columns' worth
    notes = "\n".join(textwrap.fill(note, 13 * width) for note in _notes(refused))
    size = (width, 0.9 + 2.6 * rows + 0.2 * notes.count("\n"))
    with figure(file, columns, size, rows=rows, dpi=96) as axes:
        yield axes[: len(panels)]
        for axis in axes[len(panels) :]:
            axis.remove()
        whole = axes[0].figure
        whole.supxlabel(f"{x}\n{notes}".strip(), fontsize="medium")
        whole.supylabel(y, fontsize="medium")
        whole.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize="small")


def _notes(refused: dict[str, str]) -> list[str]:
    return [f"not drawn: {label}: {reason}" for label, reason in refused.items()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
