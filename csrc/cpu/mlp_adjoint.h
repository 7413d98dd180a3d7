// Steps of the adjoint of a tile: the state is z and the cotangent a of z,
//
//     ż = f,  ȧ = −∂/∂z (a·f + μ·extras),
//
// and the integrand of the parameters' gradient is −∂/∂θ of the same. To be included within the
// namespace of an instruction set only.

template <typename T>
struct AdjointTile {
  Tile<T> tile;
  StageRows<T> k;
  ReverseScratch<T> scratch;
  Evaluation<T> evaluation;
  Vec<T>* first_bar;
  Vec<T>* rates_bar;
  const Vec<T>* extras_bar;
  Vec<T>* y;  // [2 D, vectors]
  const Vec<T>* y0;
};

template <typename T>
AdjointTile<T> open_adjoint(const MlpSolve<T>& solve, const MlpAdjointAttempt<T>& adjoint,
                            int64_t index, Workspace<T>& workspace) {
  AdjointTile<T> work = {};
  work.tile = open_tile(solve, index, workspace);
  const int64_t rows = 2 * solve.field.features, extras = extra_rows(solve) * solve.vectors;
  work.k = stage_rows(solve, adjoint.attempt, work.tile, rows);
  work.scratch = take_reverse_scratch(solve, work.tile, workspace);
  work.evaluation =
      evaluation_at(solve, work.tile.shape, workspace.take(kept_numbers(solve) / kLanes<T>));
  work.first_bar = workspace.take(solve.field.layer[0].out * solve.tangents * solve.vectors);
  work.rates_bar = workspace.take(extras);
  work.extras_bar = reinterpret_cast<const Vec<T>*>(adjoint.extras_bar) + index * extras;
  work.y = workspace.take(rows * solve.vectors);
  work.y0 = reinterpret_cast<const Vec<T>*>(adjoint.attempt.y0) + index * rows * solve.vectors;
  return work;
}

// The right-hand side k [2 D, vectors] at work.y; the cotangents times `scale` [vectors] where that
// is given. Parameters and context are added to this stage's sums.
template <bool kOwn, typename T>
void adjoint_rates(const MlpSolve<T>& solve, const MlpAdjointAttempt<T>& adjoint,
                   const AdjointTile<T>& work, int stage, const Vec<T>* scale, Vec<T>* k) {
  const auto& tile = work.tile;
  const MlpAt<T>& at = adjoint.attempt.at[stage];
  const int64_t numbers = tile.vectors_of_z, count = solve.vectors;
  const int64_t width = solve.field.layer[0].out, columns = solve.tangents * count;
  for (int64_t i = 0; i < numbers; ++i) work.evaluation.z[i] = work.y[i];
  Vec<T>* a = work.y + numbers;
  // The extras' rates are not needed, but room for them is.
  evaluate<kOwn>(solve, kActivateLayer<kOwn, T>[int(solve.field.activation)], at, tile.shape,
                 tile.constants, work.evaluation.z, work.evaluation.products, work.scratch.x,
                 {k, work.rates_bar, nullptr});
  for (int64_t r = 0; r < extra_rows(solve) * count; ++r) {
    work.rates_bar[r] = work.extras_bar[r];
    if (scale != nullptr) work.rates_bar[r] *= scale[r % count];
  }
  for (int64_t r = 0; scale != nullptr && r < numbers; ++r) a[r] *= scale[r % count];
  Sums<T> sums = {};
  sums.layers = adjoint.gradients[stage];
  sums.mixed_bar = adjoint.mixed_bar[stage];
  sums.first_bar = work.first_bar;
  for (int64_t i = 0; i < width * columns; ++i) sums.first_bar[i] = splat(T(0));
  if (adjoint.context_bar != nullptr) {
    sums.context_bar = vectors(adjoint.context_bar[stage]) + tile.index * width * count;
  }
  Vec<T>* z_bar = k + numbers;
  reverse<kOwn>(solve, kActivateLayer<kOwn, T>[int(solve.field.activation)],
                kReverseActivation<kOwn, T>[int(solve.field.activation)], at, tile.shape,
                tile.constants, work.evaluation.z, work.evaluation.products,
                cotangents_of(solve, a, work.rates_bar), work.scratch, sums, z_bar);
  add_first_bar(solve, tile, sums.first_bar, work.scratch.rows, sums.layers);
  for (int64_t i = 0; i < numbers; ++i) z_bar[i] = -z_bar[i];
}

