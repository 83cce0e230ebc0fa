"""What a study is about: the settings of a task, its data, its trainer and its scores."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators import Estimator
from metaxl_evo.experiments.arguments import StudyArguments
from metaxl_evo.experiments.curves import outline_table
from metaxl_evo.experiments.fingerprint import fingerprints
from metaxl_evo.experiments.folders import hub_id
from metaxl_evo.experiments.records import Record
from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer

TASKS = {
    "ner": "metaxl_evo.ner.task:NerTask",
    "pos": "metaxl_evo.ner.task:PosTask",
    "sentiment": "metaxl_evo.ner.task:SentimentTask",
    "noisy_labels": "vision_tasks.noisy_labels_task:NoisyLabelsTask",
    "rotation": "vision_tasks.rotation_task:RotationTask",
    "hyper_cleaning": "vision_tasks.hyper_cleaning_task:HyperCleaningTask",
    "schedule": "vision_tasks.schedule_task:ScheduleTask",
    "fewshot": "vision_tasks.fewshot_task:FewShotTask",
    "many_shot": "vision_tasks.many_shot_task:ManyShotTask",
    "sinusoid": "metaxl_evo.long_horizon.sinusoid_task:SinusoidTask",
    "weight_text": "metaxl_evo.weighting.weight_task:WeightTextTask",
    "weight_tags": "metaxl_evo.weighting.tag_task:WeightTagsTask",
    "schedule_text": "metaxl_evo.weighting.schedule_text_task:ScheduleTextTask",
    "mix_text": "metaxl_evo.weighting.mix_task:MixTextTask",
}
Settings = TypeVar("Settings")
Data = TypeVar("Data")


class Task(ABC, Generic[Settings, Data]):
    """What differs between studies; how runs are planned, made, kept and compared is the same for all.

    Attributes:
        settings: the dataclass of the task's settings.
        training: that of the training arguments, where the task has defaults of its own.
        title: of the model card.
        units: test score -> its unit, of those in tables; "%" shows a fraction as percent. The first is compared.
        shown_only: of these scores, those that are neither better nor worse where they are higher.
        greater_is_better: of the score that is compared.
        case: a setting that is a list (languages, ...): each of its items is a case, trained and tested by itself.
        sources: what the card cites.
        usage: how what is left behind is loaded, in Python; it runs as printed in the folder of the run.
        own_files: names that a run writes beyond those of any run.
        configs: the folder of `configs/` in which its settings files are found by name.
        inputs: settings that may name a folder to read from, which is no `output_dir`.
    """

    settings: type[Settings]
    training: type[MetaTrainingArguments] = MetaTrainingArguments
    title: str = "Training run"
    units: ClassVar[Mapping[str, str]] = {"accuracy": "%"}
    shown_only: Sequence[str] = ()
    greater_is_better: bool = True
    case: str | None = None
    sources: Sequence[str] = ()
    usage: str = ""
    own_files: Sequence[str] = ()
    configs: str | None = None
    inputs: Sequence[str] = ("data", "dataset", "meta_data", "model_name_or_path", "rtn_name_or_path", "encoder")

    @abstractmethod
    def load(self, settings: Settings, args: MetaTrainingArguments) -> Data:
        """The data of one run.

        Raises:
            ValueError: for data that cannot serve.
        """

    @abstractmethod
    def build_trainer(self, settings: Settings, args: MetaTrainingArguments, data: Data) -> MetaTrainer:
        """The trainer of one run; whatever cannot work is a ValueError here, before any training."""

    @abstractmethod
    def score(self, trainer: MetaTrainer, settings: Settings, data: Data) -> Mapping[str, Any]:
        """The test scores of the trained model; a `Rate` among them brings its test examples."""

    def fingerprints(self, data: Data) -> Mapping[str, str]:
        """Part of the data -> what changes with its rows; a run is not resumed on others."""
        return fingerprints(data)

    def dev_score(self, trainer: MetaTrainer, settings: Settings, data: Data) -> Mapping[str, Any] | None:
        """The scores of the set that chose the checkpoint, where there is one."""
        return None

    def flat_scores(self, test: Mapping[str, Any]) -> Mapping[str, Any]:
        """What `score` returned as score -> number, where it is more than that."""
        return test

    def learns(self, settings: Settings) -> bool:
        """Whether the method learns on the meta level; if not, the estimator is `none`."""
        return True

    def refuse(self, settings: Settings, args: MetaTrainingArguments) -> None:
        """Refuse what the Trainer offers and this task cannot use.

        Raises:
            ValueError: one line with the setting and the way out.
        """

    def fit_arguments(self, settings: Settings, args: MetaTrainingArguments, data: Data) -> MetaTrainingArguments:
        """The training arguments as these data and this method need them."""
        return args

    def describe(self, trainer: MetaTrainer, settings: Settings, data: Data, start: Tree) -> dict[str, Any]:
        """What else is to be known of a trained run (plain values); `start`: its first meta parameters."""
        return {}

    def findings(self, run: Mapping[str, Any]) -> str:
        """What a run has found beside its scores, of its facts in the results: Markdown, printed and in the card."""
        return ""

    def describe_check(self, trainer: MetaTrainer, settings: Settings, data: Data) -> tuple[dict[str, Any], list[str]]:
        """What `--check` finds of this task beside the findings of any: facts and problems."""
        return {}, []

    def card_text(self, settings: Settings) -> str:
        """What the model card says of this task and method, in a sentence or two."""
        return ""

    def card_metadata(self, settings: Settings) -> dict[str, Any]:
        """What the card's metadata say: fields of `MetaTrainer.create_model_card`."""
        return {}

    def card_usage(self, settings: Settings) -> str:
        """How what is left behind is loaded, in Python, where that depends on the settings."""
        return self.usage

    def card_data(self, settings: Settings, data: Data, results: Mapping[str, Any]) -> dict[str, Any]:
        """Further metadata: fields of `huggingface_hub.ModelCardData`, such as `eval_results` and `widget`."""
        return {}

    def card_sections(
        self, results: Mapping[str, Any], settings: Settings, estimator: Estimator | None
    ) -> Sequence[str]:
        """The card in Markdown: what it is, how to use it, scores, settings, citations."""
        facts = results["run"]
        best = facts["best_checkpoint"]
        weights = "the weights of its last step" if best is None else f"the weights of its {Path(best).name}"
        usage = self.card_usage(settings)
        cited = [*self.sources, *([] if estimator is None else [estimator.citation])]
        return [
            f"## {self.title}\n\nOne training run, {weights}. {self.card_text(settings)}".strip(),
            *([f"## Use\n\n```python\n{usage}\n```"] if usage else []),
            f"## Test scores\n\n{self.card_scores(results['test'])}",
            *([f"## Findings\n\n{found}"] if (found := self.findings(facts)) else []),
            *([f"## Meta level\n\n{outline_table(facts['meta_history'])}"] if facts.get("meta_history") else []),
            settings_section(results["settings"]),
            *(["## Citation\n\n" + "\n".join(f"- {line}" for line in cited)] if cited else []),
        ]

    def write_files(self, folder: Path, trainer: MetaTrainer, settings: Settings, data: Data) -> None:
        """Files of a run beyond those of any; name them in `own_files`. `folder`: from there they go to the model."""

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        """Pictures of one run, where matplotlib is installed."""

    def plot_study(self, folder: Path, records: Sequence[Record]) -> None:
        """Pictures of a study, where matplotlib is installed."""

    def table(self, test: Mapping[str, Any]) -> str:
        """The test scores of one method, in Markdown."""
        scores = self.flat_scores(test)
        if missing := [name for name in self.units if name not in scores]:
            raise ValueError(unknown("score in units of the task", missing[0], scores))
        rows = [f"| {name} | {scores[name]:.4f} |" for name in self.units]
        return "\n".join(["| score | value |", "|---|---:|", *rows])

    def card_scores(self, test: Mapping[str, Any]) -> str:
        """The test scores in the model card, in Markdown."""
        return self.table(test)

    def join_cases(self, results: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
        """What stands above the runs of one method on several cases (case -> results), in place of a comparison."""
        return None


def settings_section(settings: Mapping[str, Any]) -> str:
    """The section of a model card that lists what a run was made with, without the user's places."""
    held = {key: value for key, value in settings.items() if value is not None}
    rows = "\n".join(f"| `{key}` | `{_without_place(value)}` |" for key, value in held.items())
    return f"## Settings\n\n| field | value |\n|---|---|\n{rows}"


def _without_place(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_place(one) for one in value]
    is_place = isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or hub_id(value) is None)
    return Path(value).name if is_place else value


def find_task(name: str) -> Task[Any, Any]:
    """The task of this name, or of a class of one's own: `package.module:Class` or `file.py:Class`.

    Raises:
        ValueError: one line for what is not there, or is no task.
    """
    place, colon, cls = TASKS.get(name, name).rpartition(":")
    if not colon:
        raise ValueError(f"{unknown('task', name, TASKS)}, or file.py:Class")
    try:
        found = getattr(_module(place), cls)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"task {name}: cannot be imported ({one_line(error)})") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"task {name}: {cls} must be a subclass of metaxl_evo.Task")
    task: Task[Any, Any] = found()
    taken = {one.name for one in (*fields(StudyArguments), *fields(task.training))}
    double = sorted(taken & {one.name for one in fields(cast(Any, task.settings))})
    if double:
        raise ValueError(f"task {name}: the setting {double[0]} is one of every study: give it another name")
    return task


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    name = f"own_task_{Path(place).stem}"
    spec = importlib.util.spec_from_file_location(name, Path(place).expanduser())
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
