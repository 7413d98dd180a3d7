"""Whole scripts written for torchdiffeq, run by `python -m pycnf.compat` and on torchdiffeq."""

import os
import pickle
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torchdiffeq

import pycnf
from pycnf.compat import __main__ as command

NOTE = "pycnf.compat: `import torchdiffeq` now gives pycnf"
ROOT = Path(pycnf.__file__).parent.parent

# Fits a spiral through batches of short windows, as torchdiffeq's first example does.
ODE_DEMO = """
    import argparse
    import torch
    import torch.nn as nn

    parser = argparse.ArgumentParser("ODE demo")
    parser.add_argument("--method", type=str, choices=["dopri5", "rk4"], default="dopri5")
    parser.add_argument("--niters", type=int, default=6)
    parser.add_argument("--adjoint", action="store_true")
    args = parser.parse_args()
    if args.adjoint:
        from torchdiffeq import odeint_adjoint as odeint
    else:
        from torchdiffeq import odeint

    torch.manual_seed(0)
    true_y0 = torch.tensor([[2.0, 0.0]])
    t = torch.linspace(0.0, 25.0, 200)
    true_A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])

    class Lambda(nn.Module):
        def forward(self, t, y):
            return torch.mm(y**3, true_A)

    with torch.no_grad():
        true_y = odeint(Lambda(), true_y0, t, method="dopri5")

    class ODEFunc(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))

        def forward(self, t, y):
            return self.net(y**3)

    func = ODEFunc()
    optimizer = torch.optim.RMSprop(func.parameters(), lr=1e-3)
    for itr in range(args.niters):
        optimizer.zero_grad()
        starts = torch.randperm(190)[:20]
        batch_y = torch.stack([true_y[starts + i] for i in range(10)])
        pred_y = odeint(func, true_y[starts], t[:10], method=args.method)
        loss = torch.mean(torch.abs(pred_y - batch_y))
        loss.backward()
        optimizer.step()
        print("Iter {:04d} | Total Loss {:.6f}".format(itr, loss.item()))
"""

# The density of a continuous flow, called as ffjord does.
FFJORD = """
    import torch
    import torch.nn as nn
    from torchdiffeq import odeint_adjoint as odeint

    torch.manual_seed(1)

    class ODEfunc(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 16), nn.Softplus(), nn.Linear(16, 2))
            self._num_evals = 0

        def before_odeint(self, e):
            self._e, self._num_evals = e, 0

        def forward(self, t, states):
            self._num_evals += 1
            y = states[0]
            with torch.set_grad_enabled(True):
                y.requires_grad_(True)
                t = torch.ones(y.size(0), 1).to(y) * t.clone().detach().requires_grad_(True)
                dy = self.net(torch.cat([y, t], 1))
                jv = torch.autograd.grad(dy, y, self._e, create_graph=True)[0]
                divergence = (jv * self._e).sum(1, keepdim=True)
            return (dy, -divergence) + tuple(dy.pow(2).mean() for s in states[2:])

    class CNF(nn.Module):
        def __init__(self, solver, options):
            super().__init__()
            self.odefunc, self.solver, self.options = ODEfunc(), solver, options
            self.register_parameter("sqrt_end_time", nn.Parameter(torch.sqrt(torch.tensor(0.5))))

        def forward(self, z, reverse=False):
            times = torch.tensor([0.0, self.sqrt_end_time * self.sqrt_end_time]).to(z)
            if reverse:
                times = times.flip(0)
            self.odefunc.before_odeint(torch.randn_like(z).sign())
            state = (z, torch.zeros(z.shape[0], 1).to(z), torch.tensor(0).to(z))
            return odeint(
                self.odefunc, state, times, atol=[1e-5, 1e-5, 1e20], rtol=[1e-5, 1e-5, 1e20],
                method=self.solver, options=self.options,
                adjoint_atol=1e-5, adjoint_rtol=1e-5,
            )

    for solver, options in (("dopri5", {}), ("rk4", {"step_size": 0.1}), ("bosh3", {})):
        flow = CNF(solver, options)
        z, logp, energy = (s[-1] for s in flow(torch.randn(16, 2)))
        loss = -(-0.5 * z.pow(2).sum(1, keepdim=True) - logp).mean() + 0.01 * energy
        loss.backward()
        norm = sum(p.grad.norm() for p in flow.odefunc.parameters())
        back = flow(z.detach(), reverse=True)[0][-1]
        print(solver, f"{loss.item():.5f} {norm.item():.4f} {back.abs().mean().item():.5f}")
"""

