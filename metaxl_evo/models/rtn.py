"""The representation transformation network (RTN) of MetaXL.

MetaXL (Xia et al., NAACL 2021; Bohdal et al., NeurIPS 2021, section 4.5) reshapes the hidden states of *source*
sentences, h' = h + RTN(stop_gradient(h)), so that what the encoder learns from them carries over to a target language.
The networks are in `rtn_networks`, what puts them into an encoder is in `hooks`: it does nothing outside of `active`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from metaxl_evo.bilevel.replay import keep, stop_gradient
from metaxl_evo.messages import first_line, one_line, unknown
from metaxl_evo.models.hooks import HookedTransform, RowRoute, encoder_layers
from metaxl_evo.models.network_files import CONFIG_FILE, WEIGHTS_FILE, save_network
from metaxl_evo.models.remembered import remembered
from metaxl_evo.models.rtn_networks import KINDS, initialise

SUBFOLDER = "rtn"
MODEL_TYPE = "metaxl_rtn"


class RepresentationTransform(HookedTransform):
    """One transformation network a source language and encoder layer, with the mixing weights of the layers.

    `layers` count from 1, the output of the first encoder layer (`hidden_states[l]` in transformers); `languages` are
    names. `bottleneck` is half the hidden size by default for the gated kinds, a quarter for `perceptron`, four times
    (the feed-forward width) for `transformer`, which alone reads `num_attention_heads` (default: 64 or more wide).

    Meant to be used through `attach` and `active`:

        transform.attach(model)
        with transform.active(languages=rows, attention_mask=mask):
            loss = model(**batch).loss

    Raises ValueError for an unknown kind and for sizes, layers or languages that cannot be.
    """

    mixing_logits: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        *,
        layers: Sequence[int],
        kind: str = "gated_tied",
        bottleneck: int | None = None,
        languages: Sequence[str] = ("source",),
        num_attention_heads: int | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(unknown("rtn_kind", kind, KINDS))
        network = KINDS[kind]
        self.kind = kind
        self.hidden_size = _positive("hidden_size", hidden_size)
        self.layers: tuple[int, ...] = _distinct("layers", layers, int)
        self.languages: tuple[str, ...] = _distinct("languages", languages, str)
        default_width = max(1, int(hidden_size * network.bottleneck_ratio))
        self.bottleneck = _positive("bottleneck", default_width if bottleneck is None else bottleneck)
        self.num_attention_heads = _attention_heads(hidden_size, num_attention_heads)
        self.nets = nn.ModuleList(
            nn.ModuleList(network(hidden_size, self.bottleneck, self.num_attention_heads) for _ in self.layers)
            for _ in self.languages
        )
        self.nets.apply(initialise)
        logits = nn.Parameter(torch.zeros(len(self.languages), len(self.layers)))
        self.register_parameter("mixing_logits", logits if len(self.layers) > 1 else None)
        self._route: RowRoute | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {
            "hidden_size": self.hidden_size,
            "layers": list(self.layers),
            "kind": self.kind,
            "bottleneck": self.bottleneck,
            "languages": list(self.languages),
            "num_attention_heads": self.num_attention_heads,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def mixing(self) -> Tensor:
        """Weights of the layers' losses, (n_languages, n_layers); each row sums to 1.

        A single layer has no logits: its weight is the constant 1, and nothing is there to learn or decay.
        """
        if self.mixing_logits is None:
            like = next(self.parameters())
            return torch.ones(len(self.languages), 1, dtype=like.dtype, device=like.device)
        return self.mixing_logits.softmax(-1)

    def transform(
        self, hidden: Tensor, layer: int, language_rows: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """h + RTN(stop_gradient(h)) of source rows `hidden` (N, T, H), as (N, T, H).

        `layer` indexes `self.layers`, `language_rows` (N,) the languages; `attention_mask` is (N, T). The gradient
        reaches `hidden` through the identity only. `stop_gradient` is called once, on all rows together.
        """
        frozen = stop_gradient(hidden, key=layer)  # (N, T, H)
        change = torch.zeros_like(frozen)
        for language in range(len(self.languages)):
            rows = _rows_of(language, language_rows, hidden.device)
            if len(rows):
                mask = None if attention_mask is None else attention_mask[rows.to(attention_mask.device)]
                net = self.nets.get_submodule(f"{language}.{layer}")
                change = change.index_copy(0, rows, net(frozen[rows], mask).to(change.dtype))
        return hidden + change

    def apply_layer(self, output: Tensor, layer: int) -> Tensor | None:
        """`output` (B, T, H) with the rows that the active route sends to `layer` transformed; None if there are none.

        Raises ValueError if batch or hidden size are not those of the route and of the networks.
        """
        route = self._route
        if route is None:
            return None
        if output.shape[0] != len(route.languages):
            raise ValueError(f"the active RTN routes {len(route.languages)} rows, the encoder runs {output.shape[0]}")
        self._check_hidden_size(output.shape[-1])
        keep(output)
        rows, languages = route.rows(layer, output.device)
        if not len(rows):
            return None
        mask = None if route.attention_mask is None else route.attention_mask[rows.to(route.attention_mask.device)]
        return output.index_copy(0, rows, self.transform(output[rows], layer, languages, mask))

    @contextmanager
    def active(
        self,
        languages: Tensor | Sequence[int],
        layers: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[None]:
        """Transform the rows routed by these values (see RowRoute) in every encoder pass inside: the only switch.

        The previous state, normally off, comes back on leaving, also by an exception. Raises ValueError for indices
        out of range, lengths that differ, and `layers` left out where there are several.
        """
        sizes = {"n_languages": len(self.languages), "n_layers": len(self.layers)}
        previous, self._route = self._route, RowRoute.make(languages, layers, attention_mask, **sizes)
        try:
            yield
        finally:
            self._route = previous

    def attach(self, model: nn.Module, module_path: str | None = None) -> list[RemovableHandle]:
        """Hook the encoder layers of `model`; returns the handles, `detach` removes them as well.

        Raises ValueError for a layer out of range, a model without a list of encoder layers and another hidden size.
        """
        layers = encoder_layers(model, module_path)
        for layer in self.layers:
            if not 1 <= layer <= len(layers):
                raise ValueError(
                    f"rtn_layers: {layer} is not a layer of {type(model).__name__}: valid are 1 to {len(layers)} "
                    "(l is the output of encoder layer l; 0, the embeddings, is not supported)"
                )
        self._check_hidden_size(getattr(getattr(model, "config", None), "hidden_size", None))
        return self._hook(model, {index: layers[layer - 1] for index, layer in enumerate(self.layers)})

    def _check_hidden_size(self, found: int | None) -> None:
        if found is not None and found != self.hidden_size:
            raise ValueError(f"the RTN was built for hidden size {self.hidden_size}, the encoder has {found}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made if need be."""
        save_network(folder, MODEL_TYPE, self.config, self)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, **hub_options: Any) -> RepresentationTransform:
        """A saved transform, on the CPU in float32, or in float64 if it was saved so.

        A folder holds its files, or holds them in `rtn/` as output folders do; a Hub repository has them in `rtn/`.
        `hub_options` (revision, token, cache_dir, local_files_only) go to `snapshot_download`. No random numbers are
        drawn. Raises ValueError where nothing is found and where a file is unreadable.
        """
        root = _local_folder(folder_or_hub_id, hub_options)
        for folder in (root / SUBFOLDER, root):
            config = _read_config(folder / CONFIG_FILE)
            if config is not None:
                transform = cls._build(config, folder / CONFIG_FILE)
                transform._load(folder / WEIGHTS_FILE)
                return transform
        raise ValueError(
            f"no RTN at {folder_or_hub_id}: no {SUBFOLDER}/{CONFIG_FILE} or {CONFIG_FILE} of model type {MODEL_TYPE!r}"
        )

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the transform into `rtn/` of a Hub repository, beside the model; returns the commit's URL."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=SUBFOLDER,
                commit_message="Upload representation transform",
            )

    @classmethod
    def _build(cls, config: dict[str, Any], source: Path) -> RepresentationTransform:
        """A transform without storage, from the `config` read from `source`."""
        try:
            with torch.device("meta"):
                return cls(**config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} does not describe an RTN of this version: {error}") from error

    def _load(self, path: Path) -> None:
        """Take the parameters from a safetensors file, all of them and nothing else."""
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy it beside its {CONFIG_FILE} or train anew")
        try:
            held = load_file(path, device="cpu")
            weights = {name: leaf if leaf.dtype == torch.float64 else leaf.float() for name, leaf in held.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is corrupt or truncated ({error}): copy it again or train anew") from error
        try:
            self.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the {CONFIG_FILE} beside it: {one_line(error)}") from error

    def relative_change(self, start: Mapping[str, Tensor]) -> float:
        """|lam - lam_0| / |lam_0| over all parameters together, `start` being `named_parameters` of an earlier moment.

        Raises ValueError if the names differ.
        """
        now = {name: value.detach().cpu().double() for name, value in self.named_parameters()}
        if now.keys() != start.keys():
            raise ValueError(f"start has other parameters: {', '.join(sorted(now.keys() ^ start.keys()))}")
        then = {name: start[name].detach().cpu().double() for name in now}
        moved = math.hypot(*((now[name] - then[name]).norm().item() for name in now))
        return moved / math.hypot(*(value.norm().item() for value in then.values()))


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} of the RTN must be a whole number of at least 1, got {value!r}")
    return value


