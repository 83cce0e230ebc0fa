"""Make the tables and plots of docs/results/vision_cpu.md: three experiments, and then their costs.

python scripts/reproduce_vision_cpu.py --data DIR [--output_dir runs/vision_cpu] [--jobs 2]

DIR holds `images/` (or `data/images/`), or is that folder. Finished runs are kept, but
those with other settings refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments
from metaxl_evo.training.reproduction import find, run_scripts
from vision_tasks.comparison import page, plot_noise, plot_weight_curves, read_summary
from vision_tasks.fewshot_experiment import FewShotTask
from vision_tasks.noisy_labels_experiment import NoisyLabelsTask
from vision_tasks.rotation_experiment import RotationTask

ROOT = Path(__file__).parents[1]
RATES = ("0", "0.2", "0.4")
MNIST = "mnist_8k_2k.npz"
BOTH = ["--estimators", "one_step,evograd", "--orders", "after_step"]
COSTS = {
    name: ("benchmark_estimators.py", ["--config", str(ROOT / f"configs/benchmark/{config}.yaml"), *options])
    for name, config, options in (
        ("cost_rotation", "rotation", [*BOTH, "--training.use_cpu", "true"]),
        ("cost_fewshot", "fewshot", [*BOTH, "--training.use_cpu", "true"]),
        ("cost_noise", "weight_net_scaling_cpu", []),
    )
}
SHOWN = {"fewshot": FewShotTask.shown, "noise": NoisyLabelsTask.shown, "rotation": RotationTask.shown}


@dataclass
class ComparisonArguments:
    """Settings of the comparison."""

    data: str = field(metadata={"help": "Folder with the images."})
    output_dir: str = field(default="runs/vision_cpu", metadata={"help": "Where the runs, tables and plots go."})
    jobs: int = field(default=2, metadata={"help": "Commands side by side, one thread each."})


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> str:
    """Run what is not finished yet, then print and save the tables."""
    (settings,) = parse_arguments((ComparisonArguments,), argv)
    output = Path(settings.output_dir)
    images = find(Path(settings.data), f"data/images/{MNIST}", f"images/{MNIST}", MNIST).parent
    trainings = experiments(images)
    run_scripts(
        commands(output, trainings, ["--disable_tqdm", "true", "--resume_from_checkpoint", "latest"]), settings.jobs
    )
    costs = {name: how for name, how in COSTS.items() if not (output / name / "table.md").exists()}
    run_scripts(commands(output, costs, []), jobs=1)  # alone, since it measures time
    found = page(output, {name: SHOWN[name.partition("_")[0]] for name in trainings}, list(COSTS))
    (output / "tables.md").write_text(found, encoding="utf-8")
    if find_spec("matplotlib"):
        noise = {float(rate): read_summary(output / f"noise_{rate}") for rate in RATES}
        plot_noise(noise, output / "noise.png")
        plot_weight_curves(noise[0.4], output / "weights.png")
    print(found)
    return found


def commands(
    output: Path, how: dict[str, tuple[str, list[str]]], further: list[str]
) -> dict[Path, tuple[Path, list[str]]]:
    """Log -> script and options, each into a folder of its own; finished runs are kept by the scripts themselves."""
    return {
        output / f"{name}.log": (ROOT / "scripts" / script, [*options, "--output_dir", str(output / name), *further])
        for name, (script, options) in how.items()
    }


def experiments(images: Path) -> dict[str, tuple[str, list[str]]]:
    """Folder -> script and options, the longest first."""
    noise = ["--config", str(ROOT / "configs/vision/noisy_labels_cpu.yaml"), "--data", str(images / MNIST)]
    few = ["--config", str(ROOT / "configs/vision/fewshot_cpu.yaml"), "--data", str(images)]
    rotation = ["--config", str(ROOT / "configs/vision/rotation_cpu.yaml"), "--data", str(images / MNIST)]
    return {
        "fewshot": ("train_fewshot.py", few),
        **{f"noise_{rate}": ("train_noisy_labels.py", [*noise, "--noise_rate", rate]) for rate in reversed(RATES)},
        "rotation": ("train_rotation.py", rotation),
    }


if __name__ == "__main__":
    main()
