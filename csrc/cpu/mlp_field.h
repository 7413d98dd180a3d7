// The field at a tile of samples, once: value with divergence or tangents, their reverse, and
// vector-Jacobian products. To be included within the namespace of an instruction set only.

// The samples of a tile, and how many there are in all.
struct TileSamples {
  int64_t batch;
  int64_t first;
  int64_t count;
};

template <typename T>
TileSamples samples_of(const MlpSolve<T>& solve, int64_t batch, int64_t index) {
  const int64_t count = solve.vectors * kLanes<T>;
  return {batch, index * count, count};
}

// Numbers that any of the functions below needs, with `cotangents` for vector-Jacobian products.
template <typename T>
int64_t field_numbers(const MlpSolve<T>& solve, int64_t cotangents) {
  const auto shape = shape_of(solve);
  const int64_t features = solve.field.features, width = solve.field.layer[0].out;
  const int64_t wide = widest(solve.field), tangents = solve.tangents * shape.vectors;
  const int64_t inputs = 3 * features * tangents + 2 * width * tangents + 2 * width * shape.vectors;
  const int64_t reverse = 4 * wide * shape.columns() + 3 * wide * shape.vectors;
  const int64_t vjp = 2 * wide * (cotangents + 1) * shape.vectors;
  const int64_t rows = (4 * features + 8) * shape.vectors;
  return (inputs + reverse + vjp + rows) * kLanes<T> + kept_numbers(solve);
}

// Rows [B, width] as [width, samples], features `stride` numbers apart. What is left over of the
// last tile becomes copies of the last sample or, for cotangents, zeros.
template <typename T>
void load_rows(const TileSamples& samples, const T* from, int64_t width, bool cotangents, T* to,
               int64_t stride) {
  for (int64_t s = 0; s < samples.count; ++s) {
    const int64_t sample = samples.first + s;
    const bool real = sample < samples.batch;
    const T* row = from + (real ? sample : samples.batch - 1) * width;
    for (int64_t i = 0; i < width; ++i) {
      to[i * stride + s] = real || !cotangents ? row[i] : T(0);
    }
  }
}

template <typename T>
void store_rows(const TileSamples& samples, const T* from, int64_t stride, int64_t width, T* to) {
  for (int64_t s = 0; s < samples.count && samples.first + s < samples.batch; ++s) {
    T* row = to + (samples.first + s) * width;
    for (int64_t i = 0; i < width; ++i) row[i] = from[i * stride + s];
  }
}

// `count` times [B, D] as [D, count * samples], and back.
template <typename T>
void load_columns(const TileSamples& samples, const T* from, int64_t count, int64_t features,
                  bool cotangents, Vec<T>* to) {
  for (int64_t k = 0; k < count; ++k) {
    load_rows(samples, from + k * samples.batch * features, features, cotangents,
              reinterpret_cast<T*>(to) + k * samples.count, count * samples.count);
  }
}

template <typename T>
void store_columns(const TileSamples& samples, const Vec<T>* from, int64_t count, int64_t features,
                   T* to) {
  for (int64_t k = 0; k < count; ++k) {
    store_rows(samples, reinterpret_cast<const T*>(from) + k * samples.count, count * samples.count,
               features, to + k * samples.batch * features);
  }
}

// The probes of the samples' keys [D, count * samples].
template <typename T>
void draw_columns(const TileSamples& samples, const MlpFieldInputs<T>& inputs, int64_t count,
                  int64_t features, T* to) {
  const int64_t per_block = inputs.gaussian ? kGaussianPerBlock : kRademacherPerBlock;
  for (int64_t s = 0; s < samples.count; ++s) {
    const int64_t sample =
        samples.first + s < samples.batch ? samples.first + s : samples.batch - 1;
    const uint64_t key = uint64_t(inputs.keys[sample]);
    for (int64_t k = 0; k < count; ++k) {
      Philox4 block = {};
      for (int64_t d = 0; d < features; ++d) {
        const int within = int(d % per_block);
        if (within == 0) block = philox(inputs.seed, key, uint32_t(k), uint32_t(d / per_block));
        to[(d * count + k) * samples.count + s] =
            inputs.gaussian ? gaussian<T>(block, within) : rademacher<T>(block, within);
      }
    }
  }
}

