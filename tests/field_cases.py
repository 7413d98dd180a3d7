"""What the tests of the field's ops for a GPU have in common, on a GPU and on a host."""

import torch
from kernel_cases import F64

from pycnf.nn import MLP
from pycnf.nn.field_ops import exact_divergence, field_arguments
from pycnf.nn.precision import PRECISIONS, products_of_torch

cpu = torch.ops.pycnf
LAYERS = ("ignore", "concat", "concat_v2", "squash", "concatsquash")
NONE, PROBES, UNIT = range(3)
KINDS = ("value", "jvp", "probes", "drawn", "unit", "exact")


def moved(x, device):
    """To a device, with its strides and through lists."""
    if isinstance(x, (list, tuple)):
        return type(x)(moved(each, device) for each in x)
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def flat(results):
    """The tensors of nested lists, on the CPU."""
    if isinstance(results, torch.Tensor):
        return [results.cpu()]
    return [x for result in results for x in flat(result)]


def close(mine, expected, tolerance=1e-12):
    mine, expected = flat(mine), flat(expected)
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected):
        scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


class Case:
    """A field at some samples, and every op's arguments for it."""

    def __init__(
        self, features=3, hidden=(5, 4), batch=9, count=2, own=False, context=0, dtype=F64,
        turned=False, **settings,
    ):  # fmt: skip
        torch.manual_seed(0)
        self.field = MLP(features, hidden, context=context, **settings).to(dtype)

        def normal(*shape):
            return torch.randn(shape, dtype=F64).to(dtype)

        self.normal, self.own, self.count, self.precision = normal, own, count, ()
        self.t = normal(batch) if own else torch.tensor(0.3, dtype=dtype)
        self.z, self.columns = normal(batch, features), normal(count, batch, features)
        self.keys = torch.arange(batch) * 7919 - 5
        with torch.no_grad():
            given = normal(batch, context) if context else None
            offset, parameters, self.kind = field_arguments(self.field, self.z, given)
        if turned:  # rows of weights are not contiguous, nor is anything else
            parameters = [
                x if x is None else x.t().contiguous().t() if x.dim() == 2
                else x.repeat_interleave(2)[::2]
                for x in parameters
            ]  # fmt: skip
            self.z = self.z.t().contiguous().t()
            self.columns = self.columns.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        parameters = [x if x is None else x.detach() for x in parameters]
        self.shared = (offset if offset is None else offset.detach(), parameters)

    def of_kind(self, divergence):
        return [*self.kind[:2], divergence, 0, 0, *self.precision]

    def forward(self, kind):
        """An op's name and arguments, without `keep`."""
        t, z, none = self.t, self.z, (None, 0, 0, False)
        if kind == "value":
            return "mlp_value", (t, z, *self.shared, self.of_kind(NONE))
        if kind in ("jvp", "vjp"):
            name = "mlp_value_jvp" if kind == "jvp" else "mlp_vjp"
            return name, (t, z, self.columns, *self.shared, self.of_kind(NONE))
        exact = exact_divergence(self.field, self.own)
        probe, divergence, draw = {
            "probes": (self.columns, PROBES, none),
            "drawn": (None, PROBES, (self.keys, 3, self.count, False)),
            "unit": (None, UNIT, none),
            "exact": (None, exact, none),
        }[kind]
        return "mlp_value_divergence", (
            t, z, probe, *self.shared, self.of_kind(divergence), *draw,
        )  # fmt: skip

    def backward(self, kind):
        """The same of its gradient, without cotangents, `kept` and `need_parameters`."""
        name, arguments = self.forward(kind)
        if kind == "value":
            name = "mlp_value_divergence"
            arguments = (*arguments[:2], None, *arguments[2:], None, 0, 0, False)
        return f"{name}_backward", arguments


def compare(ops, case, device, kinds=KINDS, tolerance=1e-12):
    """Every result of ops and of their gradients, with and without what is kept."""
    for kind in kinds:
        name, arguments = case.forward(kind)
        *expected, kept = getattr(cpu, name)(*arguments, True)
        given = moved(arguments, device)
        *mine, own = getattr(ops, name)(*given, True)
        close(mine, expected, tolerance)
        *again, nothing = getattr(ops, name)(*given, False)
        close(again, mine, tolerance)
        assert nothing.numel() == 0
        name, arguments = case.backward(kind)
        bars = [case.normal(*x.shape) for x in expected] + [None] * (kind == "value")
        runs = [(bars, True, own), (bars, True, nothing), (bars, False, own)]
        if kind != "value":
            runs += [([bars[0], None], True, own), ([None, bars[1]], False, nothing)]
        for given, need, memory in runs:
            results = getattr(cpu, name)(*given, *arguments, kept, need)
            found = getattr(ops, name)(*moved((*given, *arguments), device), memory, need)
            close(found, results, tolerance)
    name, arguments = case.forward("vjp")
    results = getattr(cpu, name)(*arguments)
    close(getattr(ops, name)(*moved(arguments, device)), results, tolerance)


def cast(x, dtype):
    """Floating tensors to a dtype, through lists."""
    if isinstance(x, (list, tuple)):
        return type(x)(cast(each, dtype) for each in x)
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def outcome(ops, case, kind, device, dtype):
    """An op's results and its gradients', on a device in a dtype, in float64."""
    name, arguments = case.forward(kind)
    *results, kept = getattr(ops, name)(*moved(cast(arguments, dtype), device), True)
    name, arguments = case.backward(kind)
    bars = [torch.full(x.shape, 0.5) for x in results] + [None] * (kind == "value")
    given = moved(cast((*bars, *arguments), dtype), device)
    results.append(getattr(ops, name)(*given, kept, True))
    return [x.double() for x in flat(results)]


def errors_by_precision(ops, device, kind, **settings):
    """The largest errors in float32, relative to the sizes of what the CPU finds in float64."""
    case = Case(**settings)
    truth = outcome(cpu, case, kind, "cpu", F64)
    found = {}
    for place, precision in enumerate(PRECISIONS):
        case.precision = (place,) if place else ()
        with products_of_torch(precision):
            mine = outcome(ops, case, kind, device, torch.float32)
        found[precision] = max(
            ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
            for a, b in zip(mine, truth, strict=True)
            if b.numel()
        )
    return found
