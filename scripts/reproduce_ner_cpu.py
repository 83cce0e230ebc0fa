"""Make the table of docs/results/ner_cpu.md: five methods, three targets, three seeds, on a small pretrained XLM-R.

python scripts/reproduce_ner_cpu.py --data DIR [--output_dir runs/ner_cpu] [--jobs 2]

DIR holds `wikiann/LANG/{train,dev,test}` and `xlmr-mini/` (or `data/wikiann` and `models/xlmr-mini`).
Finished runs are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from metaxl_evo.ner.comparison import read_comparison, run_folder
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments
from metaxl_evo.training.reproduction import find, run_scripts
from metaxl_evo.training.runs import RESULTS

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "scripts/train_ner.py"
METHODS = {
    "target_only": ["--method", "target_only"],
    "joint_training_equal": ["--method", "joint_training_equal"],
    "frozen_rtn": ["--method", "frozen_rtn"],
    "metaxl_one_step": ["--estimator", "one_step"],
    "metaxl_evograd": ["--estimator", "evograd", "--estimator_kwargs", '{"copies": 64, "parameters": "^classifier"}'],
}


@dataclass
class ComparisonArguments:
    """Settings of the comparison."""

    data: str = field(metadata={"help": "Folder with the data and the small model."})
    output_dir: str = field(default="runs/ner_cpu", metadata={"help": "Where the runs and the table go."})
    languages: list[str] = field(default_factory=lambda: ["sw", "ig", "rw"], metadata={"help": "Targets."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run each."})
    jobs: int = field(default=2, metadata={"help": "Runs side by side, one thread each."})


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> str:
    """Run what is not finished yet, then print and save the table."""
    (settings,) = parse_arguments((ComparisonArguments,), argv)
    output = Path(settings.output_dir)
    keys = [(m, lang, seed) for seed in settings.seeds for lang in settings.languages for m in METHODS]
    runs = {run_folder(output, *key): options_of(Path(settings.data), run_folder(output, *key), *key) for key in keys}
    runs = {folder: options for folder, options in runs.items() if not (folder / RESULTS).exists()}
    run_scripts({folder / "train.log": (TRAIN, options) for folder, options in runs.items()}, settings.jobs)
    for folder in runs:
        for checkpoint in folder.glob("checkpoint-*"):  # the model and its scores stay
            shutil.rmtree(checkpoint)
    comparison = read_comparison(output, list(METHODS), settings.languages, settings.seeds)
    table = comparison.markdown("joint_training_equal")
    (output / "table.md").write_text(table, encoding="utf-8")
    if find_spec("matplotlib"):
        comparison.plot(output / "f1.png")
    print(table)
    return table


def options_of(data: Path, folder: Path, method: str, language: str, seed: int) -> list[str]:
    """The command line of one training run."""
    return [
        *("--config", str(ROOT / "configs/ner/wikiann_cpu.yaml")),
        *("--model_name_or_path", str(find(data, "models/xlmr-mini", "xlmr-mini"))),
        *("--dataset", str(find(data, "data/wikiann", "wikiann"))),
        *("--target_languages", language, "--seed", str(seed), "--output_dir", str(folder), *METHODS[method]),
        *("--disable_tqdm", "true", "--resume_from_checkpoint", "latest"),
    ]


if __name__ == "__main__":
    main()
