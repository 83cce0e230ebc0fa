"""Base models and tokenizers: from a folder, the Hub or its cache, or made for the synthetic family."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from metaxl_evo.messages import first_line, unknown
from metaxl_evo.models.adapters import ADAPTER
from metaxl_evo.models.rtn import SUBFOLDER
from metaxl_evo.ner.arguments import SHORTEST
from metaxl_evo.ner.scorers import Scorer, TextScorer
from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.ner.synthetic_tagger import make_synthetic_tagger
from metaxl_evo.training.saved_models import (
    ask_hub,
    load,
    refuse_kernel,
    require_embeddings,
    require_vocabulary,
    require_whole,
    unusable,
)

SYNTHETIC = "synthetic"
NO_LIMIT = 2**31


class Head(NamedTuple):
    """What stands on the encoder.

    Args:
        loads: the Auto class.
        kinds, names: configurations that transformers has such a model for, and their model types.
        called: how classes of such models end.
        what: in words.
        task_type: peft's word for it.
    """

    loads: Any
    kinds: Any
    names: Any
    called: str
    what: str
    task_type: str


TOKENS = Head(
    AutoModelForTokenClassification,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "TokenClassification",
    "token classifier",
    "TOKEN_CLS",
)
TEXTS = Head(
    AutoModelForSequenceClassification,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "SequenceClassification",
    "classifier of texts",
    "SEQ_CLS",
)
ROUNDING = 1e-4  # of logits; float32 in another order changes 1e-6, what reads padding 1e-3 and more


def head_of(scorer: Scorer) -> Head:
    """The head of a model that is scored so."""
    return TEXTS if isinstance(scorer, TextScorer) else TOKENS


def load_config(model: str, head: Head = TOKENS, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model; of an unreachable Hub id this says so within seconds.

    Raises:
        ValueError: for what is neither a model folder nor to be had from the Hub or its cache, brings code along that
            is not trusted, or is an architecture that transformers has no model with this head for.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        try:
            ask_hub(model)
        except Exception as error:  # of the id, or of an HTTP library
            raise unusable(model, error) from error
    elif _is_adapter(folder):
        raise ValueError(
            f"model_name_or_path: {model} holds a peft adapter, not a model: give the output folder of its finished "
            "run, or merge it (AutoPeftModelForTokenClassification.from_pretrained, merge_and_unload, save_pretrained)"
        )
    elif not (folder / CONFIG_NAME).is_file():
        inside = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_NAME}") if file.parent.name != SUBFOLDER)
        advice = (
            f"give one of its models: {', '.join(inside)}" if inside else "give a folder that save_pretrained wrote"
        )
        raise ValueError(f"model_name_or_path: {model} holds no {CONFIG_NAME}: {advice}")
    try:
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else model, trust_remote_code=trust_remote_code)
    except Exception as error:  # the content of the file leads the library into any
        raise unusable(model, error) from error
    if not trust_remote_code:
        refuse_kernel(model, config)
    own_code = trust_remote_code and head.loads.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in head.kinds and not own_code:
        kinds = unknown("model type", config.model_type, head.names)
        raise ValueError(f"model_name_or_path: transformers has no {head.what} for {model}: {kinds}")
    return config


def trained_labels(model: str, head: Head = TOKENS, *, trust_remote_code: bool = False) -> list[str] | None:
    """The label names of a trained head of this kind, in its order; None where the model has none yet."""
    if model == SYNTHETIC:
        return None
    config = load_config(model, head, trust_remote_code=trust_remote_code)
    if not any(head.called in kind for kind in config.architectures or []):
        return None
    labels: dict[Any, str] = dict(config.id2label or {})
    return [labels[number] for number in sorted(labels)]


def load_classifier(
    model: str,
    names: Sequence[str],
    attn_implementation: str | None = None,
    *,
    head: Head = TOKENS,
    ignore_mismatched_sizes: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A float32 classifier for the label names, whatever the checkpoint's dtype, and its fast tokenizer.

    Args:
        ignore_mismatched_sizes: a trained head of other labels makes way for a new one, of whatever size both are.
        trust_remote_code: run code that the model brings along; nobody is asked.

    Raises:
        ValueError: for a model that cannot be had or read, or whose trained head has other labels.
    """
    if model == SYNTHETIC:
        return make_synthetic_tagger(SyntheticFamily(), labels=names, of_texts=head is TEXTS)
    trained = trained_labels(model, head, trust_remote_code=trust_remote_code)
    is_other = trained not in (None, list(names))
    if trained is not None and is_other and not ignore_mismatched_sizes:
        raise ValueError(
            f"the head of {model} knows {', '.join(trained)}, the data set has {', '.join(names)}: "
            "use a model without a head, data with the same labels, or ignore_mismatched_sizes: true for a new head"
        )
    place = Path(model).expanduser() if Path(model).expanduser().is_dir() else model
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    kernel = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        given = {"ignore_mismatched_sizes": is_other, **labels, **kernel}
        base, found = load(head.loads, place, trust_remote_code=trust_remote_code, **given)
        if is_other:
            base, found = _with_new_head(base, **kernel)
        if head is TEXTS:
            base.config.problem_type = "single_label_classification"  # whatever the trained head was for
            if base.config.pad_token_id is None:
                base.config.pad_token_id = (
                    tokenizer.pad_token_id
                )  # by which a decoder's classifier finds the last token
    except pickle.UnpicklingError as error:  # whose text advises to run what it refused
        raise unusable(model, ValueError("its pytorch_model.bin holds more than tensors")) from error
    except Exception as error:  # the content of a file leads the library into any
        raise _needs_packages(model, error) or unusable(model, error) from error
    _require_tokens(model, tokenizer)
    has_head = trained is not None and not is_other
    _require_whole(model, base, tokenizer, sorted(found["missing_keys"]), has_head=has_head)
    return base, tokenizer


