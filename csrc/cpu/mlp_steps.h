// Runge-Kutta steps of a tile, forward and in reverse. To be included within the namespace of an
// instruction set only.

// Memory of one tile's work, handed out vector by vector.
template <typename T>
struct Workspace {
  Vec<T>* at;

  Vec<T>* take(int64_t count) {
    Vec<T>* taken = at;
    at += count;
    return taken;
  }
};

template <typename T>
PYCNF_HD int64_t widest(const Mlp<T>& field) {
  int64_t width = field.features;
  for (int l = 0; l < field.layers; ++l) {
    width = field.layer[l].out > width ? field.layer[l].out : width;
  }
  return padded<T>(width);
}

template <typename T>
PYCNF_HD TileShape shape_of(const MlpSolve<T>& solve) {
  return {solve.vectors, solve.tangents};
}

// What an evaluation leaves behind: the state that it was made at, and the products.
template <typename T>
int64_t kept_numbers(const MlpSolve<T>& solve) {
  const auto shape = shape_of(solve);
  return (solve.field.features * shape.vectors + product_vectors(solve.field, shape)) * kLanes<T>;
}

// Vectors that any function of a tile needs.
template <typename T>
int64_t workspace_numbers(const MlpSolve<T>& solve) {
  const auto shape = shape_of(solve);
  const int64_t wide = widest(solve.field), stages = solve.tableau->stages;
  const int64_t rows = state_rows(solve) * shape.vectors;
  const int64_t evaluations = stages * (kept_numbers(solve) / kLanes<T> + 2 * rows);
  const int64_t first = 2 * solve.field.layer[0].out * shape.tangents * shape.vectors;
  const int64_t reverse = 3 * wide * shape.columns() + wide * shape.vectors +
                          2 * (wide + kLanes<T>)+wide * shape.columns();
  return (evaluations + first + reverse + 8 * rows + 8) * kLanes<T>;
}

template <typename T>
struct Tile {
  TileShape shape;
  TileShape value_only;
  TileConstants<T> constants;
  int64_t index;
  int64_t vectors_of_z;  // D * vectors
  int64_t numbers;       // of samples
};

// The constants of a tile; W₁ε is made here, once for all stages of a step.
template <typename T>
Tile<T> open_tile(const MlpSolve<T>& solve, int64_t index, Workspace<T>& workspace) {
  Tile<T> tile = {};
  tile.shape = shape_of(solve);
  tile.value_only = {solve.vectors, 0};
  tile.index = index;
  tile.numbers = solve.vectors * kLanes<T>;
  tile.vectors_of_z = solve.field.features * solve.vectors;
  const int64_t columns = solve.tangents * solve.vectors;
  const int64_t width = solve.field.layer[0].out;
  if (columns > 0) {
    tile.constants.probe =
        reinterpret_cast<const Vec<T>*>(solve.probe + index * solve.probe_stride);
    Vec<T>* first = workspace.take(width * columns);
    first_tangents(solve.field, tile.shape, tile.constants.probe, first);
    tile.constants.first = first;
  }
  if (solve.context != nullptr) {
    tile.constants.context =
        reinterpret_cast<const Vec<T>*>(solve.context + index * width * tile.numbers);
  }
  return tile;
}

template <typename T>
struct Evaluation {
  Vec<T>* z;  // [D, vectors]
  Products<T> products;
};

template <typename T>
Evaluation<T> evaluation_at(const MlpSolve<T>& solve, const TileShape& shape, Vec<T>* memory) {
  return {memory, products_at(solve.field, shape, memory + solve.field.features * shape.vectors)};
}

// Whether ℓ's derivative at a stage has a weight in the solution or in the error.
template <typename T>
bool needs_divergence(const MlpSolve<T>& solve, int stage) {
  const Tableau& tableau = *solve.tableau;
  return solve.tangents > 0 && (tableau.b[stage] != 0 || tableau.e[stage] != 0 || stage == 0 ||
                                (stage == tableau.stages - 1 && tableau.solution_is_last_stage));
}

