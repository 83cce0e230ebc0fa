"""The report of a GPU: whether it computes what the CPU does, in which precision, and at what cost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForTokenClassification, XLMRobertaConfig

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.problems import NO_DROPOUT
from metaxl_evo.benchmark.run import run_benchmark
from metaxl_evo.bilevel import SGD, BilevelProblem, Hypergradient, Tree, hypergradient, run_episode, tree
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.estimators import ESTIMATORS, OneStep, make_estimator
from metaxl_evo.experiments.command import run_command
from metaxl_evo.experiments.task import find_task
from metaxl_evo.messages import one_line
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.tagger import TARGET, CrossLingualTagger
from metaxl_evo.training.environment import environment

ENGINES = ("double_backward", "jvp", "finite_difference")
SETTINGS = {"hyperdistill": {"scale": "fixed"}}
TINY: dict[str, Any] = {
    "vocab_size": 50,
    "num_labels": 5,
    "max_position_embeddings": 32,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 16,
}
SHAPES: dict[str, dict[str, Any]] = {  # of XLM-R
    "base": {"vocab_size": 250002, "max_position_embeddings": 514},
    "large": {
        "vocab_size": 250002,
        "max_position_embeddings": 514,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
RATE = 0.1
Table = tuple[str, list[list[str]]]  # a title, and rows of which the first is the head


@dataclass
class GpuReportArguments:
    """Where the report is written, and whether of a GPU.

    Raises:
        ValueError: without a GPU, unless all is made in small.
    """

    output_dir: str = field(metadata={"help": "Where gpu.md and the runs behind it are written."})
    small: bool = field(default=False, metadata={"help": "Each part in small, on the device that there is."})

    def __post_init__(self) -> None:
        if not self.small and not torch.cuda.is_available():
            raise ValueError("the report is of a GPU, and torch sees none here: set small: true for a rehearsal")


def write_gpu_report(settings: GpuReportArguments) -> str:
    """Make every part and write gpu.md after each; returns its text.

    Raises:
        ValueError: for a folder with something in it.
    """
    folder = Path(settings.output_dir)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output_dir: {folder} is not empty: choose another one")
    text = _head(settings)
    for part in (agreement, precisions, kernels, sharing, costs, paper_run):
        title, rows = part(settings)
        text += f"\n## {title}\n\n{_markdown(rows)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.md").write_text(text, encoding="utf-8")
    return text


def agreement(settings: GpuReportArguments) -> Table:
    """Every estimator and engine in float32 on the device, beside float64 on the CPU."""
    found = [["estimator", "settings", "relative error to float64 on the CPU"]]
    for name, own in every_engine():
        found.append([name, _pairs(own), _error_of(name, own)])
    return "Every estimator and engine", found


def precisions(settings: GpuReportArguments) -> Table:
    """Meta passes in bf16 and as torch is set, beside full float32, all on the device."""
    found = [["engine", "meta_precision", "relative error to float32"]]
    for engine in ENGINES:
        own = {"engine": engine, "radius": 0.1}
        for precision in ("tf32", "bf16"):
            pair = [_estimate("one_step", own, precision=one) for one in (precision, "float32")]
            found.append([engine, precision, f"{_relative(*pair):.1e}"])
    return "Precision of meta passes", found


def kernels(settings: GpuReportArguments) -> Table:
    """Attention by sdpa, whose kernels are fused in first-order passes, beside the eager one."""
    found = [["engine", "relative error of sdpa to eager"]]
    for engine in ENGINES:
        pair = [_estimate("one_step", {"engine": engine}, attention=one) for one in ("sdpa", "eager")]
        found.append([engine, f"{_relative(*pair):.1e}"])
    return "Attention kernels", found


def sharing(settings: GpuReportArguments) -> Table:
    """The rows of a batch spread over a process a GPU (two on a CPU), by nccl (gloo), beside one process."""
    cuda = torch.cuda.is_available()
    count = torch.cuda.device_count() if cuda else 2
    with tempfile.TemporaryDirectory() as folder:
        spawn(_share, (count, "nccl" if cuda else "gloo", folder), nprocs=count)
        whole = torch.load(Path(folder) / "0.pt", weights_only=True)
    error = _relative(whole, _shared_problem(Processes(), torch.device("cpu")).grads)
    return "Several processes", [["processes", "relative error to one"], [str(count), f"{error:.1e}"]]


def costs(settings: GpuReportArguments) -> Table:
    """Peak memory and time of a meta step on the shapes of XLM-R base and large, beside the plain step."""
    found = [["shape", "estimator", "settings", "order", "time of a plain step", "peak memory", "MiB", "remark"]]
    variants = {"one_step": [{"engine": one} for one in ENGINES]}
    for shape, model in ({"tiny": TINY} if settings.small else SHAPES).items():
        case = BenchmarkArguments(
            output_dir=str(Path(settings.output_dir) / shape),
            problem="tagger",
            model=dict(model),
            rtn_layer=[model.get("num_hidden_layers", 12)],
            length=16 if settings.small else 64,
            estimators=["one_step", "evograd", "sama"],
            variants=variants,
            orders=["after_step"],
            repeats=1 if settings.small else 9,
            noise_draws=1,
        )
        for row in run_benchmark(case):
            numbers = [row.time, row.memory_ratio, row.peak_mib]
            cells = ["" if one is None else f"{one:.2f}" for one in numbers]
            found.append([shape, row.estimator, _pairs(row.settings), row.order, *cells, row.error or ""])
    return "Time and memory", found


def paper_run(settings: GpuReportArguments) -> Table:
    """200 steps of MetaXL in the paper's setting; in small 2 steps on generated languages."""
    config, language, steps = ("quickstart", "beru", 2) if settings.small else ("metaxl_evograd_paper", "qu", 200)
    folder = str(Path(settings.output_dir) / "paper")
    argv = ["--config", config, "--target_languages", language, "--max_steps", str(steps), "--output_dir", folder]
    argv += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    results = run_command(find_task("ner"), argv)
    return f"{steps} steps of {config}", [["result", "value"], *_numbers(results)]