def _with_new_head(base: PreTrainedModel, **kernel: Any) -> Any:
    """The encoder of a token classifier under a head as its class initialises one, and what loading it found."""
    prefix = f"{base.base_model_prefix}."
    encoder = {name: value for name, value in base.state_dict().items() if name.startswith(prefix)}
    return load(type(base), None, config=base.config, state_dict=encoder, **kernel)


def longest_input(base: PreTrainedModel) -> int:
    """The most sub-tokens that the model has positions for; a large number where it sets no limit."""
    positions = getattr(base.config, "max_position_embeddings", None) or 0
    if positions <= 0:  # XLNet says -1
        return NO_LIMIT
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(positions) - module.padding_idx - 1  # RoBERTa and its kin count from the one behind it
    return int(positions)


def require_readable(base: PreTrainedModel, rows: Dataset, setting: str) -> None:
    """Run the longest row once, since a model may have a limit that no configuration tells.

    Raises:
        ValueError: naming the length and the setting that limits it.
    """
    ids = max(rows["input_ids"], key=len)
    reason = _failure(base, ids)
    if reason is not None and _failure(base, ids[:SHORTEST]) is None:  # else it is no matter of length
        raise ValueError(
            f"{setting}: the model cannot read a sentence of {len(ids)} sub-tokens ({first_line(reason)}): "
            f"set a smaller {setting}"
        )


def require_padding_unseen(base: PreTrainedModel, rows: Dataset, pad_token_id: int, setting: str, size: int) -> None:
    """Read the shortest row alone and beside the longest, since scores of batches are those of sentences alone.

    Args:
        setting, size: the sentences a batch, and the field that says so.

    Raises:
        ValueError: for a model that reads the padding in spite of the attention mask, as convolutions do.
    """
    short, long = min(rows["input_ids"], key=len), max(rows["input_ids"], key=len)
    if size == 1 or len(short) == len(long):
        return
    mask = torch.ones(2, len(long), dtype=torch.long, device=base.device)
    mask[0, len(short) :] = 0
    both = torch.tensor([short + [pad_token_id] * (len(long) - len(short)), long], device=base.device)
    training = base.training
    base.eval()
    with torch.no_grad():
        alone = base(input_ids=both[:1, : len(short)], attention_mask=mask[:1, : len(short)]).logits
        beside = base(input_ids=both, attention_mask=mask).logits[:1, : len(short)]
    base.train(training)
    if (alone - beside).abs().max() > ROUNDING * alone.abs().max():
        raise ValueError(
            f"{setting} must be 1 for {type(base).__name__}, which reads the padding beside a sentence: its scores "
            "would depend on the batches"
        )


def _failure(base: PreTrainedModel, ids: list[int]) -> Exception | None:
    training = base.training
    base.eval()
    try:
        with torch.no_grad():
            base(input_ids=torch.tensor([ids], device=base.device))
    except (RuntimeError, IndexError, ValueError) as error:
        return error
    finally:
        base.train(training)
    return None


def _require_tokens(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that transformers made up where its files are missing, and one that cannot pad."""
    require_vocabulary(model, tokenizer)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"model_name_or_path: {model} has no padding token: give it one (tokenizer.pad_token = ...) and save the "
            "tokenizer there"
        )


def _require_whole(
    model: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, missing: list[str], *, has_head: bool
) -> None:
    """Refuse weights that are not all there, or not numbers, or of another vocabulary than the tokenizer's."""
    own = f"{base.base_model_prefix}."  # a new head, and a pooler that it reads, are made here
    lacking = [one for one in missing if has_head or (one.startswith(own) and ".pooler." not in one)]
    require_whole(model, base, lacking)
    require_embeddings(model, base, tokenizer)


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, at its top or as a checkpoint of ours does, in place of a model."""
    inside = (folder / ADAPTER / ADAPTER_CONFIG_NAME).is_file() and not (folder / CONFIG_NAME).is_file()
    return inside or (folder / ADAPTER_CONFIG_NAME).is_file()


def _needs_packages(model: str, error: Exception) -> ValueError | None:
    """The error of a folder with a sentencepiece model alone, for which transformers asks for tiktoken at last."""
    if "tiktoken" not in str(error) or (is_sentencepiece_available() and is_protobuf_available()):
        return None
    return ValueError(
        f"model_name_or_path: the tokenizer of {model} is a sentencepiece model, which more packages read: run "
        "pip install sentencepiece protobuf"
    )
