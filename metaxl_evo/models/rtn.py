"""Representation transformation networks, and the forward hooks that put them into an encoder.

MetaXL (Xia et al., NAACL 2021; Bohdal et al., NeurIPS 2021, section 4.5) reshapes the hidden states of *source*
sentences, h' = h + RTN(stop_gradient(h)), so that what the encoder learns from them carries over to a target language.
The network belongs to training alone: its hooks do nothing outside `RepresentationTransform.active`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from metaxl_evo.bilevel.replay import keep, stop_gradient
from metaxl_evo.messages import first_line, one_line, unknown
from metaxl_evo.models.network_files import CONFIG_FILE, WEIGHTS_FILE, save_network

SUBFOLDER = "rtn"
MODEL_TYPE = "metaxl_rtn"

LAYER_PATHS = ("encoder.layer", "layers", "encoder.layers", "transformer.layer", "h")


class Network(nn.Module, ABC):
    """One transformation network, (B, T, H) -> (B, T, H); `bottleneck_ratio` x H is its default inner width."""

    bottleneck_ratio: ClassVar[float]

    @abstractmethod
    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Transformed `hidden` (B, T, H), without the residual; `attention_mask` (B, T) is 1 at real tokens."""


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


class GatedTied(Network):
    """A two-layer network whose last output is the gate of the others (MetaXL's `perceptron` with tied weights)."""

    bottleneck_ratio = 0.5

    def __init__(self, hidden_size: int, bottleneck: int, num_attention_heads: int):
        super().__init__()
        self.net = _mlp(hidden_size, bottleneck, hidden_size + 1)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        out = self.net(hidden)  # (B, T, H + 1)
        return torch.sigmoid(out[..., -1:]) * out[..., :-1]


class GatedUntied(Network):
    """Two networks, one for the representation and one for its gate; every language and layer has both to itself."""

    bottleneck_ratio = 0.5

    def __init__(self, hidden_size: int, bottleneck: int, num_attention_heads: int):
        super().__init__()
        self.net = _mlp(hidden_size, bottleneck, hidden_size)
        self.gate = _mlp(hidden_size, bottleneck, 1)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        return torch.sigmoid(self.gate(hidden)) * self.net(hidden)  # (B, T, 1) * (B, T, H)


class Perceptron(Network):
    """A two-layer network without a gate."""

    bottleneck_ratio = 0.25

    def __init__(self, hidden_size: int, bottleneck: int, num_attention_heads: int):
        super().__init__()
        self.net = _mlp(hidden_size, bottleneck, hidden_size)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.net(hidden)


class TransformerLayer(Network):
    """One post-norm transformer encoder layer without dropout; the bottleneck is its feed-forward width.

    The attention is written out: fused kernels lack second derivatives and forward-mode rules.
    """

    bottleneck_ratio = 4.0

    def __init__(self, hidden_size: int, bottleneck: int, num_attention_heads: int):
        super().__init__()
        self.heads = num_attention_heads
        self.query, self.key, self.value, self.output = (nn.Linear(hidden_size, hidden_size) for _ in range(4))
        self.up, self.down = nn.Linear(hidden_size, bottleneck), nn.Linear(bottleneck, hidden_size)
        self.norm_attention, self.norm_output = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        hidden = self.norm_attention(hidden + self.output(self._attend(hidden, attention_mask)))
        return self.norm_output(hidden + self.down(F.gelu(self.up(hidden))))

    def _attend(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Multi-head self-attention, (B, T, H) -> (B, T, H)."""
        query, key, value = (self._split(linear(hidden)) for linear in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, N, T, T)
        if attention_mask is not None:
            padding = attention_mask.to(scores.device)[:, None, None, :] == 0  # (B, 1, 1, T)
            scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, T, H / N)


KINDS: dict[str, type[Network]] = {
    "gated_tied": GatedTied,
    "gated_untied": GatedUntied,
    "perceptron": Perceptron,
    "transformer": TransformerLayer,
}


def _initialise(module: nn.Module) -> None:
    """Xavier-normal weights and zero biases: a gate starts at one half, and the transform is not zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)


@dataclass(frozen=True, eq=False)
class RowRoute:
    """Which network each row of a batch meets.

    `languages` (B,) indexes the transform's languages, -1 leaves the row alone; `layers` (B,) indexes its layers, one
    a row: several layers work on copies of the row. `attention_mask` (B, T) is read by attention networks only. The
    two index tensors live on the CPU, so that no layer waits for the device.
    """

    languages: Tensor
    layers: Tensor
    attention_mask: Tensor | None = None

    def rows(self, layer: int) -> Tensor:
        """Row numbers (N,) that are transformed at the layer with index `layer`."""
        return ((self.languages >= 0) & (self.layers == layer)).nonzero().squeeze(1)


