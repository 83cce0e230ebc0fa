"""The settings in configs/accelerate are what `accelerate launch --config_file` takes them for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "accelerate"
EXPECTED = {  # use_cpu, multi_gpu, num_processes, gpu_ids, mixed_precision
    "cpu": (True, False, 1, "all", "no"),
    "single_gpu": (False, False, 1, "0", "no"),
    "multi_gpu": (False, True, 2, "all", "no"),
    "multi_gpu_bf16": (False, True, 2, "all", "bf16"),
    "fsdp2": (False, False, 2, "all", "no"),
}


def launched_with(name: str, *options: str) -> tuple[object, ...]:
    file = str(FOLDER / f"{name}.yaml")
    parsed = launch_command_parser().parse_args(["--config_file", file, *options, "script.py"])
    args, _, _ = _validate_launch_command(parsed)
    return args.use_cpu, args.multi_gpu, args.num_processes, args.gpu_ids, args.mixed_precision


def test_the_files_are_these():
    files = list(FOLDER.iterdir())
    assert len(files) == 5
    assert {file.name for file in files} == {f"{name}.yaml" for name in EXPECTED}


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)  # a key that accelerate does not know raises in there
    assert launched_with(name) == EXPECTED[name]


def test_the_command_line_chooses_the_number_of_processes():
    assert launched_with("multi_gpu", "--num_processes", "4")[2] == 4


@pytest.mark.slow
def test_launch_on_the_cpu(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import PartialState\ns = PartialState()\nprint(s.device.type, s.num_processes)\n"
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(FOLDER / "cpu.yaml"),
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "1"]
