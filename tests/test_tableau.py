"""The tableaux are the methods they are named after, and torchdiffeq's numbers.

A method has order p if and only if its elementary weights equal 1 / density for every rooted tree
of up to p vertices (Butcher, "Coefficients for the study of Runge-Kutta integration processes",
1963).
"""

import math
from fractions import Fraction
from functools import cache

import pytest
import torch

from pycnf.odeint.tableau import TABLEAUX

ADAPTIVE = [name for name, tableau in TABLEAUX.items() if tableau.adaptive]
# Orders of the propagated solution, of the other one of the pair, and of the mid-point weights.
ORDER = {
    "dopri5": (5, 4, 4),
    "dopri8": (8, 7, 5),
    "tsit5": (4, 5, 4),  # its propagated weights are those of the lower order
    "bosh3": (3, 2, 1),
    "fehlberg2": (2, 1, 1),
    "adaptive_heun": (2, 1, 1),
    "euler": (1, None, None),
    "midpoint": (2, None, None),
    "heun2": (2, None, None),
    "heun3": (3, None, None),
    "rk4": (4, None, None),
}
# Published as rational numbers short enough to be read off the doubles; those of dopri8 and tsit5
# are themselves approximations of algebraic numbers, good to about 1e-15.
RATIONAL = [name for name in TABLEAUX if name not in ("dopri8", "tsit5")]
ROUNDING = Fraction(1, 10**13)


def test_every_method_is_tested():
    assert set(ORDER) == set(TABLEAUX)


@cache
def trees(vertices):
    """Rooted trees as sorted tuples of their root's subtrees."""
    if vertices == 1:
        return [()]
    return sorted({tuple(sorted(forest)) for forest in forests(vertices - 1)})


def forests(vertices):
    if vertices == 0:
        return [()]
    return [
        (tree, *rest)
        for first in range(1, vertices + 1)
        for tree in trees(first)
        for rest in forests(vertices - first)
    ]


def size(tree):
    return 1 + sum(size(branch) for branch in tree)


def density(tree):
    return size(tree) * math.prod(density(branch) for branch in tree)


def stage_weights(tree, a):
    """The factors of each stage in the tree's elementary weight."""
    product = [Fraction(1)] * len(a)
    for branch in tree:
        inner = stage_weights(branch, a)
        product = [p * dot(row, inner) for p, row in zip(product, a)]
    return product


def dot(row, values):
    return sum((x * y for x, y in zip(row, values) if x and y), Fraction(0))


def residual(a, weights, order, point=1):
    """Largest relative violation of the conditions of one order for the solution at point h."""
    return max(
        abs(dot(weights, stage_weights(tree, a)) * density(tree) - Fraction(point) ** order)
        for tree in trees(order)
    )


def read_off(x):
    """The short rational number that a double stands for."""
    value = Fraction(x).limit_denominator(1_000_000)
    # e is a difference of two rounded numbers.
    assert abs(value - Fraction(x)) < Fraction(2, 10**16) * max(1, abs(value)), x
    return value


def exact(name):
    """a, b, e as rational numbers: the published ones where they are short, else the doubles."""
    tableau = TABLEAUX[name]
    number = read_off if name in RATIONAL else Fraction
    rows = [[number(x) for x in row] for row in tableau.a]
    return rows, [number(x) for x in tableau.b], [number(x) for x in tableau.e]


def tolerance(name):
    return 0 if name in RATIONAL else ROUNDING


def assert_order(a, weights, order, allowed, point=1):
    """The conditions hold up to `order` and not beyond."""
    for p in range(1, order + 1):
        assert residual(a, weights, p, point) <= allowed, f"order {p}"
    assert residual(a, weights, order + 1, point) > Fraction(1, 1000)


def test_numbers_of_trees():
    """OEIS A000081; a missing tree would be a missing condition."""
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("name", TABLEAUX)
def test_order_of_the_solution(name):
    a, b, _ = exact(name)
    assert_order(a, b, ORDER[name][0], tolerance(name))


@pytest.mark.parametrize("name", TABLEAUX)
def test_order_for_step_control(name):
    """torchdiffeq's `order`; of tsit5 it is the published one."""
    assert TABLEAUX[name].order == (5 if name == "tsit5" else ORDER[name][0])


@pytest.mark.parametrize("name", ADAPTIVE)
def test_order_of_the_embedded_solution(name):
    a, b, e = exact(name)
    embedded = [x - y for x, y in zip(b, e)]
    assert_order(a, embedded, ORDER[name][1], tolerance(name))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_order_of_the_mid_point(name):
    """The state at the middle of the step, which the quartic interpolant passes through."""
    a, _, _ = exact(name)
    m = [Fraction(x) for x in TABLEAUX[name].m]
    assert abs(sum(m) - Fraction(1, 2)) <= ROUNDING
    assert_order(a, m, ORDER[name][2], ROUNDING, Fraction(1, 2))


