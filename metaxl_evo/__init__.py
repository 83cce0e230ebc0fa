"""metaxl_evo: meta-learning with Hugging Face models; the hypergradient estimator is one word.

The names below are loaded on first use, so that the bilevel core can be imported without transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaxl_evo.bilevel import BilevelProblem, Response, hypergradient, run_episode
    from metaxl_evo.estimators import ESTIMATORS, Estimator, make_estimator
    from metaxl_evo.experiments.scores import Rate
    from metaxl_evo.experiments.task import Task
    from metaxl_evo.models.bilevel_module import BilevelModule
    from metaxl_evo.models.rtn import RepresentationTransform
    from metaxl_evo.models.weight_net import WeightNet
    from metaxl_evo.training.arguments import MetaTrainingArguments
    from metaxl_evo.training.callbacks import MetaCallback
    from metaxl_evo.training.trainer import MetaTrainer

_HOMES = {
    "BilevelProblem": "metaxl_evo.bilevel",
    "Response": "metaxl_evo.bilevel",
    "hypergradient": "metaxl_evo.bilevel",
    "run_episode": "metaxl_evo.bilevel",
    "ESTIMATORS": "metaxl_evo.estimators",
    "Estimator": "metaxl_evo.estimators",
    "make_estimator": "metaxl_evo.estimators",
    "BilevelModule": "metaxl_evo.models.bilevel_module",
    "RepresentationTransform": "metaxl_evo.models.rtn",
    "WeightNet": "metaxl_evo.models.weight_net",
    "MetaCallback": "metaxl_evo.training.callbacks",
    "Rate": "metaxl_evo.experiments.scores",
    "Task": "metaxl_evo.experiments.task",
    "MetaTrainingArguments": "metaxl_evo.training.arguments",
    "MetaTrainer": "metaxl_evo.training.trainer",
}

__version__ = version("metaxl_evo")
__all__ = [
    "ESTIMATORS",
    "BilevelModule",
    "BilevelProblem",
    "Estimator",
    "MetaCallback",
    "MetaTrainer",
    "MetaTrainingArguments",
    "Rate",
    "RepresentationTransform",
    "Response",
    "Task",
    "WeightNet",
    "hypergradient",
    "make_estimator",
    "run_episode",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
