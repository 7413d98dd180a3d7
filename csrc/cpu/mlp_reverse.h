// The gradient of an accepted step of a tile. To be included within the namespace of an instruction
// set only.

template <typename T>
ReverseScratch<T> take_reverse_scratch(const MlpSolve<T>& solve, const Tile<T>& tile,
                                       Workspace<T>& workspace) {
  const int64_t wide = widest(solve.field), columns = tile.shape.columns();
  ReverseScratch<T> scratch = {};
  scratch.x = workspace.take(wide * columns);
  scratch.slopes = workspace.take(wide * solve.vectors);
  scratch.u[0] = workspace.take(wide * columns);
  scratch.u[1] = workspace.take(wide * columns);
  scratch.shift_sums = workspace.take(wide * solve.vectors);
  scratch.product_sums = workspace.take(wide * solve.vectors);
  scratch.rows = reinterpret_cast<T*>(workspace.take(wide * columns));
  return scratch;
}

// Cotangents of the extras' rates [extras, vectors] as those of what a rate is made of.
template <typename T>
Cotangents<T> cotangents_of(const MlpSolve<T>& solve, const Vec<T>* value_bar, Vec<T>* extras_bar) {
  const int64_t vectors = solve.vectors;
  Cotangents<T> bars = {value_bar, nullptr, nullptr, nullptr};
  if (solve.tangents == 0) return bars;
  bars.divergence = extras_bar;
  Vec<T>* next = extras_bar + vectors;
  if (solve.kinetic) {
    bars.kinetic = next;
    next += vectors;
  }
  if (solve.jacobian) bars.jacobian = next;
  for (int64_t v = 0; v < vectors; ++v) {
    extras_bar[v] *= solve.sign;
    if (solve.kinetic) extras_bar[vectors + v] *= solve.kinetic_weight;
    if (solve.jacobian) extras_bar[next - extras_bar + v] *= solve.jacobian_weight;
  }
  return bars;
}

// The part of W₁ε in the gradient of W₁.
template <typename T>
void add_first_bar(const MlpSolve<T>& solve, const Tile<T>& tile, const Vec<T>* first_bar, T* rows,
                   const LayerGradient<T>* gradients) {
  const int64_t columns = solve.tangents * solve.vectors;
  if (columns == 0 || solve.closed_form || gradients == nullptr) return;
  add_weight_gradient(solve.field.layer[0], first_bar, columns, tile.constants.probe, columns,
                      columns, rows, gradients[0]);
}

template <bool kOwn, typename T>
void reverse_step(const MlpSolve<T>& solve, const MlpReverseStep<T>& step, int64_t index,
                  T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  const Tableau& tableau = *solve.tableau;
  const int used = stages_in_use(tableau);
  const auto activate_layer = kActivateLayer<kOwn, T>[int(solve.field.activation)];
  const auto reverse_activation = kReverseActivation<kOwn, T>[int(solve.field.activation)];
  const auto tile = open_tile(solve, index, workspace);
  const int64_t numbers = tile.vectors_of_z, count = solve.vectors;
  const int64_t extras = extra_rows(solve) * count, width = solve.field.layer[0].out;
  const auto h = step_size_of<kOwn>(solve, step.h, step.own_h, tile);
  const auto* z0 = reinterpret_cast<const Vec<T>*>(step.y0) + index * step.rows * count;
  auto* z_bar = vectors(step.z_bar) + index * numbers;
  const auto* extras_bar = reinterpret_cast<const Vec<T>*>(step.extras_bar) + index * extras;

  Sums<T> sums = {};
  sums.layers = step.gradients;
  sums.first_bar = workspace.take(width * solve.tangents * count);
  for (int64_t i = 0; i < width * solve.tangents * count; ++i) sums.first_bar[i] = splat(T(0));
  if (step.context_bar != nullptr) {
    sums.context_bar = vectors(step.context_bar) + index * width * count;
  }
  const auto scratch = take_reverse_scratch(solve, tile, workspace);

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
    k.row[i] = workspace.take(numbers + extras);
    combine<kOwn>(z0, k, tableau.a[i], i, h, 0, numbers, evaluations[i].z);
    evaluate_stage<kOwn>(solve, tile, step.at[i], with_divergence, evaluations[i], scratch.x,
                         k.row[i]);
  }

  // The cotangents of all k_i, completed from the last stage to the first; beside them those of t
  // and h.
  StageRows<T> k_bar = {};
  Vec<T>* time_bar = workspace.take(count);
  Vec<T>* times_bar = workspace.take(2 * count);
  for (int64_t i = 0; i < 2 * count; ++i) times_bar[i] = splat(T(0));
  for (int i = 0; i < used; ++i) {
    k_bar.row[i] = workspace.take(numbers);
    for (int64_t r = 0; r < numbers; ++r) {
      k_bar.row[i][r] = z_bar[r] * h.times(tableau.b[i], r);
      if (step.times_bar == nullptr || tableau.b[i] == 0) continue;
      times_bar[count + r % count] += z_bar[r] * k.row[i][r] * T(tableau.b[i]);
    }
    for (int64_t r = 0; r < extras && step.times_bar != nullptr && tableau.b[i] != 0; ++r) {
      times_bar[count + r % count] += extras_bar[r] * k.row[i][numbers + r] * T(tableau.b[i]);
    }
  }
  Vec<T>* stage_bar = workspace.take(numbers);
  Vec<T>* rates_bar = workspace.take(extras);
  for (int i = used - 1; i >= 0; --i) {
    if (i > 0) prefetch_last(solve.field, shapes[i - 1], evaluations[i - 1].products);
    for (int64_t r = 0; r < extras; ++r) rates_bar[r] = extras_bar[r] * h.times(tableau.b[i], r);
    const auto bars = cotangents_of(solve, k_bar.row[i], rates_bar);
    sums.mixed_bar = step.mixed_bar[i];
    sums.time_bar = step.times_bar != nullptr ? time_bar : nullptr;
    for (int64_t v = 0; v < count; ++v) time_bar[v] = splat(T(0));
    reverse<kOwn>(solve, activate_layer, reverse_activation, step.at[i], shapes[i], tile.constants,
                  evaluations[i].z, evaluations[i].products, bars, scratch, sums, stage_bar);
    for (int64_t v = 0; v < count; ++v) {
      times_bar[v] += time_bar[v];
      times_bar[count + v] += time_bar[v] * T(tableau.c[i]);
    }
    for (int64_t r = 0; r < numbers; ++r) z_bar[r] += stage_bar[r];
    for (int j = 0; j < i; ++j) {
      if (tableau.a[i][j] == 0) continue;
      for (int64_t r = 0; r < numbers; ++r) {
        k_bar.row[j][r] += stage_bar[r] * h.times(tableau.a[i][j], r);
        if (step.times_bar == nullptr) continue;
        times_bar[count + r % count] += stage_bar[r] * k.row[j][r] * T(tableau.a[i][j]);
      }
    }
  }
  add_first_bar(solve, tile, sums.first_bar, scratch.rows, step.gradients);
  if (step.times_bar == nullptr) return;
  double* result = step.times_bar + index * 2 * tile.numbers;
  for (int64_t i = 0; i < 2 * count; ++i) {
    for (int s = 0; s < kLanes<T>; ++s) result[i * kLanes<T> + s] = double(times_bar[i][s]);
  }
}