# Flow matching's solver: every name of SOLVERS is offered, a fixed step, a likelihood backwards.
FLOW_MATCHING = """
    import argparse
    import torch
    from torchdiffeq import odeint
    from torchdiffeq._impl.odeint import SOLVERS

    parser = argparse.ArgumentParser()
    parser.add_argument("--ode_method", default="midpoint", choices=list(SOLVERS.keys()) + ["edm"])
    args = parser.parse_args()

    torch.manual_seed(2)
    net = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.ELU(), torch.nn.Linear(32, 2))

    def velocity(x, t):
        return net(torch.cat([x, t.expand(x.shape[0], 1)], 1))

    def sample(x, step_size, method, grid, return_intermediates=False):
        options = {"step_size": step_size} if step_size is not None else {}
        with torch.set_grad_enabled(False):
            found = odeint(
                lambda t, x: velocity(x, t), x, grid, method=method, options=options,
                atol=1e-5, rtol=1e-5,
            )
        return found if return_intermediates else found[-1]

    def likelihood(x, step_size, method):
        def dynamics(t, states):
            xt = states[0]
            with torch.set_grad_enabled(True):
                xt.requires_grad_()
                ut = velocity(xt, t)
                div = 0
                for i in range(ut.flatten(1).shape[1]):
                    div += torch.autograd.grad(ut[:, i].sum(), xt, retain_graph=True)[0][:, i]
            return ut.detach(), div.detach()

        options = {"step_size": step_size} if step_size is not None else {}
        with torch.no_grad():
            sol, log_det = odeint(
                dynamics, (x, torch.zeros(x.shape[0])), torch.tensor([1.0, 0.0]),
                method=method, options=options, atol=1e-5, rtol=1e-5,
            )
        return sol[-1], log_det[-1]

    x = torch.randn(8, 2)
    for method, step in ((args.ode_method, 0.05), ("euler", 0.1), ("heun3", 0.2), ("dopri5", None)):
        y = sample(x, step, method, torch.tensor([0.0, 0.3, 1.0]), return_intermediates=True)
        z, log_det = likelihood(y[-1], step, method)
        print(method, tuple(y.shape), f"{y.sum().item():.4f} {z.sum().item():.4f}")
        print(f"{log_det.sum().item():.4f}")
"""