// The first stage at y0, and the norms of y0 and of it.
template <bool kOwn, typename T>
void adjoint_first(const MlpSolve<T>& solve, const MlpAdjointAttempt<T>& adjoint, int64_t index,
                   T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const auto work = open_adjoint(solve, adjoint, index, workspace);
  const int64_t rows = 2 * solve.field.features;
  for (int64_t i = 0; i < rows * solve.vectors; ++i) work.y[i] = work.y0[i];
  adjoint_rates<kOwn>(solve, adjoint, work, 0, nullptr, work.k.row[0]);
  if (adjoint.attempt.rates == nullptr) return;
  start_norms<T>(solve, adjoint.attempt, work.tile, rows, rows, work.y0, work.k.row[0], nullptr);
}

// The norm of the change of the derivative over a trial step; its parameters are stage 1's.
template <bool kOwn, typename T>
void adjoint_trial(const MlpSolve<T>& solve, const MlpAdjointAttempt<T>& adjoint, int64_t index,
                   T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const auto work = open_adjoint(solve, adjoint, index, workspace);
  const int64_t rows = 2 * solve.field.features;
  const auto& attempt = adjoint.attempt;
  const auto h = step_size_of<kOwn>(solve, attempt.h, attempt.own_h, work.tile);
  const double euler[1] = {1};
  combine<kOwn>(work.y0, work.k, euler, 1, h, 0, rows * solve.vectors, work.y);
  Vec<T>* changed = workspace.take(rows * solve.vectors);
  adjoint_rates<kOwn>(solve, adjoint, work, 1, nullptr, changed);
  start_norms<T>(solve, attempt, work.tile, rows, rows, work.y0, work.k.row[0], changed);
}

// All stages but the first, the solution, and the norm of its error.
template <bool kOwn, typename T>
void adjoint_attempt(const MlpSolve<T>& solve, const MlpAdjointAttempt<T>& adjoint, int64_t index,
                     T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const auto work = open_adjoint(solve, adjoint, index, workspace);
  const Tableau& tableau = *solve.tableau;
  const auto& attempt = adjoint.attempt;
  const int64_t rows = 2 * solve.field.features, numbers = rows * solve.vectors;
  const auto h = step_size_of<kOwn>(solve, attempt.h, attempt.own_h, work.tile);
  auto* y1 = vectors(attempt.y1) + index * numbers;
  for (int i = 1; i < tableau.stages; ++i) {
    combine<kOwn>(work.y0, work.k, tableau.a[i], i, h, 0, numbers, work.y);
    if (tableau.solution_is_last_stage && i == tableau.stages - 1) {
      for (int64_t r = 0; r < numbers; ++r) y1[r] = work.y[r];
    }
    adjoint_rates<kOwn>(solve, adjoint, work, i, nullptr, work.k.row[i]);
  }
  if (!tableau.solution_is_last_stage) {
    combine<kOwn>(work.y0, work.k, tableau.b, tableau.stages, h, 0, numbers, y1);
  }
  error_norms<kOwn>(solve, attempt, work.tile, h, work.k, rows, rows, work.y0, y1);
}

// The parameters' part of the step that `adjoint_attempt` made, for the samples whose step was
// accepted: `own_h` is their step here, and 0 for the others. `own_steps`: the steps that were
// attempted. Which samples count is known only after an attempt, so the stages run once more.
template <typename T>
void adjoint_quadrature(const MlpSolve<T>& solve, const MlpAdjointAttempt<T>& adjoint,
                        const T* own_steps, int64_t index, T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const auto work = open_adjoint(solve, adjoint, index, workspace);
  const Tableau& tableau = *solve.tableau;
  const int64_t numbers = 2 * work.tile.vectors_of_z;
  const auto steps = step_size_of<true>(solve, T(0), own_steps, work.tile);
  const auto accepted = step_size_of<true>(solve, T(0), adjoint.attempt.own_h, work.tile);
  Vec<T>* scale = workspace.take(solve.vectors);
  Vec<T>* unused = workspace.take(numbers);
  for (int i = 0; i < tableau.stages; ++i) {
    if (tableau.b[i] == 0) continue;
    for (int64_t v = 0; v < solve.vectors; ++v) scale[v] = -accepted.times(tableau.b[i], v);
    combine<true>(work.y0, work.k, tableau.a[i], i, steps, 0, numbers, work.y);
    adjoint_rates<true>(solve, adjoint, work, i, scale, unused);
  }
}