// k [rows, vectors] at the evaluation's state.
template <typename T>
void evaluate_stage(const MlpSolve<T>& solve, ActivateLayer<T> activate_layer, const Tile<T>& tile,
                    const TimedLayer<T>* timed, bool with_divergence,
                    const Evaluation<T>& evaluation, Vec<T>* scratch, Vec<T>* k) {
  const TileShape& shape = with_divergence ? tile.shape : tile.value_only;
  Vec<T>* rate = k + tile.vectors_of_z;
  evaluate(solve.field, activate_layer, timed, shape, tile.constants, solve.probe_weight,
           evaluation.z, evaluation.products, scratch, k, rate);
  if (solve.tangents == 0) return;
  for (int64_t v = 0; v < solve.vectors; ++v) {
    rate[v] = with_divergence ? rate[v] * solve.sign : splat(T(0));
  }
}

template <typename T>
struct StageRows {
  Vec<T>* row[kMaxStages];  // each [rows, vectors]
};

// sum[i] = y[i] + Σ (weights_j h) k_j[i] over [begin, end), for the weights that are not zero.
template <typename T>
PYCNF_HD void combine(const Vec<T>* y, const StageRows<T>& k, const double* weights, int count, T h,
                      int64_t begin, int64_t end, Vec<T>* sum) {
  const Vec<T>* rows[kMaxStages] = {};
  T scaled[kMaxStages] = {};
  int terms = 0;
  for (int j = 0; j < count; ++j) {
    if (weights[j] == 0) continue;
    rows[terms] = k.row[j];
    scaled[terms++] = T(weights[j]) * h;
  }
  for (int64_t i = begin; i < end; ++i) {
    Vec<T> total = y != nullptr ? y[i] : splat(T(0));
    for (int j = 0; j < terms; ++j) total += rows[j][i] * scaled[j];
    sum[i] = total;
  }
}

template <typename T>
StageRows<T> stage_rows(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, const Tile<T>& tile,
                        int64_t tiles) {
  const int64_t rows = state_rows(solve) * tile.numbers;
  const int last = solve.tableau->stages - 1;
  StageRows<T> k = {};
  for (int i = 0; i <= last; ++i) {
    const int at = attempt.flip && (i == 0 || i == last) ? last - i : i;
    k.row[i] = vectors(attempt.k + (at * tiles + tile.index) * rows);
  }
  return k;
}

template <typename T>
PYCNF_HD int64_t tiles_of(const MlpSolve<T>& solve) {
  const int64_t samples = solve.vectors * kLanes<T>;
  return (solve.batch + samples - 1) / samples;
}

// The samples of a tile that are no copies.
template <typename T>
PYCNF_HD int64_t live_samples(const MlpSolve<T>& solve, const Tile<T>& tile) {
  const int64_t left = solve.batch - tile.index * tile.numbers;
  return left < tile.numbers ? left : tile.numbers;
}

// Adds squares of scaled values to sums over the live samples of a tile: f64, sample by sample, so
// that neither lanes nor threads matter.
template <typename T>
void add_squares(const Vec<T>* scaled, int64_t live, double* sums) {
  const T* value = reinterpret_cast<const T*>(scaled);
  for (int64_t s = 0; s < live; ++s) sums[s] += double(value[s]) * double(value[s]);
}

template <typename T>
double total(const T* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += double(values[i]);
  return sum;
}

constexpr int64_t kMostSamples = 64;  // of a tile

template <typename T>
PYCNF_HD Vec<T> larger_of(Vec<T> x, Vec<T> y) {
  const Vec<T> a = absolute<T>(x), b = absolute<T>(y);
  return a < b ? b : a;
}

// ---- forward ------------------------------------------------------------------------------------