# Keywords only, and modules that override __call__, as torchcde calls it; then latent_ode's way.
KEYWORDS = """
    import torch
    import torchdiffeq

    torch.manual_seed(3)

    class VectorField(torch.nn.Module):
        def __init__(self, net, control):
            super().__init__()
            if not isinstance(net, torch.nn.Module):
                raise TypeError
            self.net, self.control = net, control
            self.nfe = 0

        def __call__(self, t, z):
            self.nfe += 1
            slope = torch.cos(self.control * t)
            return (self.net(z).view(*z.shape, 3) @ slope.unsqueeze(-1)).squeeze(-1)

    net = torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.Tanh())
    field = VectorField(net, torch.tensor([1.0, 2.0, 3.0]))
    for adjoint in (True, False):
        solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        more = {"adjoint_params": tuple(net.parameters()), "adjoint_options": {"norm": "seminorm"}}
        z = solve(
            func=field, y0=torch.ones(5, 4), t=torch.linspace(0, 2, 3), method="dopri5",
            rtol=1e-4, atol=1e-6, options=dict(jump_t=torch.tensor([0.5, 1.0])),
            **(more if adjoint else {}),
        )
        z.pow(2).sum().backward()
        print(tuple(z.shape), f"{z.sum().item():.4f}")
        print(" ".join(f"{p.grad.sum().item():.3f}" for p in net.parameters()))
        net.zero_grad()

    class DiffeqSolver(torch.nn.Module):
        def __init__(self, ode_func, method, odeint_rtol=1e-4, odeint_atol=1e-5):
            super().__init__()
            self.ode_func, self.ode_method = ode_func, method
            self.odeint_rtol, self.odeint_atol = odeint_rtol, odeint_atol

        def forward(self, first_point, time_steps):
            pred = torchdiffeq.odeint(
                self.ode_func, first_point, time_steps,
                rtol=self.odeint_rtol, atol=self.odeint_atol, method=self.ode_method,
            )
            return pred.permute(1, 2, 0, 3)

    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
    gradient_net = torch.nn.Sequential(*layers)
    for method in ("dopri5", "rk4", "euler"):
        pred = DiffeqSolver(lambda t, y: -gradient_net(y), method)(
            torch.randn(3, 6, 4), torch.linspace(0.0, 1.0, 7)
        )
        pred.mean().backward()
        print(method, tuple(pred.shape), f"{pred.pow(2).mean().item():.5f}")
    print(" ".join(f"{p.grad.sum().item():.4f}" for p in gradient_net.parameters()))
"""

# A solver class of one's own, put beside the library's under a plain `import`.
OWN_SOLVER = """
    import torch
    import torchdiffeq
    from torchdiffeq import odeint, odeint_adjoint
    from torchdiffeq._impl.fixed_grid import RK4
    from torchdiffeq._impl.misc import Perturb, _check_inputs, _flat_to_shape
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.solvers import FixedGridODESolver
    import torchdiffeq._impl.odeint as call

    ver = torchdiffeq.__version__
    assert int(ver[0] + ver[2] + ver[4]) >= 22 and call is odeint

    class SymplecticEuler(FixedGridODESolver):
        order = 1

        def _step_func(self, func, t0, dt, t1, y0):
            f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
            q, p = y0.chunk(2, -1)
            p1 = p + dt * f0.chunk(2, -1)[1]
            dq = func(t0, torch.cat([q, p1], -1)).chunk(2, -1)[0] * dt
            return torch.cat([dq, p1 - p], -1), f0

    SOLVERS["symplectic"] = SymplecticEuler

    class Pendulum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(1.3))

        def forward(self, t, y):
            q, p = y.chunk(2, -1)
            return torch.cat([p, -self.rate * torch.sin(q)], -1)

    func, y0, t = Pendulum(), torch.tensor([[1.0, 0.0], [0.1, 0.4]]), torch.linspace(0, 5, 6)
    for solve in (odeint, odeint_adjoint):
        y = solve(func, y0, t, method="symplectic", options={"step_size": 0.05})
        y[-1].sum().backward()
        print(f"{y[-1].sum().item():.5f} {func.rate.grad.item():.4f}")
        func.rate.grad = None

    def skip(func, y0, t, method):
        shapes, func, y0, t, rtol, atol, method, options, event_fn, reverse = _check_inputs(
            func, y0, t, 1e-5, 1e-6, method, None, None, SOLVERS
        )
        solver = SOLVERS[method](func=func, y0=y0, rtol=rtol, atol=atol, **options)
        assert isinstance(solver, RK4) == (method == "rk4")
        return _flat_to_shape(solver.integrate(t), (len(t),), shapes)

    with torch.no_grad():
        for method in ("rk4", "dopri5", "symplectic"):
            found = skip(lambda t, s: (func(t, s[0]),), (y0,), t.flip(0), method)[0]
            print(method, f"{found.abs().sum().item():.4f}")
    try:
        odeint(func, y0, t, method="adams")
    except ValueError as error:
        print(str(error).split(".")[0].split("{")[0], "symplectic" in str(error))
"""