@dataclass(eq=False)
class _LayerHook:
    """The forward hook of one encoder layer; an object, so that deep copies of model and transform stay paired."""

    transform: RepresentationTransform
    layer: int

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The layer's output with the routed rows transformed; None, which keeps it, while the transform is off.

        Layers return a tensor in transformers 5 and a tuple in 4.
        """
        hidden = output if isinstance(output, Tensor) else output[0]
        changed = self.transform.apply_route(hidden, self.layer)
        return changed if changed is None or isinstance(output, Tensor) else (changed, *output[1:])


def encoder_layers(model: nn.Module, module_path: str | None = None) -> nn.ModuleList:
    """The encoder layers of `model`: at `module_path`, or else at the first of LAYER_PATHS below its base model.

    Raises ValueError where there is no such list.
    """
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    root, paths = (base, LAYER_PATHS) if module_path is None else (model, (module_path,))
    for path in paths:
        try:
            found = root.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList) and len(found):
            return found
    raise ValueError(
        f"{type(model).__name__} has no encoder layers to hook at {', '.join(paths)}: "
        "name its list of layers by module_path (rtn_module_path)"
    )


class RepresentationTransform(nn.Module):
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
        self.nets.apply(_initialise)
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
            rows = (language_rows == language).nonzero().squeeze(1).to(hidden.device)
            if len(rows):
                mask = None if attention_mask is None else attention_mask[rows.to(attention_mask.device)]
                net = self.nets.get_submodule(f"{language}.{layer}")
                change = change.index_copy(0, rows, net(frozen[rows], mask).to(change.dtype))
        return hidden + change

    def apply_route(self, hidden: Tensor, layer: int) -> Tensor | None:
        """`hidden` (B, T, H) with the rows that the active route sends to `layer` transformed; None if there are none.

        Raises ValueError if batch or hidden size are not those of the route and of the networks.
        """
        route = self._route
        if route is None:
            return None
        if hidden.shape[0] != len(route.languages):
            raise ValueError(f"the active RTN routes {len(route.languages)} rows, the encoder runs {hidden.shape[0]}")
        self._check_hidden_size(hidden.shape[-1])
        keep(hidden)
        rows = route.rows(layer)
        if not len(rows):
            return None
        mask = None if route.attention_mask is None else route.attention_mask[rows.to(route.attention_mask.device)]
        languages, rows = route.languages[rows], rows.to(hidden.device)
        return hidden.index_copy(0, rows, self.transform(hidden[rows], layer, languages, mask))

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
        previous, self._route = self._route, self._make_route(languages, layers, attention_mask)
        try:
            yield
        finally:
            self._route = previous

    def _make_route(
        self,
        languages: Tensor | Sequence[int],
        layers: Tensor | Sequence[int] | None,
        attention_mask: Tensor | None,
    ) -> RowRoute:
        if layers is None and len(self.layers) > 1:
            raise ValueError(f"the RTN has {len(self.layers)} layers: give active() the layer index of each row")
        by_language = torch.as_tensor(languages, device="cpu")
        by_layer = torch.zeros_like(by_language) if layers is None else torch.as_tensor(layers, device="cpu")
        _check_indices("languages", by_language, -1, len(self.languages))
        _check_indices("layers", by_layer, 0, len(self.layers))
        lengths = {len(by_language), len(by_layer)} | ({len(attention_mask)} if attention_mask is not None else set())
        if len(lengths) > 1:
            raise ValueError(f"languages, layers and attention_mask of the RTN differ in rows: {sorted(lengths)}")
        return RowRoute(by_language, by_layer, attention_mask)

    def attach(self, model: nn.Module, module_path: str | None = None) -> list[RemovableHandle]:
        """Hook the encoder layers of `model`; returns the handles, `detach` removes them as well.

        The hooks come first among a layer's hooks, so that `output_hidden_states` shows the transformed states.
        Nothing is registered in `model`: its state dict and saved files do not change, and a deep copy of it alone
        carries an idle transform of its own. Attaching again replaces the hooks. Attach before compiling: compiled
        code does not see later hooks.

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
        self.detach(model)
        return [
            layers[layer - 1].register_forward_hook(_LayerHook(self, index), prepend=True)
            for index, layer in enumerate(self.layers)
        ]

    def detach(self, model: nn.Module) -> None:
        """Remove this transform's hooks from `model`; nothing happens where there are none."""
        for module in model.modules():
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _LayerHook) and hook.transform is self]:
                del hooks[key]

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


def _check_indices(name: str, indices: Tensor, low: int, stop: int) -> None:
    """ValueError unless `indices` is one-dimensional, of whole numbers in [low, stop)."""
    whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if indices.dim() != 1 or not whole or bool(((indices < low) | (indices >= stop)).any()):
        raise ValueError(
            f"{name} of active() must be one whole number a row, from {low} to {stop - 1}, got {indices.tolist()}"
        )


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