def _distinct(name: str, values: Sequence[Any], kind: type) -> tuple[Any, ...]:
    """`values` if they are one or more different ones of type `kind`; ValueError otherwise."""
    listed = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not listed or len(set(values)) < len(values) or not all(type(value) is kind for value in values):
        raise ValueError(f"{name} of the RTN must be a list of distinct {kind.__name__} values, got {values!r}")
    return tuple(values)


def _attention_heads(hidden_size: int, heads: int | None) -> int:
    """`heads`, or by default the largest number that leaves each head at least 64 wide (12 at 768)."""
    if heads is None:
        return max(n for n in range(1, max(1, hidden_size // 64) + 1) if hidden_size % n == 0)
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"num_attention_heads of the RTN must divide its hidden size {hidden_size}, got {heads}")
    return heads


def _rows_of(language: int, language_rows: Tensor, device: torch.device) -> Tensor:
    """Numbers of the rows that are of a language, on a device."""

    def find() -> Tensor:
        return (language_rows == language).nonzero().squeeze(1).to(device)

    return remembered(("rows of", language, device), find, language_rows)


def _local_folder(folder_or_hub_id: str | Path, hub_options: Mapping[str, Any]) -> Path:
    """The folder itself, or the one in the Hub cache with the repository's `rtn/`.

    Raises ValueError for an id that the Hub refuses, or that is neither cached nor to be reached (without retries).
    """
    if Path(folder_or_hub_id).is_dir():
        return Path(folder_or_hub_id)
    try:
        return Path(snapshot_download(str(folder_or_hub_id), allow_patterns=f"{SUBFOLDER}/*", **hub_options))
    except (HFValidationError, OSError) as error:
        raise ValueError(
            f"no RTN at {folder_or_hub_id}: not a folder, and not from the Hub ({first_line(error)})"
        ) from error


def _read_config(path: Path) -> dict[str, Any] | None:
    """Constructor arguments out of a config file; None if it is missing or of something else.

    Raises ValueError for a file that is not JSON.
    """
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): copy it again or train anew") from error
    return config if isinstance(config, dict) and config.pop("model_type", None) == MODEL_TYPE else None