// The constants of a tile; `solve` gets this tile's own tangents and context.
template <typename T>
Tile<T> open_field(const MlpFieldInputs<T>& inputs, const TileSamples& samples, MlpSolve<T>& solve,
                   Workspace<T>& workspace) {
  const int64_t features = solve.field.features, count = solve.tangents;
  if (count > 0 && !solve.closed_form) {
    Vec<T>* tangents = workspace.take(features * count * solve.vectors);
    if (inputs.tangents != nullptr) {
      load_columns(samples, inputs.tangents, count, features, false, tangents);
    } else if (inputs.keys != nullptr) {
      draw_columns(samples, inputs, count, features, reinterpret_cast<T*>(tangents));
    } else {
      for (int64_t i = 0; i < features * count * solve.vectors; ++i) {
        const int64_t d = i / (count * solve.vectors), k = i / solve.vectors % count;
        tangents[i] = splat(T(k == d));
      }
    }
    solve.probe = reinterpret_cast<const T*>(tangents);
    solve.probe_stride = 0;
  }
  if (inputs.context != nullptr) {
    const int64_t width = solve.field.layer[0].out;
    T* context = reinterpret_cast<T*>(workspace.take(width * solve.vectors));
    load_rows(samples, inputs.context, width, false, context, samples.count);
    solve.context = context;
  }
  return open_tile(solve, 0, workspace);
}

// Where the evaluation of a tile is, or will be.
template <typename T>
Evaluation<T> evaluation_of_field(const MlpSolve<T>& solve, const MlpFieldInputs<T>& inputs,
                                  const Tile<T>& tile, int64_t index, Workspace<T>& workspace) {
  return evaluation_at(solve, tile.shape,
                       inputs.kept != nullptr ? vectors(inputs.kept + index * kept_numbers(solve))
                                              : workspace.take(kept_numbers(solve) / kLanes<T>));
}

template <bool kOwn, typename T>
void evaluate_field(const MlpSolve<T>& solve, const MlpFieldInputs<T>& inputs,
                    const TileSamples& samples, const Tile<T>& tile,
                    const Evaluation<T>& evaluation, Vec<T>* scratch, const Rates<T>& rates) {
  load_rows(samples, inputs.z, solve.field.features, false, reinterpret_cast<T*>(evaluation.z),
            samples.count);
  evaluate<kOwn>(solve, kActivateLayer<kOwn, T>[int(solve.field.activation)], *inputs.at,
                 tile.shape, tile.constants, evaluation.z, evaluation.products, scratch, rates);
}

// (∂f/∂z) ε_k [D, tangents * vectors], from the last layer's products.
template <bool kOwn, typename T>
void images_of(const MlpSolve<T>& solve, const MlpFieldInputs<T>& inputs, const Tile<T>& tile,
               const Evaluation<T>& evaluation, Vec<T>* images) {
  const int last = solve.field.layers - 1;
  const int64_t vectors = solve.vectors, columns = solve.tangents * vectors;
  const auto rows = rows_of(evaluation.products, tile.constants, tile.shape, last);
  for (int64_t o = 0; o < solve.field.features; ++o) {
    for (int64_t c = 0; c < columns; ++c) {
      const Vec<T> s = timed<kOwn>(inputs.at->layer[last].gate, o, c % vectors, vectors);
      images[o * columns + c] = s * rows.tangent[o * rows.tangent_stride + c];
    }
  }
}

