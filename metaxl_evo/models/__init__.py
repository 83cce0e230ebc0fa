"""Models with a meta level: the bilevel module and the representation transform."""

from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.models.weight_net import WeightNet

__all__ = ["BilevelModule", "RepresentationTransform", "WeightNet"]
