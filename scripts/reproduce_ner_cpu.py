"""Make the table of docs/results/ner_cpu.md: five methods, three targets, three seeds, on a small pretrained XLM-R.

python scripts/reproduce_ner_cpu.py --data DIR [--output_dir runs/ner_cpu] [--jobs 2]

DIR holds `wikiann/LANG/{train,dev,test}` and `xlmr-mini/` (or `data/wikiann` and `models/xlmr-mini`).
Finished runs are kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from metaxl_evo.ner.comparison import read_comparison, run_folder
from metaxl_evo.training.cli import ends_with_one_line, parse_arguments

ROOT = Path(__file__).parents[1]
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
    missing = [key for key in keys if not (run_folder(output, *key) / "results.json").exists()]
    with ThreadPoolExecutor(settings.jobs) as pool:
        done = pool.map(lambda key: run_one(Path(settings.data), run_folder(output, *key), *key), missing)
        list(tqdm(done, total=len(missing), desc="runs"))
    comparison = read_comparison(output, list(METHODS), settings.languages, settings.seeds)
    table = comparison.markdown("joint_training_equal")
    (output / "table.md").write_text(table, encoding="utf-8")
    if find_spec("matplotlib"):
        comparison.plot(output / "f1.png")
    print(table)
    return table


def run_one(data: Path, folder: Path, method: str, language: str, seed: int) -> None:
    """One training run in a process of its own; its output goes into `train.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "scripts/train_ner.py"),
        "--config",
        str(ROOT / "configs/ner/wikiann_cpu.yaml"),
    ]
    command += ["--model_name_or_path", str(find(data, "models/xlmr-mini", "xlmr-mini"))]
    command += ["--dataset", str(find(data, "data/wikiann", "wikiann"))]
    command += ["--target_languages", language, "--seed", str(seed), "--output_dir", str(folder), *METHODS[method]]
    command += ["--disable_tqdm", "true", "--resume_from_checkpoint", "latest"]
    log = folder / "train.log"
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(
            command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ).returncode
    if code:
        raise ValueError(f"{method}, {language}, seed {seed} failed: see {log}")
    for checkpoint in folder.glob("checkpoint-*"):  # the model and its scores stay
        shutil.rmtree(checkpoint)


def find(data: Path, *places: str) -> Path:
    """The first of the places that exists below `data`."""
    for place in places:
        if (data / place).is_dir():
            return data / place
    raise ValueError(f"{data} has no {' or '.join(places)}: give --data (DATA=...) the folder that holds it")


if __name__ == "__main__":
    main()