// The first stage at y0, and the norms of y0 and of it.
template <typename T>
MlpNorms first_stage(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, int64_t index,
                     T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const auto activate_layer = kActivateLayer<T>[int(solve.field.activation)];
  const auto tile = open_tile(solve, index, workspace);
  const auto k = stage_rows(solve, attempt, tile, tiles_of(solve));
  const int64_t rows = state_rows(solve) * solve.vectors;
  const auto* y0 = reinterpret_cast<const Vec<T>*>(attempt.y0) + index * rows;
  T* kept = attempt.kept[0];
  const auto evaluation =
      evaluation_at(solve, tile.shape,
                    kept != nullptr ? vectors(kept + index * kept_numbers(solve))
                                    : workspace.take(kept_numbers(solve) / kLanes<T>));
  for (int64_t i = 0; i < tile.vectors_of_z; ++i) evaluation.z[i] = y0[i];
  Vec<T>* scratch = workspace.take(widest(solve.field) * tile.shape.columns());
  evaluate_stage(solve, activate_layer, tile, attempt.timed, solve.tangents > 0, evaluation,
                 scratch, k.row[0]);
  MlpNorms norms = {};
  const int64_t live = live_samples(solve, tile);
  for (int64_t row = 0; row < state_rows(solve); ++row) {
    double sums[2][kMostSamples] = {};
    for (int64_t v = 0; v < solve.vectors; ++v) {
      const int64_t i = row * solve.vectors + v;
      const Vec<T> scale = attempt.atol + attempt.rtol * absolute<T>(y0[i]);
      const Vec<T> scaled[2] = {y0[i] / scale, k.row[0][i] / scale};
      const int64_t from = v * kLanes<T>;
      const int64_t count = live - from < kLanes<T> ? live - from : kLanes<T>;
      for (int which = 0; which < 2; ++which) {
        add_squares<T>(&scaled[which], count, sums[which] + from);
        const Vec<T> value = which == 0 ? y0[i] : k.row[0][i];
        for (int64_t s = 0; s < count; ++s) norms.nonfinite += value[s] - value[s] == 0 ? 0 : 1;
      }
    }
    for (int which = 0; which < 2; ++which) {
      double* norm = row < solve.field.features ? norms.z : norms.logdet;
      norm[which] += total(sums[which], live);
    }
  }
  return norms;
}

// The norm of the change of the derivative over a trial step of h from y0.
template <typename T>
MlpNorms trial(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, int64_t index, T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const auto activate_layer = kActivateLayer<T>[int(solve.field.activation)];
  const auto tile = open_tile(solve, index, workspace);
  const auto k = stage_rows(solve, attempt, tile, tiles_of(solve));
  const int64_t rows = state_rows(solve) * solve.vectors;
  const auto* y0 = reinterpret_cast<const Vec<T>*>(attempt.y0) + index * rows;
  const auto evaluation =
      evaluation_at(solve, tile.shape, workspace.take(kept_numbers(solve) / kLanes<T>));
  for (int64_t i = 0; i < tile.vectors_of_z; ++i) {
    evaluation.z[i] = y0[i] + attempt.h * k.row[0][i];
  }
  Vec<T>* scratch = workspace.take(widest(solve.field) * tile.shape.columns());
  Vec<T>* changed = workspace.take(rows);
  evaluate_stage(solve, activate_layer, tile, attempt.timed, solve.tangents > 0, evaluation,
                 scratch, changed);
  MlpNorms norms = {};
  const int64_t live = live_samples(solve, tile);
  for (int64_t row = 0; row < state_rows(solve); ++row) {
    double sums[kMostSamples] = {};
    for (int64_t v = 0; v < solve.vectors; ++v) {
      const int64_t i = row * solve.vectors + v;
      const Vec<T> scaled =
          (changed[i] - k.row[0][i]) / (attempt.atol + attempt.rtol * absolute<T>(y0[i]));
      const int64_t from = v * kLanes<T>;
      add_squares<T>(&scaled, live - from < kLanes<T> ? live - from : kLanes<T>, sums + from);
    }
    (row < solve.field.features ? norms.z : norms.logdet)[0] += total(sums, live);
  }
  return norms;
}