def every_engine() -> Iterator[tuple[str, dict[str, Any]]]:
    """The estimators with settings, once for each engine that they take; first_order needs another outer loss."""
    for name, cls in ESTIMATORS.items():
        own = SETTINGS.get(name, {})
        if name != "first_order":
            has_engine = "engine" in {one.name for one in fields(cls)}
            yield from (
                (name, {**own, **extra}) for extra in ([{"engine": e} for e in ENGINES] if has_engine else [{}])
            )


# One hypergradient of a small tagger ---------------------------------------------------------------------------------


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _exact(name: str, own: dict[str, Any]) -> Tree:
    return _estimate(name, own, torch.device("cpu"), torch.float64)


def _estimate(
    name: str,
    own: dict[str, Any],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    attention: str = "sdpa",
    precision: str | None = None,
) -> Tree:
    """A hypergradient, in float64 on the CPU, whatever it was computed in and where: of two steps, or of one."""
    device = _device() if device is None else device
    module = _tagger(attention).to(device, dtype)
    w = {name: p.detach() for name, p in module.base_parameters().items()}
    problem, estimator, lam = module.problem(SGD(RATE)), make_estimator(name, **own), module.meta_parameters()
    train, meta = (_batch(device, language) for language in (0, TARGET))
    generator = torch.Generator().manual_seed(0)
    if precision is None:
        found = run_episode(problem, estimator, w, lam, [train, train], meta, generator=generator)
    else:
        found = hypergradient(problem, estimator, w, lam, train, meta, generator=generator, precision=precision)
    return tree.tree_map(lambda leaf: leaf.double().cpu(), found.grads)


def _tagger(attention: str) -> CrossLingualTagger:
    torch.manual_seed(0)
    config: Any = XLMRobertaConfig(**{**NO_DROPOUT, **TINY})
    base = AutoModelForTokenClassification.from_config(config, attn_implementation=attention)
    rtn = RepresentationTransform(TINY["hidden_size"], layers=(1,), bottleneck=1)
    return CrossLingualTagger(base, rtn, pad_token_id=config.pad_token_id)


def _batch(device: torch.device, language: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(language)
    ids = torch.randint(5, TINY["vocab_size"], (4, 8), generator=generator)
    labels = torch.randint(TINY["num_labels"], (4, 8), generator=generator)
    held = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(device) for key, value in {**held, "language": torch.full((4,), language)}.items()}


# Rows over processes -------------------------------------------------------------------------------------------------


def _share(rank: int, count: int, backend: str, folder: str) -> None:
    """What one process does: its share of the rows, and the sum over all."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    store = f"file://{folder}/store"
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=count)
    found = _shared_problem(Processes(rank, count), device)
    torch.save(tree.tree_map(lambda leaf: leaf.cpu(), found.grads), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def _shared_problem(processes: Processes, device: torch.device) -> Hypergradient:
    """Weighted least squares, of which a process has every `size`-th row; a loss is its rows' share of the mean."""
    generator = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((64, 8), (64,), (8,)))

    def loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
        rows = slice(processes.rank, None, processes.size)
        errors = (x.to(device)[rows] @ w["w"] - y.to(device)[rows]).square()
        return (lam["weight"][rows].exp() * errors if batch == "train" else errors).sum() / len(x)

    problem = BilevelProblem(inner_loss=loss, outer_loss=loss, update=SGD(RATE), processes=processes)
    lam = {"weight": torch.zeros(64, dtype=torch.float64, device=device)}
    return hypergradient(problem, OneStep("double_backward"), {"w": w.to(device)}, lam, "train", "meta")


# Words and numbers ---------------------------------------------------------------------------------------------------


def _relative(found: Tree, expected: Tree) -> float:
    found, expected = (tree.tree_map(lambda leaf: leaf.double().cpu(), one) for one in (found, expected))
    return tree.norm(tree.add(found, expected, -1.0)) / tree.norm(expected)


def _error_of(name: str, own: dict[str, Any]) -> str:
    try:
        return f"{_relative(_estimate(name, own), _exact(name, own)):.1e}"
    except Exception as error:  # the report goes on, and says so
        return f"{type(error).__name__}: {one_line(error)}"


def _numbers(results: dict[str, Any], above: str = "") -> Iterator[list[str]]:
    """The scores and times of a run, which are nested by language."""
    for key, value in results.items():
        if isinstance(value, dict) and key not in ("settings", "data", "per_type"):
            yield from _numbers(value, f"{above}{key} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield [f"{above}{key}", f"{value:g}"]


def _pairs(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _head(settings: GpuReportArguments) -> str:
    what = "A rehearsal in small" if settings.small else "The report of a GPU"
    known = environment()
    return f"# On a GPU\n\n{what}: {known['gpu'] or known['cpu']}, torch {known['torch']}, commit {known['commit']}.\n"
