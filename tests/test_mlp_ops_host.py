"""The field's ops for a GPU, run on a host, against the CPU's: values and gradients.

Tangents that are more than 4000 products take turns here (host_build.py), so that both ways are
tested.
"""

import itertools

import field_cases
import pytest
import torch
from field_cases import KINDS, LAYERS, Case, close, cpu, flat
from host_ops import DEVICE
from kernel_cases import F32, F64, assert_same_bits

from pycnf import _ops
from pycnf.nn import ACTIVATIONS

AT_ONCE = 4000


@pytest.fixture
def ops(cuda_host_ops):
    return cuda_host_ops


def moved(x):
    return field_cases.moved(x, DEVICE)


def compare(ops, *arguments):
    field_cases.compare(ops, arguments[0], DEVICE, *arguments[1:])


@pytest.mark.parametrize("hidden", [(), (1,), (5,), (5, 4), (8, 12), (17, 33, 16)], ids=str)
@pytest.mark.parametrize("features", [1, 3, 16])
def test_shapes(ops, features, hidden):
    for batch, count in [(1, 1), (1, 3), (7, 1), (70, 3)]:
        compare(ops, Case(features, hidden, batch, count))


@pytest.mark.parametrize("hidden", [(5,), (17, 33, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_precisions(ops, kind, hidden):
    """TF32 is torch's to make of float32, and there is none of it here."""
    found = field_cases.errors_by_precision(ops, DEVICE, kind, hidden=hidden, batch=7)
    assert found["float32"] == found["tf32"] < 3e-6, found
    assert found["3xtf32"] < 3 * found["float32"] + 1e-6, found
    assert 1e-4 < found["bf16"] < 3e-2, found


def test_sums_over_many_samples(ops):
    """Of more rows than a block adds up, in more than one way."""
    for batch in (100, 4200):
        case = Case(2, (36,), batch, 1)
        compare(ops, case, ("value", "probes"), 1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(ops, activation):
    for hidden in [(5,), (8, 4), (5, 4, 6)]:
        case = Case(hidden=hidden, activation=activation)
        case.z *= 3
        compare(ops, case)


@pytest.mark.parametrize("layer", [*LAYERS, ("ignore", "concatsquash", "squash")], ids=str)
@pytest.mark.parametrize("time", ["t", ("fourier", 6)], ids=["t", "fourier"])
@pytest.mark.parametrize("own", [False, True], ids=["shared-t", "t-per-sample"])
def test_layers_times_and_context(ops, layer, time, own):
    for batch, context in itertools.product((1, 19), (0, 2)):
        compare(ops, Case(batch=batch, own=own, context=context, layer=layer, time=time))
    if isinstance(layer, str):
        for hidden in [(), (4,), (5, 4, 6)]:
            compare(ops, Case(hidden=hidden, own=own, context=2, layer=layer, time=time))


@pytest.mark.parametrize("layer", LAYERS)
def test_arguments_that_are_not_contiguous(ops, layer):
    for hidden in [(4,), (5, 4), (8, 8, 8)]:
        compare(ops, Case(hidden=hidden, turned=True, context=2, layer=layer))
        compare(ops, Case(hidden=hidden, turned=True, own=True, layer=layer))


def test_parameters_may_lack(ops):
    """A layer without a bias, a gate without one."""
    for own in (False, True):
        for missing in ([1], [3], [1, 3], [1, 3, 6, 8, 11, 13]):
            case = Case(own=own, hidden=(4, 5))
            for i in missing:
                case.shared[1][i] = None
            compare(ops, case)


def test_no_cotangent(ops):
    """Gradients of nothing are zero."""
    case = Case(context=2)
    for kind in ("jvp", "probes", "exact"):
        name, arguments = case.backward(kind)
        nothing = torch.empty(0, dtype=F64)
        results = [
            getattr(op, name)(None, None, *move(arguments), move(nothing), True)
            for op, move in ((ops, moved), (cpu, lambda x: x))
        ]
        close(*results)
        assert not any(x.any() for x in flat(results[0]))


def test_no_samples(ops):
    case = Case(batch=0, context=2)
    for kind in KINDS:
        name, arguments = case.forward(kind)
        mine = getattr(ops, name)(*moved(arguments), True)
        close(mine, getattr(cpu, name)(*arguments, True))
        name, arguments = case.backward(kind)
        bars = [x.cpu() for x in mine[:-1]] + [None] * (kind == "value")
        given = (*bars, *arguments, mine[-1].cpu())
        for need in (True, False):
            close(getattr(ops, name)(*moved(given), need), getattr(cpu, name)(*given, need))
    name, arguments = case.forward("vjp")
    close(getattr(ops, name)(*moved(arguments)), getattr(cpu, name)(*arguments))


@pytest.mark.parametrize("hidden", [(9,), (9, 20), (9, 20, 7)], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared-t", "t-per-sample"])
@pytest.mark.parametrize("count", [5, 6, 11])
def test_tangents_take_turns(ops, hidden, own, count):
    """One more than fit, several turns, a last one that is not full; given, drawn and unit."""
    batch = AT_ONCE // 5 // (sum(hidden) + count)
    case = Case(count, hidden, batch, count, own, context=2, layer="concatsquash")
    outputs = sum(hidden) + count
    assert AT_ONCE // (batch * outputs) == 5
    name, arguments = case.forward("unit")
    kept = getattr(ops, name)(*moved(arguments), True)[-1]
    assert (kept.numel() > 0) == (count == 5)
    compare(ops, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [(), (5,), (5, 4), (5, 4, 6), (40, 40, 40)], ids=str)
def test_what_is_kept_has_the_size_that_the_fake_says(ops, monkeypatch, kind, hidden):
    monkeypatch.setattr(_ops, "_TANGENT_NUMBERS", AT_ONCE)
    case = Case(hidden=hidden, batch=19)
    name, arguments = case.forward(kind)
    kept = getattr(ops, name)(*moved(arguments), True)[-1]
    closed_form = kind == "exact" and len(hidden) in (1, 2)
    tangents = {"value": 0, "unit": 3, "exact": 1 if closed_form else 3}.get(kind, 2)
    z, parameters = moved(case.z), case.shared[1]
    expected = _ops._kept(z, parameters, tangents, True, closed_form=closed_form)
    assert kept.shape == expected.shape
    assert (kept.numel() == 0) == (tangents > 1 and len(hidden) == 3 and hidden[0] == 40)


@pytest.mark.parametrize("kind", [*KINDS, "vjp"])
@pytest.mark.parametrize("own", [False, True], ids=["shared-t", "t-per-sample"])
def test_every_order_of_threads_gives_the_same_bits(ops, kind, own):
    case, found = Case(hidden=(40, 36), batch=70, own=own), []
    forward, arguments = case.forward(kind)
    arguments = moved(arguments)
    for seed in (1, 2, 3):
        ops.seed(seed)
        results = list(getattr(ops, forward)(*arguments, *([] if kind == "vjp" else [True])))
        if kind != "vjp":
            name, others = case.backward(kind)
            torch.manual_seed(1)
            bars = [moved(case.normal(*x.shape)) for x in results[:-1]]
            bars += [None] * (kind == "value")
            results += getattr(ops, name)(*bars, *moved(others), results[-1], True)
        found.append(flat(results))
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [(60,), (60, 60), (61, 60, 60)], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu", "sin"])
def test_float32_is_as_near_the_truth_as_the_cpu(ops, kind, hidden, activation):
    single = Case(4, hidden, 50, 1, context=2, dtype=F32, activation=activation)
    torch.manual_seed(2)

    def outcome(op, to, dtype):
        def cast(x):
            if isinstance(x, (list, tuple)):
                return type(x)(map(cast, x))
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        name, arguments = single.forward(kind)
        *results, kept = getattr(op, name)(*to(cast(arguments)), True)
        name, arguments = single.backward(kind)
        bars = [torch.full(x.shape, 0.5) for x in results] + [None] * (kind == "value")
        gradients = getattr(op, name)(*to(cast((*bars, *arguments))), kept, True)
        return [x.double() for x in flat([results, gradients])]

    truth = outcome(cpu, lambda x: x, F64)
    theirs = outcome(cpu, lambda x: x, F32)
    mine = outcome(ops, moved, F32)
    for exact, a, b in zip(truth, mine, theirs, strict=True):
        assert (a - exact).norm() <= 4 * (b - exact).norm() + 1e-6 * exact.norm()
        assert (a - exact).norm() <= 1e-4 * exact.norm()


# ---- what is refused -----------------------------------------------------------------------------

GOOD = Case(batch=5, context=2)
C, T, Z, P = GOOD.shared[0], GOOD.t, GOOD.z, GOOD.columns


@pytest.mark.parametrize(
    ("kind", "at", "bad", "says"),
    [
        ("value", 0, T.float(), "t must be 0-dim or"),
        ("value", 0, Z[:4, 0], "t must be 0-dim or"),
        ("value", 1, Z[0], "z must be"),
        ("value", 1, Z.half(), "z must be"),
        ("value", 2, C[:, :2], "context must be"),
        ("value", 3, [Z[0]], "parameters must be"),
        ("value", 4, [0, 0, 1, 0, 0], "kind must have no divergence"),
        ("value", 4, [0, 0, 0, 1, 0], "kind must be 5 or 6 numbers, the fourth"),
        ("value", 4, [99, 0, 0, 0, 0], "activation must be"),
        ("jvp", 2, Z, "tangents must be"),
        ("jvp", 2, P.float(), "tangents must be"),
        ("vjp", 2, P[:, :2], "cotangents must be"),
        ("probes", 2, None, "probe or keys"),
        ("probes", 2, P[:0], "probe must be"),
        ("probes", 5, [0, 0, 0, 0, 0], "kind must have a divergence"),
        ("drawn", 6, torch.arange(5.0), "keys must be int64"),
        ("drawn", 8, 0, "probes must be at least 1"),
        ("exact", 2, P, "probe or keys"),
        ("exact", 5, [0, 0, 7, 0, 0], "got divergence 7"),
        ("exact", 0, Z[:, 0].contiguous(), "closed form needs a last layer without a gate"),
    ],
)
def test_bad_arguments(ops, kind, at, bad, says):
    name, arguments = GOOD.forward(kind)
    arguments = [*moved(arguments), *([] if kind == "vjp" else [False])]
    getattr(ops, name)(*arguments)
    arguments[at] = moved(bad)
    with pytest.raises(RuntimeError, match=says):
        getattr(ops, name)(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_must_be_on_the_device(ops, kind):
    """What is left on the CPU is refused, and named."""
    name, arguments = GOOD.forward(kind)
    for i, x in enumerate(arguments):
        tensors = [x] if isinstance(x, torch.Tensor) else x if isinstance(x, list) else []
        if not any(isinstance(each, torch.Tensor) for each in tensors):
            continue
        mixed = list(moved(arguments))
        mixed[i] = x
        with pytest.raises(RuntimeError, match=r"must be|belong to"):
            getattr(ops, name)(*mixed, False)


def test_bad_arguments_of_backward(ops):
    for kind, bad in [
        ("probes", [(0, Z[:4], "value_bar must be"), (1, Z[:, 0].float(), "divergence_bar must")]),
        ("jvp", [(0, Z.float(), "value_bar must be"), (1, P[:1], "images_bar must be")]),
    ]:
        name, arguments = GOOD.forward(kind)
        *results, kept = getattr(ops, name)(*moved(arguments), True)
        name, arguments = GOOD.backward(kind)
        good = [*results, *moved(arguments), kept, True]
        getattr(ops, name)(*good)
        for at, wrong, says in [*bad, (-2, kept.cpu()[1:], "kept must be")]:
            given = list(good)
            given[at] = moved(wrong)
            with pytest.raises(RuntimeError, match=says):
                getattr(ops, name)(*given)
