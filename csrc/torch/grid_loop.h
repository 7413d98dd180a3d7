// Explicit steps over a grid with a vector field written in Python.
#pragma once

#include <pybind11/pybind11.h>

namespace pycnf {

// Binds `grid_steps(func, shapes, y0, a, b, c, grid, outputs, time_dtype, sign, ends_on_grid,
// perturb, solution, states)`.
//
// Steps from y0 over `grid` by the method a, b, c. `shapes`: of the parts of a tuple state, else
// None. `grid` and `outputs`: ascending numbers of `time_dtype`; the field is given `sign` times
// them. `ends_on_grid`: a stage at c = 1 is taken at the grid point, not at start + size. `perturb`:
// the first stage is taken just after the start, one at c = 1 just before the end. `solution`
// [outputs, ...]: its first row is y0's, the others are written, by linear interpolation between
// grid points. `states`, a list or None, receives the state at the start of every step taken.
//
// Returns (steps taken, state there, outputs shown, rows, result): if the field returns what the
// kernels cannot read as it is (another dtype, a graph, no tensor at all), or has asked for
// gradients of the state that it was given, the step in hand is left to the caller, with the
// derivatives that it has so far as `rows` [stages, N] and what the field has just returned as
// `result`; None at the end.
void bind_grid_loop(pybind11::module_& m);

}  // namespace pycnf