def test_tsit5_s_last_stage_is_of_the_higher_order():
    tableau = TABLEAUX["tsit5"]
    higher = [b - e for b, e in zip(tableau.b, tableau.e)]
    for x, y in zip(higher, [*tableau.a[-1], 0.0]):
        assert abs(x - y) < 1e-15


@pytest.mark.parametrize("name", TABLEAUX)
def test_rows_sum_to_their_node(name):
    tableau = TABLEAUX[name]
    assert tableau.a[0] == []
    assert tableau.c[0] == 0
    for row, c in zip(tableau.a, tableau.c):
        terms = [Fraction(x) for x in row]
        assert abs(sum(terms) - Fraction(c)) < Fraction(2, 10**16) * (1 + sum(map(abs, terms)))


@pytest.mark.parametrize("name", TABLEAUX)
def test_lengths(name):
    tableau = TABLEAUX[name]
    assert [len(row) for row in tableau.a] == list(range(tableau.stages))
    for row in (tableau.b, tableau.c, tableau.e, tableau.m):
        assert len(row) == tableau.stages
    assert any(tableau.e) == any(tableau.m) == tableau.adaptive


@pytest.mark.parametrize("name", ADAPTIVE)
def test_error_weights_sum_to_zero(name):
    _, _, e = exact(name)
    assert abs(sum(e)) <= (0 if name in RATIONAL else Fraction(1, 10**15))


@pytest.mark.parametrize("name", TABLEAUX)
def test_solution_is_last_stage(name):
    """Bit by bit: the state of the last stage then is y1, and nothing has to be summed again."""
    tableau = TABLEAUX[name]
    same = [*tableau.a[-1], 0.0] == tableau.b
    assert tableau.solution_is_last_stage == same
    assert same == (name in ("dopri5", "dopri8", "bosh3"))
    assert not same or tableau.c[-1] == 1


def torchdiffeq_solver(name):
    pytest.importorskip("torchdiffeq")
    from torchdiffeq._impl.odeint import SOLVERS

    solver = SOLVERS.get(name)
    if solver is None or not solver.__module__.startswith("torchdiffeq"):
        pytest.skip(f"this torchdiffeq has no {name}")
    return solver


@pytest.mark.parametrize("name", ADAPTIVE)
def test_torchdiffeq_has_the_same_numbers(name):
    """To two units in the last place, where the same fraction was rounded in another order."""
    theirs, mine = torchdiffeq_solver(name), TABLEAUX[name]
    assert mine.order == theirs.order
    for here, there in [
        (mine.c[1:], theirs.tableau.alpha),
        (mine.b, theirs.tableau.c_sol),
        (mine.e, theirs.tableau.c_error),
        (mine.m, theirs.mid),
        *zip(mine.a[1:], theirs.tableau.beta, strict=True),
    ]:
        here = torch.tensor(here, dtype=torch.float64)
        torch.testing.assert_close(here, there.to(here), rtol=4.5e-16, atol=1e-17)


def slope(t, y):
    return torch.stack([y[1] * torch.cos(t) + t * t, -y[0] * y[0] + 0.5 * y[1] + t])


@pytest.mark.parametrize("name", [name for name in TABLEAUX if name not in ADAPTIVE])
def test_torchdiffeq_s_fixed_step_has_the_same_numbers(name):
    """Its formulas are code; one large step of a non-linear problem tells the methods apart."""
    torchdiffeq_solver(name)
    from torchdiffeq import odeint

    y0 = torch.tensor([0.7, -0.4], dtype=torch.float64)
    t = torch.tensor([0.2, 1.1], dtype=torch.float64)
    tableau, h = TABLEAUX[name], t[1] - t[0]
    k = []
    for c, row in zip(tableau.c, tableau.a):
        stage = y0 + h * sum(w * slope_ for w, slope_ in zip(row, k))
        k.append(slope(t[0] + c * h, stage))
    y1 = y0 + h * sum(w * slope_ for w, slope_ in zip(tableau.b, k))
    torch.testing.assert_close(y1, odeint(slope, y0, t, method=name)[1], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", TABLEAUX)
def test_transient_stages_enter_later_stages_only(name):
    """What the adjoint may leave out of them must not matter: no weight, but in the stages."""
    tableau = TABLEAUX[name]
    expected = {"dopri5": {1}, "dopri8": {1, 2, 3, 4}}.get(name, set())
    assert tableau.transient_stages == expected
    for stage in expected:
        assert tableau.b[stage] == tableau.e[stage] == tableau.m[stage] == 0
        assert any(row[stage] != 0 for row in tableau.a[stage + 1 :])
