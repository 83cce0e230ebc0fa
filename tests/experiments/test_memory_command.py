"""The memory of a run, read off its settings file."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaxl_evo.cli import main
from metaxl_evo.experiments.memory_command import options
from tests.training.tiny import tiny_base

OF_XLMR_LARGE = [
    "--model_name_or_path=FacebookAI/xlm-roberta-large",
    "--head=tokens",
    "--rows=9",  # six that train, and half of the six meta rows
    "--tokens=200",
    "--estimator=one_step",
    "--moments=2",
]


def test_a_file_on_another_says_what_both_say() -> None:
    found = options(["ner/xlmr_large", "--processes", "4"])
    assert found[-2:] == ["--processes", "4"]
    assert found[:-2] == OF_XLMR_LARGE


@pytest.mark.parametrize(
    ("config", "head"),
    [("pos/pos_cpu", "tokens"), ("sentiment/sentiment_cpu", "rows"), ("weighting/mix_text_cpu", "language")],
)
def test_the_head_is_that_of_the_task(config: str, head: str) -> None:
    assert f"--head={head}" in options([config])


def test_options_alone_are_as_they_are() -> None:
    assert options(["--rows", "4"]) == ["--rows", "4"]


def test_options_win_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_base().config.save_pretrained(tmp_path / "model")
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: {tmp_path / 'model'}\nsource_languages: [en]\ntarget_languages: [sw]\n"
                    "max_length: 16\nper_device_train_batch_size: 2\nper_device_meta_batch_size: 3\noptim: sgd\n"
                    "estimator: evograd\ngradient_checkpointing: true\n")  # fmt: skip
    assert main(["estimate-memory", str(file), "--processes", "2", "--rows", "5"]) == 0
    fewer, said, *_, moments = capsys.readouterr().out.splitlines()[:4]
    assert "without gradient_checkpointing" in fewer
    assert said.endswith("head tokens: 2 processes, 5 rows of 16 tokens, evograd, 0 meta parameters")
    assert moments.split()[:2] == ["moments", "0"]


REFUSED = {
    "another task": (
        "vision/rotation_cpu",
        "",
        "no settings file of ner, pos, sentiment, weight_text, mix_text, weight_tags .*: give --model",
    ),
    "optimiser": ("", "optim: adafactor", "optim whose moments are known .adafactor"),
    "engine": ("", "estimator_kwargs: {engine: jvp}", "engine: jvp: .*finite differences alone"),
    "estimator": ("", "estimator: unroll\nepisode_length: 2", "estimator whose memory was measured.*unroll"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_formula_is_not_of_is_refused(case: str, tmp_path: Path) -> None:
    named, lines, message = REFUSED[case]
    file = tmp_path / "run.yaml"
    file.write_text(f"source_languages: [en]\ntarget_languages: [sw]\n{lines}\n")
    with pytest.raises(ValueError, match=message):
        main(["estimate-memory", named or str(file)])