template <bool kOwn, typename T>
void field_forward(const MlpSolve<T>& given, const MlpFieldInputs<T>& inputs,
                   const MlpFieldForward<T>& results, int64_t index, T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  MlpSolve<T> solve = given;
  const auto samples = samples_of(solve, inputs.batch, index);
  const auto tile = open_field(inputs, samples, solve, workspace);
  const auto evaluation = evaluation_of_field(solve, inputs, tile, index, workspace);
  const int64_t features = solve.field.features;
  Vec<T>* scratch = workspace.take(widest(solve.field) * tile.shape.columns());
  Vec<T>* value = workspace.take(tile.vectors_of_z);
  Vec<T>* divergence = workspace.take(solve.vectors);
  evaluate_field<kOwn>(solve, inputs, samples, tile, evaluation, scratch,
                       {value, divergence, nullptr});
  if (inputs.kept != nullptr && solve.closed_form) {
    // The last layer's tangents, which the closed form has no use for: the rest of what is kept.
    Vec<T>* last = evaluation.products.layer[solve.field.layers - 1];
    for (int64_t i = 0; i < features * solve.vectors; ++i) {
      last[i / solve.vectors * tile.shape.columns() + solve.vectors + i % solve.vectors] =
          splat(T(0));
    }
  }
  store_columns(samples, value, 1, features, results.value);
  if (results.divergence != nullptr) store_columns(samples, divergence, 1, 1, results.divergence);
  if (results.images == nullptr) return;
  Vec<T>* images = workspace.take(features * solve.tangents * solve.vectors);
  images_of<kOwn>(solve, inputs, tile, evaluation, images);
  store_columns(samples, images, solve.tangents, features, results.images);
}

// Cotangents [count, B, D] by columns; zeros for none.
template <typename T>
Vec<T>* take_cotangents(const MlpSolve<T>& solve, const TileSamples& samples, const T* from,
                        int64_t count, int64_t features, Workspace<T>& workspace) {
  Vec<T>* bar = workspace.take(features * count * solve.vectors);
  if (from != nullptr) {
    load_columns(samples, from, count, features, true, bar);
  } else {
    for (int64_t i = 0; i < features * count * solve.vectors; ++i) bar[i] = splat(T(0));
  }
  return bar;
}

// The reverse of field_forward, from what that kept or from the start. The images' cotangents take
// the place that the probes have in the divergence's: Σ ε̄_k·(∂f/∂z) ε_k in both.
template <bool kOwn, typename T>
void field_reverse(const MlpSolve<T>& given, const MlpFieldInputs<T>& inputs,
                   const MlpFieldReverse<T>& results, int64_t index, T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  MlpSolve<T> solve = given;
  const auto samples = samples_of(solve, inputs.batch, index);
  const auto tile = open_field(inputs, samples, solve, workspace);
  const auto evaluation = evaluation_of_field(solve, inputs, tile, index, workspace);
  const auto scratch = take_reverse_scratch(solve, tile, workspace);
  const auto& first = solve.field.layer[0];
  const int64_t features = solve.field.features, count = solve.vectors;
  const int64_t columns = solve.tangents * count;
  Vec<T>* z_bar = workspace.take(tile.vectors_of_z);
  Vec<T>* divergence_bar = take_cotangents(solve, samples, results.divergence_bar, 1, 1, workspace);
  if (inputs.kept == nullptr) {
    evaluate_field<kOwn>(solve, inputs, samples, tile, evaluation, scratch.x,
                         {z_bar, workspace.take(count), nullptr});
  }

  TileConstants<T> constants = tile.constants;
  if (results.images_bar != nullptr) {
    constants.probe =
        take_cotangents(solve, samples, results.images_bar, solve.tangents, features, workspace);
    solve.probe_weight = T(1);
    for (int64_t v = 0; v < count; ++v) divergence_bar[v] = splat(T(1));
  }
  Sums<T> sums = {};
  sums.layers = results.gradients;
  sums.mixed_bar = results.mixed_bar;
  const auto zeros = [&](int64_t size) {
    Vec<T>* sum = workspace.take(size);
    for (int64_t i = 0; i < size; ++i) sum[i] = splat(T(0));
    return sum;
  };
  sums.first_bar = zeros(first.out * columns);
  if (results.context_bar != nullptr) sums.context_bar = zeros(first.out * count);
  if (results.time_bar != nullptr) sums.time_bar = zeros(count);
  const Cotangents<T> bars = {
      take_cotangents(solve, samples, results.value_bar, 1, features, workspace), divergence_bar,
      nullptr, nullptr};
  reverse<kOwn>(solve, kActivateLayer<kOwn, T>[int(solve.field.activation)],
                kReverseActivation<kOwn, T>[int(solve.field.activation)], *inputs.at, tile.shape,
                constants, evaluation.z, evaluation.products, bars, scratch, sums, z_bar);
  add_first_bar(solve, tile, sums.first_bar, scratch.rows, sums.layers);

  store_columns(samples, z_bar, 1, features, results.z_bar);
  if (sums.context_bar != nullptr) {
    store_columns(samples, sums.context_bar, 1, first.out, results.context_bar);
  }
  for (int64_t s = 0; sums.time_bar != nullptr && s < samples.count; ++s) {
    const double time_bar = double(sums.time_bar[s / kLanes<T>][s % kLanes<T>]);
    if constexpr (kOwn) {
      if (samples.first + s < samples.batch) results.time_bar[samples.first + s] = time_bar;
    } else {
      results.time_bar[index] = (s == 0 ? 0. : results.time_bar[index]) + time_bar;
    }
  }
  if (results.tangents_bar == nullptr) return;
  Vec<T>* tangents_bar = workspace.take(features * columns);
  if (results.images_bar == nullptr) {
    // Probes enter the divergence on the left as well.
    images_of<kOwn>(solve, inputs, tile, evaluation, tangents_bar);
    for (int64_t i = 0; i < features * columns; ++i) {
      tangents_bar[i] *= divergence_bar[i % count] * solve.probe_weight;
    }
  }
  // reverse() is done with its memory.
  product(transposed_weight(first), features, first.out, sums.first_bar, columns, columns,
          scratch.u[0], columns);
  for (int64_t i = 0; i < features * columns; ++i) {
    tangents_bar[i] =
        results.images_bar == nullptr ? tangents_bar[i] + scratch.u[0][i] : scratch.u[0][i];
  }
  store_columns(samples, tangents_bar, solve.tangents, features, results.tangents_bar);
}