// All stages but the first, the solution, and the norm of its error.
template <typename T>
MlpNorms attempt_step(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, int64_t index,
                      T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const Tableau& tableau = *solve.tableau;
  const auto activate_layer = kActivateLayer<T>[int(solve.field.activation)];
  const auto tile = open_tile(solve, index, workspace);
  const auto k = stage_rows(solve, attempt, tile, tiles_of(solve));
  const int64_t rows = state_rows(solve) * solve.vectors;
  const auto* y0 = reinterpret_cast<const Vec<T>*>(attempt.y0) + index * rows;
  auto* y1 = vectors(attempt.y1) + index * rows;
  Vec<T>* scratch = workspace.take(widest(solve.field) * tile.shape.columns());
  Vec<T>* spare = workspace.take(kept_numbers(solve) / kLanes<T>);

  for (int i = 1; i < tableau.stages; ++i) {
    const bool with_divergence = needs_divergence(solve, i);
    T* kept = attempt.kept[i];
    const auto evaluation =
        evaluation_at(solve, with_divergence ? tile.shape : tile.value_only,
                      kept != nullptr ? vectors(kept + index * kept_numbers(solve)) : spare);
    combine(y0, k, tableau.a[i], i, attempt.h, 0, tile.vectors_of_z, evaluation.z);
    evaluate_stage(solve, activate_layer, tile, attempt.timed + i * solve.field.layers,
                   with_divergence, evaluation, scratch, k.row[i]);
    if (tableau.solution_is_last_stage && i == tableau.stages - 1) {
      for (int64_t r = 0; r < tile.vectors_of_z; ++r) y1[r] = evaluation.z[r];
    }
  }
  combine(y0, k, tableau.b, tableau.stages, attempt.h,
          tableau.solution_is_last_stage ? tile.vectors_of_z : 0, rows, y1);

  MlpNorms norms = {};
  const int64_t live = live_samples(solve, tile);
  double of_sample[kMostSamples] = {};
  for (int64_t row = 0; row < state_rows(solve); ++row) {
    double sums[kMostSamples] = {};
    for (int64_t v = 0; v < solve.vectors; ++v) {
      const int64_t i = row * solve.vectors + v;
      Vec<T> error[1] = {};
      StageRows<T> at = {};
      for (int j = 0; j < tableau.stages; ++j) at.row[j] = k.row[j] + i;
      combine<T>(nullptr, at, tableau.e, tableau.stages, attempt.h, 0, 1, error);
      const Vec<T> scaled = error[0] / (attempt.atol + attempt.rtol * larger_of<T>(y0[i], y1[i]));
      const int64_t from = v * kLanes<T>;
      const int64_t count = live - from < kLanes<T> ? live - from : kLanes<T>;
      add_squares<T>(&scaled, count, sums + from);
      for (int64_t s = 0; s < count; ++s) norms.nonfinite += y1[i][s] - y1[i][s] == 0 ? 0 : 1;
    }
    const bool of_z = row < solve.field.features;
    (of_z ? norms.z : norms.logdet)[0] += total(sums, live);
    if (attempt.errors == nullptr) continue;
    for (int64_t s = 0; s < live; ++s) {
      const double squares = of_z ? sums[s] / double(solve.field.features) : sums[s];
      of_sample[s] =
          of_z ? of_sample[s] + squares : (of_sample[s] > squares ? of_sample[s] : squares);
    }
  }
  for (int64_t s = 0; s < live && attempt.errors != nullptr; ++s) {
    attempt.errors[index * tile.numbers + s] = __builtin_sqrt(of_sample[s]);
  }
  return norms;
}

// ---- reverse ------------------------------------------------------------------------------------

