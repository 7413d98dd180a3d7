// Runge-Kutta steps of a tile. To be included within the namespace of an instruction set only.

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

// Numbers that any function of a tile needs.
template <typename T>
int64_t workspace_numbers(const MlpSolve<T>& solve) {
  const auto shape = shape_of(solve);
  const int64_t wide = widest(solve.field), stages = solve.tableau->stages;
  const int64_t rows = (2 * solve.field.features + extra_rows(solve)) * shape.vectors;
  const int64_t evaluations = stages * (kept_numbers(solve) / kLanes<T> + 2 * rows);
  const int64_t first = 2 * solve.field.layer[0].out * shape.tangents * shape.vectors;
  const int64_t reverse = 4 * wide * shape.columns() + 3 * wide * shape.vectors;
  return (evaluations + first + reverse + 12 * rows + 16 * shape.vectors) * kLanes<T>;
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
  const auto& layer = solve.field.layer[0];
  if (columns > 0) {
    Vec<T>* first = workspace.take(layer.out * columns);
    if (solve.closed_form) {
      for (int64_t i = 0; i < layer.out * columns; ++i) first[i] = splat(T(1));
    } else {
      tile.constants.probe =
          reinterpret_cast<const Vec<T>*>(solve.probe + index * solve.probe_stride);
      product(weight_of(layer), layer.out, layer.in, tile.constants.probe, columns, columns, first,
              columns);
    }
    tile.constants.first = first;
  }
  if (solve.context != nullptr) {
    tile.constants.context =
        reinterpret_cast<const Vec<T>*>(solve.context + index * layer.out * tile.numbers);
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

// Whether the extras' derivatives at a stage have a weight in the solution or in the error.
template <typename T>
bool needs_divergence(const MlpSolve<T>& solve, int stage) {
  const Tableau& tableau = *solve.tableau;
  return solve.tangents > 0 && (tableau.b[stage] != 0 || tableau.e[stage] != 0 || stage == 0 ||
                                (stage == tableau.stages - 1 && tableau.solution_is_last_stage));
}

// k [rows, vectors] at the evaluation's state; rates of extras that are not wanted are 0.
template <bool kOwn, typename T>
void evaluate_stage(const MlpSolve<T>& solve, const Tile<T>& tile, const MlpAt<T>& at,
                    bool with_divergence, const Evaluation<T>& evaluation, Vec<T>* scratch,
                    Vec<T>* k) {
  const int64_t vectors = solve.vectors;
  Vec<T>* extras = k + tile.vectors_of_z;
  Vec<T>* kinetic = solve.kinetic ? extras + vectors : nullptr;
  Vec<T>* jacobian = solve.jacobian ? extras + (solve.kinetic ? 2 : 1) * vectors : nullptr;
  const TileShape& shape = with_divergence ? tile.shape : tile.value_only;
  evaluate<kOwn>(solve, kActivateLayer<kOwn, T>[int(solve.field.activation)], at, shape,
                 tile.constants, evaluation.z, evaluation.products, scratch, {k, extras, jacobian});
  if (!with_divergence) {
    for (int64_t i = 0; i < extra_rows(solve) * vectors; ++i) extras[i] = splat(T(0));
    return;
  }
  for (int64_t v = 0; v < vectors; ++v) {
    extras[v] *= solve.sign;
    if (jacobian != nullptr) jacobian[v] *= solve.jacobian_weight;
    if (kinetic == nullptr) continue;
    Vec<T> sum = {};
    for (int64_t i = v; i < tile.vectors_of_z; i += vectors) sum += k[i] * k[i];
    kinetic[v] = sum * solve.kinetic_weight;
  }
}

template <typename T>
struct StageRows {
  Vec<T>* row[kMaxStages];  // each [rows, vectors]
};

// The steps of a tile's samples.
template <bool kOwn, typename T>
struct StepSize {
  T h;
  const Vec<T>* own;  // [vectors]
  int64_t vectors;

  auto times(double weight, int64_t i) const {
    if constexpr (kOwn) {
      return T(weight) * own[i % vectors];
    } else {
      return T(weight) * h;
    }
  }
};

template <bool kOwn, typename T>
StepSize<kOwn, T> step_size_of(const MlpSolve<T>& solve, T h, const T* own, const Tile<T>& tile) {
  if (!kOwn) return {h, nullptr, solve.vectors};
  return {h, reinterpret_cast<const Vec<T>*>(own + tile.index * tile.numbers), solve.vectors};
}

// sum[i] = y[i] + Σ (weights_j h) k_j[i] over [begin, end), for the weights that are not zero.
template <bool kOwn, typename T>
PYCNF_HD void combine(const Vec<T>* y, const StageRows<T>& k, const double* weights, int count,
                      const StepSize<kOwn, T>& h, int64_t begin, int64_t end, Vec<T>* sum) {
  const Vec<T>* rows[kMaxStages] = {};
  double given[kMaxStages] = {};
  T scaled[kMaxStages] = {};
  int terms = 0;
  for (int j = 0; j < count; ++j) {
    if (weights[j] == 0) continue;
    rows[terms] = k.row[j];
    scaled[terms] = T(weights[j]) * h.h;
    given[terms++] = weights[j];
  }
  for (int64_t i = begin; i < end; ++i) {
    Vec<T> total = y != nullptr ? y[i] : splat(T(0));
    for (int j = 0; j < terms; ++j) {
      if constexpr (kOwn) {
        total += rows[j][i] * h.times(given[j], i);
      } else {
        total += rows[j][i] * scaled[j];
      }
    }
    sum[i] = total;
  }
}

template <typename T>
StageRows<T> stage_rows(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, const Tile<T>& tile,
                        int64_t rows) {
  const int last = solve.tableau->stages - 1;
  StageRows<T> k = {};
  for (int i = 0; i <= last; ++i) {
    const int at = attempt.flip && (i == 0 || i == last) ? last - i : i;
    k.row[i] = vectors(attempt.k + (at * attempt.tiles + tile.index) * rows * tile.numbers);
  }
  return k;
}

template <typename T>
PYCNF_HD Vec<T> larger_of(Vec<T> x, Vec<T> y) {
  const Vec<T> a = absolute<T>(x), b = absolute<T>(y);
  return a < b ? b : a;
}

// Adds the squares of scaled values, f64 and sample by sample, so that neither lanes nor threads
// matter; infinity where `finite` is not.
template <typename T>
PYCNF_HD void add_squares(Vec<T> scaled, Vec<T> finite, bool second, SampleNorms* norms) {
  for (int s = 0; s < kLanes<T>; ++s) {
    const double square =
        finite[s] - finite[s] == 0 ? double(scaled[s]) * double(scaled[s]) : __builtin_inf();
    (second ? norms[s].second : norms[s].first) += square;
  }
}

// The norms of a state and of its rates, or of the change of its rates if `changed` is given. The
// first `in_norm` rows count; the others, quadratures, have to be finite only.
template <typename T>
void start_norms(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, const Tile<T>& tile,
                 int64_t rows, int64_t in_norm, const Vec<T>* y0, const Vec<T>* k0,
                 const Vec<T>* changed) {
  const int64_t count = solve.vectors;
  for (int which = 0; which < (changed != nullptr ? 1 : 2); ++which) {
    SampleNorms* norms = (which == 0 ? attempt.norms : attempt.rates) + tile.index * tile.numbers;
    for (int64_t s = 0; s < tile.numbers; ++s) norms[s] = {0, 0};
    for (int64_t i = 0; i < rows * count; ++i) {
      const Vec<T> scale = attempt.atol + attempt.rtol * absolute<T>(y0[i]);
      const Vec<T> value = changed != nullptr ? changed[i] - k0[i] : (which == 0 ? y0 : k0)[i];
      const Vec<T> scaled = i < in_norm * count ? value / scale : splat(T(0));
      add_squares<T>(scaled, value, i >= tile.vectors_of_z, norms + i % count * kLanes<T>);
    }
  }
}

// The norm of a step's error, and whether its end is finite.
template <bool kOwn, typename T>
void error_norms(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, const Tile<T>& tile,
                 const StepSize<kOwn, T>& h, const StageRows<T>& k, int64_t rows, int64_t in_norm,
                 const Vec<T>* y0, const Vec<T>* y1) {
  const Tableau& tableau = *solve.tableau;
  const int64_t count = solve.vectors;
  SampleNorms* norms = attempt.norms + tile.index * tile.numbers;
  for (int64_t s = 0; s < tile.numbers; ++s) norms[s] = {0, 0};
  for (int64_t i = 0; i < rows * count; ++i) {
    Vec<T> scaled = {};
    if (i < in_norm * count) {
      Vec<T> error = {};
      for (int j = 0; j < tableau.stages; ++j) {
        if (tableau.e[j] != 0) error += k.row[j][i] * h.times(tableau.e[j], i);
      }
      scaled = error / (attempt.atol + attempt.rtol * larger_of<T>(y0[i], y1[i]));
    }
    add_squares<T>(scaled, y1[i], i >= tile.vectors_of_z, norms + i % count * kLanes<T>);
  }
}

template <typename T>
PYCNF_HD int64_t rows_in_norm(const MlpSolve<T>& solve) {
  return solve.field.features + (solve.tangents > 0 ? 1 : 0);
}

// ---- forward ------------------------------------------------------------------------------------

// The first stage at y0, and the norms of y0 and of it.
template <bool kOwn, typename T>
void first_stage(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, int64_t index, T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const auto tile = open_tile(solve, index, workspace);
  const int64_t all = state_rows(solve), count = solve.vectors;
  const auto k = stage_rows(solve, attempt, tile, all);
  const auto* y0 = reinterpret_cast<const Vec<T>*>(attempt.y0) + index * all * count;
  T* kept = attempt.kept[0];
  const auto evaluation =
      evaluation_at(solve, tile.shape,
                    kept != nullptr ? vectors(kept + index * kept_numbers(solve))
                                    : workspace.take(kept_numbers(solve) / kLanes<T>));
  for (int64_t i = 0; i < tile.vectors_of_z; ++i) evaluation.z[i] = y0[i];
  Vec<T>* scratch = workspace.take(widest(solve.field) * tile.shape.columns());
  evaluate_stage<kOwn>(solve, tile, attempt.at[0], solve.tangents > 0, evaluation, scratch,
                       k.row[0]);
  if (attempt.rates == nullptr) return;
  start_norms<T>(solve, attempt, tile, all, rows_in_norm(solve), y0, k.row[0], nullptr);
}

// The norm of the change of the derivative over a trial step of h from y0.
template <bool kOwn, typename T>
void trial(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, int64_t index, T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const auto tile = open_tile(solve, index, workspace);
  const int64_t all = state_rows(solve), count = solve.vectors;
  const auto k = stage_rows(solve, attempt, tile, all);
  const auto h = step_size_of<kOwn>(solve, attempt.h, attempt.own_h, tile);
  const auto* y0 = reinterpret_cast<const Vec<T>*>(attempt.y0) + index * all * count;
  const auto evaluation =
      evaluation_at(solve, tile.shape, workspace.take(kept_numbers(solve) / kLanes<T>));
  const double euler[1] = {1};
  combine<kOwn>(y0, k, euler, 1, h, 0, tile.vectors_of_z, evaluation.z);
  Vec<T>* scratch = workspace.take(widest(solve.field) * tile.shape.columns());
  Vec<T>* changed = workspace.take(all * count);
  evaluate_stage<kOwn>(solve, tile, attempt.at[0], solve.tangents > 0, evaluation, scratch,
                       changed);
  start_norms<T>(solve, attempt, tile, rows_in_norm(solve), rows_in_norm(solve), y0, k.row[0],
                 changed);
}

// All stages but the first, the solution, and the norm of its error.
template <bool kOwn, typename T>
void attempt_step(const MlpSolve<T>& solve, const MlpAttempt<T>& attempt, int64_t index,
                  T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const Tableau& tableau = *solve.tableau;
  const auto tile = open_tile(solve, index, workspace);
  const int64_t all = state_rows(solve), numbers = all * solve.vectors;
  const auto k = stage_rows(solve, attempt, tile, all);
  const auto h = step_size_of<kOwn>(solve, attempt.h, attempt.own_h, tile);
  const auto* y0 = reinterpret_cast<const Vec<T>*>(attempt.y0) + index * numbers;
  auto* y1 = vectors(attempt.y1) + index * numbers;
  Vec<T>* scratch = workspace.take(widest(solve.field) * tile.shape.columns());
  Vec<T>* spare = workspace.take(kept_numbers(solve) / kLanes<T>);

  for (int i = 1; i < tableau.stages; ++i) {
    const bool with_divergence = needs_divergence(solve, i);
    T* kept = attempt.kept[i];
    const auto evaluation =
        evaluation_at(solve, with_divergence ? tile.shape : tile.value_only,
                      kept != nullptr ? vectors(kept + index * kept_numbers(solve)) : spare);
    combine<kOwn>(y0, k, tableau.a[i], i, h, 0, tile.vectors_of_z, evaluation.z);
    evaluate_stage<kOwn>(solve, tile, attempt.at[i], with_divergence, evaluation, scratch,
                         k.row[i]);
    if (tableau.solution_is_last_stage && i == tableau.stages - 1) {
      for (int64_t r = 0; r < tile.vectors_of_z; ++r) y1[r] = evaluation.z[r];
    }
  }
  combine<kOwn>(y0, k, tableau.b, tableau.stages, h,
                tableau.solution_is_last_stage ? tile.vectors_of_z : 0, numbers, y1);
  error_norms<kOwn>(solve, attempt, tile, h, k, all, rows_in_norm(solve), y0, y1);
}
