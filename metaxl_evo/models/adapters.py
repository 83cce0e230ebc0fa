"""Base models below a peft wrapper (LoRA and its relatives). peft is optional: who wraps a model has imported it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import is_peft_available

from metaxl_evo.messages import first_line

ADAPTER = "adapter"  # the subfolder; at the top of a model folder transformers would load the adapter over the model
WEIGHTS_FILE = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"


@dataclass(kw_only=True)
class LoraArguments:
    """Whether a base is below an adapter, and which."""

    use_peft: bool = field(
        default=False, metadata={"help": "Train a LoRA adapter and the head; the other base weights stay as they are."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the adapted layers, or `all-linear` (default: peft's choice for the model)."},
    )

    def check_lora(self) -> None:
        """Refuse values that cannot be, and an adapter without peft."""
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name} must be below 2**31, not {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout}")
        if self.use_peft and not is_peft_available():
            raise ValueError("use_peft needs the package peft: run pip install 'metaxl_evo[peft]'")

    def adapted(self, base: PreTrainedModel, task_type: str = "TOKEN_CLS") -> nn.Module:
        """`base`, below the adapter that is asked for, if one is; `task_type` as of `add_lora`."""
        if not self.use_peft:
            return base
        return add_lora(
            base,
            r=self.lora_r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            task_type=task_type,
        )


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` is a peft wrapper."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def plain_model(model: Any) -> Any:
    """The model below a peft wrapper, adapters in its layers; any other model itself.

    Raises:
        ValueError: for methods that act on a model's inputs, which the model below knows nothing of.
    """
    if not is_adapted(model):
        return model
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(f"peft's {kind} changes the inputs of the base model: use a method inside its layers (LoRA)")
    return model.get_base_model()


def add_lora(
    base: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str] | None,
    task_type: str = "TOKEN_CLS",
) -> nn.Module:
    """`base` with a LoRA adapter: the adapter and a classifier are trainable, all else is frozen.

    Args:
        task_type: peft's word for the head.

    Raises:
        ValueError: for target modules that are not layers of the encoder, with those that are.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    layers = [name for name, layer in base.base_model.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    targets = list(DEFAULTS.get(base.config.model_type, []) if target_modules is None else target_modules)
    everywhere = targets == [ALL_LINEAR]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if not everywhere and (unknown or not targets):
        wanted = f"{', '.join(unknown)} are no layers of" if unknown else "peft has no choice for"
        there = ", ".join([ALL_LINEAR, *sorted({name.rpartition(".")[2] for name in layers})])
        raise ValueError(f"lora_target_modules: {wanted} {type(base).__name__}: choose from {there}")
    heads = [name for name, child in base.named_children() if child is not base.base_model]
    config = LoraConfig(
        task_type=TaskType[task_type],  # a classifier is trained and saved with the adapter
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=ALL_LINEAR if everywhere else targets,
        exclude_modules=heads if everywhere else None,
    )
    return get_peft_model(base, config)


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the active adapter, and the modules trained beside it, as peft does, but without its blank model card."""
    model.save_pretrained(folder, selected_adapters=[model.active_adapter], save_embedding_layers=False)
    (Path(folder) / "README.md").unlink(missing_ok=True)


def load_adapter(model: Any, folder: str | Path) -> None:
    """Read back what `save_adapter` wrote, into a model with the same adapter.

    Raises:
        ValueError: for a file that is missing or damaged, and for the adapter of other settings or another model.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    name = model.active_adapter
    place = Path(folder) if name == "default" else Path(folder) / name
    file = place / WEIGHTS_FILE
    try:
        weights = load_file(file, device="cpu")
        config = PeftConfig.from_pretrained(str(place)).to_dict()
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({first_line(error)}): use another checkpoint") from error
    now = model.peft_config[name].to_dict()
    other = [key for key in ("r", "lora_alpha", "target_modules", "use_rslora") if config.get(key) != now.get(key)]
    if other:
        raise ValueError(f"{place} holds an adapter with another {', '.join(other)}: give the settings of that run")
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wrong = [key for key, leaf in expected.items() if key not in weights or weights[key].shape != leaf.shape]
    if wrong or weights.keys() != expected.keys():
        key = (wrong or sorted(weights.keys() - expected.keys()))[0]
        raise ValueError(f"{file} does not fit this model at {key}: use a checkpoint of the same model and labels")
    set_peft_model_state_dict(model, weights, adapter_name=name)


def merged(model: Any) -> Any:
    """A copy of the model below, the adapter added to its weights; `model` stays as it is."""
    return copy.deepcopy(model).merge_and_unload()
