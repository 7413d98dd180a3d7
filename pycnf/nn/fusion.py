"""Which engine can run a field, and the reason in a sentence."""

from torch import nn

from .divergence import VectorField, has_forward_mode
from .mlp import MLP


def why_not_fused(field: VectorField) -> str:
    """One sentence saying what keeps the fused engine from running this field.

    Example:
        >>> why_not_fused(MLP(2))
        'this build of pycnf has no fused engine'
    """
    if not isinstance(field, nn.Module):
        return f"the field is a plain callable ({type(field).__name__}), not a pycnf.nn.MLP"
    if not isinstance(field, MLP):
        return f"the field is a {type(field).__name__}, not a pycnf.nn.MLP"
    if not has_forward_mode(field):
        return "the field is an MLP with hooks or with a forward of its own"
    return "this build of pycnf has no fused engine"