template <typename T>
void reverse_step(const MlpSolve<T>& solve, const MlpReverseStep<T>& step, int64_t index,
                  T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const Tableau& tableau = *solve.tableau;
  const int used = stages_in_use(tableau);
  const int layers = solve.field.layers;
  const auto activate_layer = kActivateLayer<T>[int(solve.field.activation)];
  const auto reverse_activation = kReverseActivation<T>[int(solve.field.activation)];
  const auto tile = open_tile(solve, index, workspace);
  const int64_t numbers = tile.vectors_of_z;
  const auto* z0 =
      reinterpret_cast<const Vec<T>*>(step.y0) + index * state_rows(solve) * solve.vectors;
  auto* z_bar = vectors(step.z_bar) + index * numbers;
  const auto* logdet_bar = reinterpret_cast<const Vec<T>*>(step.logdet_bar) + index * solve.vectors;
  const int64_t width = solve.field.layer[0].out;
  const int64_t wide = widest(solve.field), columns = tile.shape.columns();

  Vec<T>* first_bar = workspace.take(width * solve.tangents * solve.vectors);
  for (int64_t i = 0; i < width * solve.tangents * solve.vectors; ++i) first_bar[i] = splat(T(0));
  ReverseScratch<T> scratch = {};
  scratch.x = workspace.take(wide * columns);
  scratch.slopes = workspace.take(wide * solve.vectors);
  scratch.u[0] = workspace.take(wide * columns);
  scratch.u[1] = workspace.take(wide * columns);
  scratch.shift_sums = workspace.take(wide);
  scratch.product_sums = workspace.take(wide);
  scratch.rows = reinterpret_cast<T*>(workspace.take(wide * columns));

  // Stages as they were, or once more.
  Evaluation<T> evaluations[kMaxStages];
  TileShape shapes[kMaxStages];
  StageRows<T> k = {};
  for (int i = 0; i < used; ++i) {
    const bool with_divergence = solve.tangents > 0 && tableau.b[i] != 0;
    // Kept products have the columns that the forward solve needed.
    const bool had_divergence =
        step.kept[i] != nullptr ? needs_divergence(solve, i) : with_divergence;
    const TileShape& shape = shapes[i] = had_divergence ? tile.shape : tile.value_only;
    if (step.kept[i] != nullptr) {
      evaluations[i] =
          evaluation_at(solve, shape, vectors(step.kept[i] + index * kept_numbers(solve)));
      continue;
    }
    evaluations[i] = evaluation_at(solve, shape, workspace.take(kept_numbers(solve) / kLanes<T>));
    k.row[i] = workspace.take(state_rows(solve) * solve.vectors);
    combine(z0, k, tableau.a[i], i, step.h, 0, numbers, evaluations[i].z);
    evaluate_stage(solve, activate_layer, tile, step.timed + i * layers, with_divergence,
                   evaluations[i], scratch.x, k.row[i]);
  }

  // The cotangents of all k_i, completed from the last stage to the first.
  StageRows<T> k_bar = {};
  for (int i = 0; i < used; ++i) {
    k_bar.row[i] = workspace.take(numbers);
    const T weight = T(tableau.b[i]) * step.h;
    for (int64_t r = 0; r < numbers; ++r) k_bar.row[i][r] = z_bar[r] * weight;
  }
  Vec<T>* stage_bar = workspace.take(numbers);
  Vec<T>* divergence_bar = workspace.take(solve.vectors);
  auto* context_bar = step.context_bar == nullptr
                          ? nullptr
                          : vectors(step.context_bar) + index * width * solve.vectors;
  for (int i = used - 1; i >= 0; --i) {
    const T weight = T(tableau.b[i]) * step.h * solve.sign;
    for (int64_t v = 0; v < solve.vectors && solve.tangents > 0; ++v) {
      divergence_bar[v] = logdet_bar[v] * weight;
    }
    reverse(solve.field, activate_layer, reverse_activation, step.timed + i * layers,
            step.tau + i * solve.field.time_features, shapes[i], tile.constants, solve.probe_weight,
            evaluations[i].z, evaluations[i].products, k_bar.row[i], divergence_bar, scratch,
            step.gradients, first_bar, context_bar, stage_bar);
    for (int64_t r = 0; r < numbers; ++r) z_bar[r] += stage_bar[r];
    for (int j = 0; j < i; ++j) {
      const T a = T(tableau.a[i][j]) * step.h;
      if (a == T(0)) continue;
      for (int64_t r = 0; r < numbers; ++r) k_bar.row[j][r] += stage_bar[r] * a;
    }
  }
  if (solve.tangents > 0) {
    add_weight_gradient(solve.field.layer[0], first_bar, tile.constants.probe,
                        solve.tangents * solve.vectors, scratch.rows, step.gradients[0]);
  }
}