// Value and K vector-Jacobian products. `given` has no tangents.
template <bool kOwn, typename T>
void field_vjp(const MlpSolve<T>& given, const MlpFieldInputs<T>& inputs,
               const MlpFieldVjp<T>& results, int64_t index, T* memory) {
  Workspace<T> workspace = {vectors(memory)};
  MlpSolve<T> solve = given;
  const Mlp<T>& field = solve.field;
  const auto samples = samples_of(solve, inputs.batch, index);
  const auto tile = open_field(inputs, samples, solve, workspace);
  const auto evaluation = evaluation_of_field(solve, inputs, tile, index, workspace);
  const int64_t count = solve.vectors, columns = results.count * count;
  const int64_t wide = widest(field), last = field.layers - 1;
  Vec<T>* x = workspace.take(wide * count);
  Vec<T>* slopes = workspace.take(wide * count);
  Vec<T>* u = workspace.take(wide * columns);
  Vec<T>* other = workspace.take(wide * columns);
  evaluate_field<kOwn>(solve, inputs, samples, tile, evaluation, x, {slopes, nullptr, nullptr});
  store_columns(samples, slopes, 1, field.features, results.value);

  // Rows of u times the gate, and the activation's slopes where there are any.
  const auto scale = [&](int64_t layer, int64_t rows, const Vec<T>* slopes, Vec<T>* u) {
    for (int64_t o = 0; o < rows; ++o) {
      for (int64_t v = 0; v < count; ++v) {
        Vec<T> s = timed<kOwn>(inputs.at->layer[layer].gate, o, v, count);
        if (slopes != nullptr) s *= slopes[o * count + v];
        for (int64_t c = v; c < columns; c += count) u[o * columns + c] *= s;
      }
    }
  };
  load_columns(samples, results.cotangents, results.count, field.features, false, u);
  scale(last, field.features, nullptr, u);
  for (int64_t l = last; l >= 0; --l) {
    const auto& layer = field.layer[l];
    product(transposed_weight(layer), layer.in, layer.out, u, columns, columns, other, columns);
    Vec<T>* swap = u;
    u = other;
    other = swap;
    if (l == 0) break;
    kActivateLayer<kOwn, T>[int(field.activation)](
        inputs.at->layer[l - 1], layer.in, tile.shape,
        rows_of(evaluation.products, tile.constants, tile.shape, int(l - 1)), x, slopes);
    scale(l - 1, layer.in, slopes, u);
  }
  store_columns(samples, u, results.count, field.features, results.products);
}
