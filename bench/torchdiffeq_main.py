"""What torchdiffeq's main branch has and its release 0.2.5 lacks, in the release's own frame.

`tsit5` from Tsitouras' published coefficients and the facts known of it: the propagated weights
are ``b + error``, the last stage is reused as the next f0. The implicit methods by Broyden's method
with a dense Jacobian.
"""

import warnings

import torch
from torchdiffeq._impl.misc import Perturb
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _ButcherTableau
from torchdiffeq._impl.solvers import FixedGridODESolver

from pycnf.odeint.implicit_grid import IMPLICIT_TABLEAUX

# Tsitouras 2011, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
# assumption": nodes, stages, fifth-order weights, error weights, and b_i(1/2) of the interpolant.
_TSIT5_B = [
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
    0.0,
]
_TSIT5_ERROR = [
    -0.0017800110522257714,
    -0.0008164344596567469,
    0.007880878010261996,
    -0.14471100717326290,
    0.5823571654525552,
    -0.45808210592918695,
    1 / 66,
]


def _double(values):
    return torch.tensor(values, dtype=torch.float64)


def _tsit5_mid():
    x = 0.5
    return [
        -1.0530884977290216
        * x
        * (x - 1.3299890189751412)
        * (x * x - 1.4364028541716351 * x + 0.7139816917074209),
        0.1017 * x * x * (x * x - 2.1966568338249754 * x + 1.2949852507374631),
        2.490627285651252793 * x * x * (x * x - 2.38535645472061657 * x + 1.57803468208092486),
        -16.54810288924490272 * (x - 1.21712927295533244) * (x - 0.61620406037800089) * x * x,
        47.37952196281928122 * (x - 1.203071208372362603) * (x - 0.658047292653547382) * x * x,
        -34.87065786149660974 * (x - 1.2) * (x - 2 / 3) * x * x,
        2.5 * (x - 1) * (x - 0.6) * x * x,
    ]


TSIT5_TABLEAU = _ButcherTableau(
    alpha=_double([0.161, 0.327, 0.9, 0.9800255409045097, 1, 1]),
    beta=[
        _double([0.161]),
        _double([-0.008480655492356988, 0.33548065549235699]),
        _double([2.8971530571054935, -6.359448489975075, 4.362295432869581]),
        _double([5.325864828439257, -11.748883564062828, 7.495539342889836, -0.09249506636175525]),
        _double(
            [
                5.86145544294642,
                -12.92096931784711,
                8.159367898576159,
                -0.071584973281401,
                -0.028269050394068383,
            ]
        ),
        _double(_TSIT5_B[:6]),
    ],
    c_sol=_double([b + e for b, e in zip(_TSIT5_B, _TSIT5_ERROR, strict=True)]),
    c_error=_double(_TSIT5_ERROR),
)
TSIT5_MID = _double(_tsit5_mid())


class Tsit5Solver(RKAdaptiveStepsizeODESolver):
    """torchdiffeq's own stepping with Tsitouras' coefficients."""

    order = 5
    tableau = TSIT5_TABLEAU
    mid = TSIT5_MID


class DenseBroyden(FixedGridODESolver):
    """An implicit method as the peer's main branch steps it: Broyden's method with a dense Jacobian
    from the identity on, solved anew in every iteration, and an absolute bound on the residual.

    The coefficients are pycnf's, which are checked by their order conditions.
    """

    def __init__(self, func, y0, max_iters=100, **options):
        super().__init__(func, y0, **options)
        self.max_iters = max_iters
        self.real = y0.abs().dtype
        self.bound = 1e-6 if self.real == torch.float32 else 1e-8
        self.a = torch.tensor(self.method.a, dtype=y0.dtype)
        self.b = torch.tensor(self.method.b, dtype=y0.dtype)
        self.c = torch.tensor(self.method.c, dtype=self.real)

    def _step_func(self, func, t0, dt, t1, y0):
        f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
        t0, dt, t1 = (x.to(self.real) for x in (t0, dt, t1))
        slopes = f0.unsqueeze(-1).repeat(*[1] * f0.dim(), len(self.c))  # [..., stages]
        for stages in self.method.blocks:
            slopes = self._solve(func, (t0, dt, t1), y0.unsqueeze(-1), slopes, stages)
        return slopes @ (dt * self.b), f0

    def _solve(self, func, times, y0, slopes, stages):
        t0, dt, t1 = times
        weights = self.a[stages.start : stages.stop].T * dt

        def residual(slopes):
            states = y0 + slopes @ weights
            values = []
            for y, i in zip(states.unbind(-1), stages, strict=True):
                if self.method.c[i] == 1:
                    values.append(func(t1, y, perturb=Perturb.PREV))
                else:
                    values.append(func(t0 + self.c[i] * dt, y))
            mine = slopes[..., stages.start : stages.stop]
            return (mine - torch.stack(values, -1)).reshape(-1)

        r = residual(slopes)
        jacobian = torch.ones_like(r).diag()
        for _ in range(self.max_iters):
            if torch.linalg.norm(r) < self.bound:
                return slopes
            try:
                step = torch.linalg.solve(jacobian, -r)
            except torch.linalg.LinAlgError:
                break
            change = step.view(*slopes.shape[:-1], len(stages))
            before, after = stages.start, len(self.c) - stages.stop
            slopes = slopes + torch.nn.functional.pad(change, (before, after))
            new = residual(slopes)
            update = new - r - jacobian @ step
            jacobian = jacobian + torch.outer(update, step.conj()) / torch.vdot(step, step)
            r = new
        warnings.warn(
            "Functional iteration did not converge. Solution may be incorrect.", stacklevel=2
        )
        return slopes


def add_methods():
    """Adds the methods to the installed torchdiffeq, unless it has them."""
    SOLVERS.setdefault("tsit5", Tsit5Solver)
    for tableau in IMPLICIT_TABLEAUX.values():
        SOLVERS.setdefault(tableau.name, type(tableau.name, (DenseBroyden,), {"method": tableau}))
