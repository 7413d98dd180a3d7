"""Which engine can run a field, and the reason in a sentence."""

from torch import nn

from .divergence import VectorField, has_forward_mode
from .layers import LAYERS_OF_PLAIN_TIME
from .mlp import MLP

MOST_LAYERS = 16  # kMaxLayers in csrc/core/mlp.h


def why_not_fused(field: VectorField) -> str | None:
    """One sentence saying what keeps the fused engine from running this field; None if it can.

    Example:
        >>> why_not_fused(MLP(2, layer="blend"))
        "the field has a 'blend' layer, whose weights depend on time"
    """
    if not isinstance(field, nn.Module):
        return f"the field is a plain callable ({type(field).__name__}), not a pycnf.nn.MLP"
    if not isinstance(field, MLP):
        return f"the field is a {type(field).__name__}, not a pycnf.nn.MLP"
    if not has_forward_mode(field):
        return "the field is an MLP with hooks or with a forward of its own"
    for name in field.layer:
        if name in LAYERS_OF_PLAIN_TIME:
            return f"the field has a {name!r} layer, whose weights depend on time"
    if len(field.layers) > MOST_LAYERS:
        return (
            f"the field has {len(field.layers)} layers and the fused engine at most {MOST_LAYERS}"
        )
    return None