SCRIPTS = {
    "ode_demo": (ODE_DEMO, ["--adjoint", "--niters", "5"]),
    "ffjord": (FFJORD, []),
    "flow_matching": (FLOW_MATCHING, ["--ode_method", "heun2"]),
    "keywords": (KEYWORDS, []),
    "own_solver": (OWN_SOLVER, []),
}


def python(*arguments, cwd, **environment):
    """Runs Python with this pycnf."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=variables, timeout=300, check=False,
    )  # fmt: skip


def write(folder, name, text):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def words(text):
    """What a script printed: its numbers, and the rest."""
    number = r"-?\d+\.\d+(?:e[-+]?\d+)?"
    return [float(x) for x in re.findall(number, text)], re.sub(number, "#", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_print_the_same(name, tmp_path, monkeypatch, capfd):
    source, arguments = SCRIPTS[name]
    script = write(tmp_path, "script.py", source)
    ran = python("-m", "pycnf.compat", script, *arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count(NOTE) == 1

    from torchdiffeq._impl.odeint import SOLVERS

    before = dict(SOLVERS)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    capfd.readouterr()
    with torch.random.fork_rng():
        runpy.run_path(str(script), run_name="__main__")
    SOLVERS.clear()
    SOLVERS.update(before)
    ours, peers = words(ran.stdout), words(capfd.readouterr().out)
    assert ours[1] == peers[1] and len(peers[0]) > 3
    assert ours[0] == pytest.approx(peers[0], rel=2e-3, abs=2e-4)


def test_a_script_runs_as_python_would_run_it(tmp_path):
    write(tmp_path, "beside.py", "import torchdiffeq\nWHERE = torchdiffeq.odeint.__module__")
    script = write(
        tmp_path,
        "script.py",
        """
        import os, pickle, sys
        import torchdiffeq
        from beside import WHERE
        print(__name__, os.path.basename(__file__), sys.argv[1:], os.path.basename(sys.argv[0]))
        print(os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)))
        print(WHERE, sys.modules["__main__"].__dict__ is globals(), torchdiffeq.__version__)
        class Here: pass
        print(type(pickle.loads(pickle.dumps(Here()))) is Here)
        sys.exit(7)
        """,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ran = python("-m", "pycnf.compat", script, "-m", "--flag", "x y", cwd=elsewhere)
    assert ran.stdout.splitlines() == [
        "__main__ script.py ['-m', '--flag', 'x y'] script.py",
        "True",
        "pycnf.odeint.solve True 0.2.5",
        "True",
    ], ran.stderr
    assert ran.returncode == 7
    write(tmp_path, "failing.py", "import torchdiffeq\nraise KeyError('mine')")
    ran = python("-m", "pycnf.compat", "failing.py", cwd=tmp_path)
    assert ran.returncode == 1 and 'failing.py", line 2' in ran.stderr


def test_a_module_runs_as_python_would_run_it(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    write(package, "other.py", "from torchdiffeq import odeint")
    write(
        package,
        "__main__.py",
        """
        import sys
        from .other import odeint
        print(__name__, __package__, odeint.__module__, sys.argv[1:])
        """,
    )
    ran = python("-m", "pycnf.compat", "-m", "package", "a", "--b", cwd=tmp_path)
    assert ran.stdout == "__main__ package pycnf.odeint.solve ['a', '--b']\n", ran.stderr
    # A folder with a __main__.py, without the package.
    write(package, "__main__.py", "import sys, other; print(sys.path[0], other.odeint.__module__)")
    ran = python("-m", "pycnf.compat", "package", cwd=tmp_path)
    assert ran.stdout.split() == ["package", "pycnf.odeint.solve"], ran.stderr


def test_the_command_says_how_it_is_used(monkeypatch, capsys):
    monkeypatch.setattr(runpy, "run_path", None)
    before = sys.modules["torchdiffeq"]
    for arguments in ([], ["nowhere.py"], ["-m"]):
        expected = "no such script: nowhere.py" if "nowhere.py" in arguments else "usage: python -m"
        with pytest.raises(SystemExit, match=expected):
            command.main(arguments)
    command.main(["--help"])
    assert "script.py [args]" in capsys.readouterr().out
    assert sys.modules["torchdiffeq"] is before


INSTALL = """
    import sys
    class Block:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "torchdiffeq":
                raise ModuleNotFoundError(name)
    if "absent" in sys.argv:
        sys.meta_path.insert(0, Block)
    if "before" in sys.argv:
        import torchdiffeq as old
        import torchdiffeq._impl.scipy_wrapper
        assert "pycnf" not in old.__file__
    import pycnf
    assert "pycnf.compat.torchdiffeq" not in sys.modules
    pycnf.compat.install()
    pycnf.compat.install()

    import torchdiffeq
    import torchdiffeq._impl.odeint
    from torchdiffeq import odeint_adjoint as odeint
    from torchdiffeq._impl.fixed_grid import RK4
    from torchdiffeq._impl.odeint import SOLVERS, odeint as inner
    from torchdiffeq._impl import odeint_adjoint
    assert inner is pycnf.odeint is torchdiffeq.odeint is torchdiffeq._impl.odeint
    assert odeint is odeint_adjoint is pycnf.odeint_adjoint
    assert SOLVERS["rk4"] is RK4 and "pycnf" in torchdiffeq.__file__
    assert torchdiffeq.__version__ == "0.2.5"
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torchdiffeq":
            assert module.__name__ == "pycnf.compat." + name, name
    if "before" in sys.argv:
        assert old is not torchdiffeq and old.odeint is not pycnf.odeint
    try:
        import torchdiffeq._impl.conv
    except ModuleNotFoundError as error:
        assert "pycnf stands in" in str(error) and "torchdiffeq._impl.misc" in str(error)
        assert error.name == "torchdiffeq._impl.conv"
    else:
        raise AssertionError
    try:
        from torchdiffeq._impl.misc import _flatten
    except ImportError as error:
        assert "pycnf stands in" in str(error) and "_flat_to_shape" in str(error)
    else:
        raise AssertionError
    import pickle
    things = pickle.load(open(sys.argv[1], "rb"))
    assert things[0] is pycnf.odeint and things[1] is SOLVERS["dopri5"]
    assert things[2] is torchdiffeq._impl.misc.Perturb.NEXT
    assert isinstance(things[3], torchdiffeq._impl.rk_common._ButcherTableau)
    import torch
    assert things[4](torch.ones(3)) == 1
    state = things[5](torch.zeros(()), torch.ones(()))
    assert type(things[5]) is torchdiffeq._impl.misc._ReverseFunc and state == -1
    print("done")
"""


def test_install_with_torchdiffeq_imported_before_or_absent(tmp_path):
    from torchdiffeq._impl import misc
    from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU, Dopri5Solver

    things = (
        torchdiffeq.odeint, Dopri5Solver, misc.Perturb.NEXT, _DORMAND_PRINCE_SHAMPINE_TABLEAU,
        misc._rms_norm, misc._ReverseFunc(max, -1.0),
    )  # fmt: skip
    script = write(tmp_path, "script.py", INSTALL)
    (tmp_path / "things.pkl").write_bytes(pickle.dumps(things))
    for how in ("plain", "before", "absent"):
        ran = python(script, "things.pkl", how, cwd=tmp_path)
        assert ran.stdout == "done\n", ran.stderr
        note = "; what was imported from torchdiffeq before stays as it was"
        assert ran.stderr == NOTE + (note if how == "before" else "") + "\n"
