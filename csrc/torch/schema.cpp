// Every op of pycnf on one page.
//
// A state is one flat row of N values, whatever its shape. `k` holds the derivatives of one step,
// one row a stage, [S, N]. `flip` exchanges its first and last row, so that the last stage of an
// accepted step becomes the first of the next without a copy. `fresh` is what the vector field has
// just returned, one tensor or the parts of a tuple, N values in all: it is stored as the newest
// row in the same pass; an empty list says that the row is there already. `weights`, `solution`,
// `error`, `middle` are rows of a tableau; they are multiplied by `h` in the state's dtype.
// `segments` are pairs (begin, end): the norm of a state is the largest RMS of any segment. `rtol`,
// `atol`: f64, 0-dim or one per value.

#include <torch/library.h>

TORCH_LIBRARY(pycnf, m) {
  // y0 + h * sum of weights * k, and the newest row stored. Returns the state of the next stage,
  // shaped as y0.
  m.def(
      "rk_stage(Tensor y0, Tensor(a!) k, bool flip, Tensor[] fresh, float[] weights, float h) "
      "-> Tensor");

  // End of a step. Writes y1 = y0 + h * sum of solution * k unless `solution` is empty (y1 is then
  // read), and the scaled error to `ratio` if it is given. Returns f64 (error norm, 1 if y1 is
  // finite else 0).
  m.def(
      "rk_finish(Tensor y0, Tensor(a!) k, bool flip, Tensor[] fresh, Tensor(b!) y1, "
      "float[] solution, float[] error, float h, Tensor rtol, Tensor atol, int[] segments, "
      "Tensor(c!)? ratio=None) -> Tensor");

  // The step's quartic at the points x in [0, 1], written to out [len(x), N]; middle are the
  // weights of the mid-point.
  m.def(
      "rk_interpolate(Tensor y0, Tensor y1, Tensor k, bool flip, float[] middle, float h, "
      "float[] x, Tensor(a!) out) -> ()");

  // f64 norms of y0 / scale and f0 / scale, or of (f1 - f0) / scale in both places, scale = atol +
  // rtol * |y0|.
  m.def(
      "rk_initial_norms(Tensor y0, Tensor f0, Tensor? f1, Tensor rtol, Tensor atol, "
      "int[] segments) -> Tensor");

  // ---- steps that are chosen where the state is (core/attempt.h), so that no host waits ----------
  //
  // `plan`: attempt f64 (kAttemptFields), times [stages] and h [2] in the state's dtype, output times
  // and prescribed stops in ascending time, f64; and a report f64 in (pinned) memory of the host,
  // kept up to date while the solve runs. `rule`: see torch/attempt_plan.h; `nodes`: the tableau's
  // c. An attempt is attempt_stage for every stage, attempt_finish, attempt_control and
  // attempt_advance; one that comes too late does nothing.

  // `moment`: "begin" settles the trial step of the choice of the first, from rk_initial_norms: f is
  // to be evaluated at times[0], the step is h[0]. "first_step" settles the first, from the norms of
  // the difference of both derivatives or, without, from the size in `attempt`; "decide" accepts or
  // rejects by what attempt_finish returned. Both prepare the next attempt.
  m.def(
      "attempt_control(Tensor(a!)[] plan, Tensor? norms, str moment, float[] rule, float[] nodes, "
      "ScalarType time_dtype) -> ()");

  // After an accepted step: its output times to solution [T, N], y1 to y, the last row of k to the
  // first.
  m.def(
      "attempt_advance(Tensor[] plan, Tensor(a!) y, Tensor y1, Tensor(b!) k, float[] middle, "
      "Tensor(c!) solution, ScalarType time_dtype) -> ()");

  // rk_stage and rk_finish with h [1] in memory where the state is; the rows do not change places.
  m.def(
      "attempt_stage(Tensor y0, Tensor(a!) k, Tensor[] fresh, float[] weights, Tensor h) -> "
      "Tensor");
  m.def(
      "attempt_finish(Tensor y0, Tensor(a!) k, Tensor[] fresh, Tensor(b!) y1, float[] solution, "
      "float[] error, Tensor h, Tensor rtol, Tensor atol, int[] segments) -> Tensor");

  // rk_combine with h [1] in memory where the state is, and without a gradient.
  m.def("attempt_combine(Tensor y, Tensor[] k, float[] weights, Tensor h) -> Tensor");

  // The same for the flows' own policy (core/flow_attempt.h). `plan`: attempt f64 (kFlowFields),
  // times [stages] and h [1] in the state's dtype, the tape of accepted steps f64 [steps, 3], empty
  // for none, and a report f64 as above. `rule`: see torch/flow_plan.h. `moment`: "begin" settles
  // the trial step of the choice of the first, "first_step" the first, from the norms of the
  // difference of both derivatives or, without, from the size in `attempt`; "decide" what becomes
  // of an attempt, and the next; "recall" reads the tape's last step, then the one before, ...
  m.def(
      "flow_control(Tensor(a!)[] plan, Tensor? norms, str moment, float[] rule, float[] nodes) -> "
      "()");

  // After an accepted step: the state it began with, as much of it as tape [steps, M] takes, to the
  // tape, y1 to y, the last row of k to the first.
  m.def(
      "flow_advance(Tensor[] plan, Tensor(a!) y, Tensor y1, Tensor(b!) k, Tensor(c!) tape) -> ()");

  // y + h * sum of weights * k with gradients to y, k and, where it is given, h_graph, a 0-dim
  // tensor equal to h. `ordered`: summed in the order of k, not in that of core/rk.h.
  m.def(
      "rk_combine(Tensor y, Tensor[] k, float[] weights, float h, Tensor? h_graph=None, "
      "bool ordered=False) -> Tensor");

  // The solution of J step = -residual, J being the identity after Broyden's updates by `steps`
  // (states of one row, the oldest first), each with the residual that it led to. On the CPU.
  m.def("broyden_step(Tensor residual, Tensor[] steps) -> Tensor");

  // Each value as a 0-dim tensor of its own: the times of many stages in one call.
  m.def("time_tensors(float[] values, ScalarType dtype, Device device) -> Tensor[]");

  // One key per row of x [B, ...], a hash of its values.
  m.def("probe_keys(Tensor x) -> Tensor");

  // Probes [K, B, D], a function of seed, key, probe and feature alone.
  m.def(
      "probe_sample(Tensor keys, int seed, int probes, int features, bool gaussian, "
      "ScalarType dtype) -> Tensor");

  // ---- the fused engine: a flow whose field is a multilayer perceptron (core/mlp.h) -------------
  //
  // What is solved, by all of its ops: `probe` [K, B, D], where the divergence comes from probes that
  // are given; for random ones `keys` [B], or the rows [B, D] whose hashes the keys are, and `noise`:
  // the seed, K, and whether they are Gaussian. `context` [B, width of the first layer]: added to its
  // product. `parameters`: weight, bias, gate_weight, gate_bias, shift_weight of every layer. `kind`:
  // the activation, by its place in pycnf.nn.activation.ACTIVATIONS; F, 0 for t itself; the divergence
  // (Divergence in mlp_arguments.h); whether there is a row for the kinetic energy; and for the
  // Jacobian norm; on a GPU, if it is not kFloat32, the Precision of products (core/mlp_solve.h).
  // `weights`: the sign of the divergence in the logdet's derivative; and of those two rows, with the
  // direction of time. Extras [E, B] are the logdet and the regularizers. `control`: the fields of
  // StepControl in core/control.h; `grid`: times of a fixed-step method. Reports: Report in
  // mlp_report.h.

  // Solves from start to end. `keep_bytes`: for the stages of the tape, -1 for no tape. Returns z,
  // the extras, a report, and the tape: accepted (t, h, t_next) [N, 3], the N states that they begin
  // with, and N + 1 blocks of kept stages.
  m.def(
      "mlp_solve(Tensor x, Tensor? probe, Tensor? keys, int[] noise, Tensor? context, "
      "Tensor?[] parameters, str method, int[] kind, float[] weights, float start, float end, "
      "float[] control, float[] grid, int keep_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[])");

  // Whether mlp_solve, or mlp_samples, and its gradient can be had for such arguments; x may be a row
  // of zeros, and `noise` is for any probes. On a GPU the network has to fit into the shared memory of
  // a multiprocessor.
  m.def(
      "mlp_solve_fits(Tensor x, int[] noise, Tensor?[] parameters, int[] kind, bool own_times) "
      "-> bool");

  // The exact gradient of the accepted steps, their sizes constant: of x, of the context (empty
  // without), of the parameters (empty where there is none) and, if wanted, of every step's t and h
  // [N, 2].
  m.def(
      "mlp_solve_backward(Tensor z_bar, Tensor? extras_bar, Tensor? probe, Tensor? keys, "
      "int[] noise, Tensor? context, Tensor?[] parameters, str method, int[] kind, "
      "float[] weights, Tensor times, Tensor[] states, Tensor[] kept, bool need_times) "
      "-> (Tensor, Tensor, Tensor[], Tensor)");

  // The adjoint equation from start (where z and the cotangents are known) to end: the gradients of
  // x, context and parameters, and a report. `segments`: for each parameter the part of the error
  // norm that it belongs to (-1: none) and how many numbers it has; empty where the norm is that of z
  // and its cotangent alone.
  m.def(
      "mlp_adjoint(Tensor z, Tensor z_bar, Tensor? extras_bar, Tensor? probe, Tensor? keys, "
      "int[] noise, Tensor? context, Tensor?[] parameters, str method, int[] kind, "
      "float[] weights, float start, float end, float[] control, float[] grid, int[] segments) "
      "-> (Tensor, Tensor, Tensor[], Tensor)");

  // ---- the same with steps per sample: every sample takes its own -------------------------------

  // As mlp_solve. The report counts the sample that took most. The tape: (t, h, t_next, ends) [N, 4]
  // and z [N, D] of all accepted steps, the place of each sample's preceding one [N] (-1: none), and
  // of each sample's last [B]; empty unless `taped`.
  m.def(
      "mlp_samples(Tensor x, Tensor? probe, Tensor? keys, int[] noise, Tensor? context, "
      "Tensor?[] parameters, str method, int[] kind, float[] weights, float start, float end, "
      "float[] control, bool taped) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // As mlp_solve_backward; the last result is the gradient of start and end [2], if wanted.
  m.def(
      "mlp_samples_backward(Tensor z_bar, Tensor? extras_bar, Tensor? probe, Tensor? keys, "
      "int[] noise, Tensor? context, Tensor?[] parameters, str method, int[] kind, "
      "float[] weights, Tensor times, Tensor states, Tensor previous, Tensor newest, "
      "bool need_times) "
      "-> (Tensor, Tensor, Tensor[], Tensor)");

  // As mlp_adjoint; parameters are a quadrature.
  m.def(
      "mlp_samples_adjoint(Tensor z, Tensor z_bar, Tensor? extras_bar, Tensor? probe, "
      "Tensor? keys, int[] noise, Tensor? context, Tensor?[] parameters, str method, int[] kind, "
      "float[] weights, float start, float end, float[] control) "
      "-> (Tensor, Tensor, Tensor[], Tensor)");

  // ---- its field, once (core/mlp_field.h) --------------------------------------------------------
  //
  // At t, 0-dim or one for each sample [B]. `context`, `parameters` and `kind` as above, `kind`
  // without regularizers and, but for the divergence's ops, without a divergence. The probes of the
  // divergence are given, [K, B, D], or drawn: what probe_sample gives for `keys` [B], `seed`,
  // `probes` and `gaussian`; on the CPU they are never in memory as a whole. The last result of a
  // forward op is what its backward op needs and would otherwise compute again, if `keep`, else it is
  // empty: the products of every layer; on the CPU the state too, of a size that a multiple of 64
  // samples would need; on a GPU nothing of more tangents than it takes at once.
  //
  // Backward ops return the gradients of z, t, the context, the tangents or probe (empty where there
  // is none, or where probes were drawn) and of the parameters (empty where there is none); those of
  // t and the parameters are empty unless `need_parameters`.

  // f [B, D].
  m.def(
      "mlp_value(Tensor t, Tensor z, Tensor? context, Tensor?[] parameters, int[] kind, bool keep) "
      "-> (Tensor, Tensor)");

  // f and the images (df/dz) tangents_k [K, B, D].
  m.def(
      "mlp_value_jvp(Tensor t, Tensor z, Tensor tangents, Tensor? context, Tensor?[] parameters, "
      "int[] kind, bool keep) -> (Tensor, Tensor, Tensor)");

  // f and the products cotangents_k^T df/dz [K, B, D].
  m.def(
      "mlp_vjp(Tensor t, Tensor z, Tensor cotangents, Tensor? context, Tensor?[] parameters, "
      "int[] kind) -> (Tensor, Tensor)");

  // f and its divergence [B].
  m.def(
      "mlp_value_divergence(Tensor t, Tensor z, Tensor? probe, Tensor? context, "
      "Tensor?[] parameters, int[] kind, Tensor? keys, int seed, int probes, bool gaussian, "
      "bool keep) -> (Tensor, Tensor, Tensor)");

  // From the cotangents of f and of the divergence, where there is one: without, mlp_value's.
  m.def(
      "mlp_value_divergence_backward(Tensor? value_bar, Tensor? divergence_bar, Tensor t, Tensor "
      "z, "
      "Tensor? probe, Tensor? context, Tensor?[] parameters, int[] kind, Tensor? keys, int seed, "
      "int probes, bool gaussian, Tensor kept, bool need_parameters) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])");

  // From the cotangents of f and of the images.
  m.def(
      "mlp_value_jvp_backward(Tensor? value_bar, Tensor? images_bar, Tensor t, Tensor z, "
      "Tensor tangents, Tensor? context, Tensor?[] parameters, int[] kind, Tensor kept, "
      "bool need_parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])");
}
