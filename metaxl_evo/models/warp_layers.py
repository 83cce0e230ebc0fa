"""Warp layers of a text model: linear maps between its encoder layers, through which all gradients of a task go.

WarpGrad (Flennerhag et al., Meta-Learning with Warped Gradient Descent, ICLR 2020, section 3.2): a task trains the
layers, the warps are shared by all tasks and learned across them. They begin as the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from metaxl_evo.models.hooks import HookedTransform, encoder_layers


class WarpLayers(HookedTransform):
    """A linear map behind each encoder layer but the last; it acts inside of `active` alone.

    Meant as the `meta` of a `BilevelModule`, in both losses:

        warps = WarpLayers(model.config.hidden_size, model.config.num_hidden_layers)
        warps.attach(model)
        with warps.active(model):
            loss = model(**batch).loss

    A deep copy of the model has no warps: a `TaskBatch` copies, so attach to its `copies`.

    Args:
        hidden_size: of the model.
        layers: of its encoder, at least 2.

    Raises:
        ValueError: for fewer layers, between which nothing stands.
    """

    def __init__(self, hidden_size: int, layers: int):
        super().__init__()
        if layers < 2:
            raise ValueError(f"warp layers stand between encoder layers, and there is {layers}: take a deeper model")
        self.warps = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(layers - 1))
        for warp in self.warps:
            nn.init.eye_(warp.get_parameter("weight"))
            nn.init.zeros_(warp.get_parameter("bias"))
        self._acts = False

    def attach(self, model: nn.Module, module_path: str | None = None) -> None:
        """Hook the encoder layers of `model`, or those of its list at `module_path`.

        Raises:
            ValueError: for a model without a list of encoder layers, or with another number of them.
        """
        layers = encoder_layers(model, module_path)
        if len(layers) != len(self.warps) + 1:
            raise ValueError(
                f"{len(self.warps)} warp layers stand between {len(self.warps) + 1} encoder layers, the model has "
                f"{len(layers)}: make WarpLayers with layers={len(layers)}"
            )
        self._hook(model, dict(enumerate(list(layers)[:-1])))

    def apply_layer(self, output: Tensor, layer: Any) -> Tensor | None:
        """(B, T, H) -> (B, T, H); None while the warps do not act."""
        if not self._acts:
            return None
        warped: Tensor = self.warps[layer](output)
        return warped

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """Warp every pass of `model` inside.

        Raises:
            ValueError: for a model that is not hooked, such as a copy of one that is: it would pass unwarped.
        """
        if self.hooks_in(model) != len(self.warps):
            raise ValueError("these warp layers are not in the model: attach them to it (copies have none)")
        before, self._acts = self._acts, True
        try:
            yield
        finally:
            self._acts = before
