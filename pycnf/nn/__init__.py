"""Vector fields: networks conditioned on time, and the divergence of any field."""

from . import kernels
from .activation import ACTIVATIONS
from .divergence import value_and_divergence
from .fusion import fuse
from .layers import LAYERS
from .mlp import MLP

__all__ = ["ACTIVATIONS", "LAYERS", "MLP", "fuse", "kernels", "value_and_divergence"]
