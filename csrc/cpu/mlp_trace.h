// The closed form of the divergence of a network with one or two hidden layers: what its layers'
// weights have in common at a time, shared by the batch, and the way back. To be included within the
// namespace of an instruction set only.
//
// With the last layer's gate s, W the last weight and N = (W₁ diag(s) W)ᵀ: M = W₂∘N for two hidden
// layers, and m = the diagonal of N for one.

// Numbers of M or m, and so of N.
template <typename T>
int64_t mixed_numbers(const MlpSolve<T>& solve) {
  if (!solve.closed_form) return 0;
  const int64_t stride = padded<T>(solve.field.layer[0].out);
  return solve.field.layers == 2 ? stride : solve.field.layer[1].out * stride;
}

// Scratch of the two functions below.
template <typename T>
int64_t mixing_numbers(const MlpSolve<T>& solve) {
  if (!solve.closed_form) return 0;
  const auto& first = solve.field.layer[0];
  const auto& last = solve.field.layer[solve.field.layers - 1];
  const int64_t width = padded<T>(first.out), other = padded<T>(last.in);
  const int64_t features = padded<T>(solve.field.features);
  return 2 * features * (width + other) + 2 * other * width;
}

// W₁ᵀ in rows of whole vectors.
template <typename T>
void transpose_first(const MlpLayer<T>& first, T* rows) {
  const int64_t stride = padded<T>(first.out);
  for (int64_t d = 0; d < first.in; ++d) {
    for (int64_t j = 0; j < stride; ++j) {
      rows[d * stride + j] = j < first.out ? first.weight[j * first.weight_stride + d] : T(0);
    }
  }
}

template <typename T>
void mix(const MlpSolve<T>& solve, const T* gate, T* unmixed, T* mixed, T* scratch) {
  const Mlp<T>& field = solve.field;
  const auto& first = field.layer[0];
  const auto& last = field.layer[field.layers - 1];
  const int64_t stride = padded<T>(first.out);
  T* rows = scratch;  // diag(s) W₁ᵀ [D, stride]
  transpose_first(first, rows);
  for (int64_t d = 0; d < field.features; ++d) {
    for (int64_t j = 0; j < stride; ++j) rows[d * stride + j] *= gate[d];
  }
  if (field.layers == 2) {
    for (int64_t j = 0; j < stride; ++j) unmixed[j] = mixed[j] = T(0);
    for (int64_t d = 0; d < field.features; ++d) {
      for (int64_t j = 0; j < first.out; ++j) {
        mixed[j] += rows[d * stride + j] * last.weight[d * last.weight_stride + j];
      }
    }
    return;
  }
  const auto& middle = field.layer[1];
  const int64_t columns = stride / kLanes<T>;
  product(transposed_weight(last), last.in, last.out, vectors(rows), columns, columns,
          vectors(unmixed), columns);
  for (int64_t i = 0; i < middle.out; ++i) {
    for (int64_t j = 0; j < stride; ++j) {
      const T w = j < middle.in ? middle.weight[i * middle.weight_stride + j] : T(0);
      mixed[i * stride + j] = w * unmixed[i * stride + j];
    }
  }
}

// Adds x [out, stride], or its transpose if `transposed_x`, to a gradient in either layout.
template <typename T>
void add_rows(const LayerGradient<T>& gradient, int64_t out, int64_t in, const T* x, int64_t stride,
              bool transposed_x) {
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t i = 0; i < in; ++i) {
      const T value = transposed_x ? x[i * stride + o] : x[o * stride + i];
      gradient.weight[gradient.swapped ? i * gradient.stride + o : o * gradient.stride + i] +=
          value;
    }
  }
}

// From the cotangent of M (or m) to the gradients of all weights and of the last gate; returns that
// of time. `mixed_bar` is used up.
template <typename T>
T unmix(const MlpSolve<T>& solve, const MlpAt<T>& at, T* mixed_bar,
        const LayerGradient<T>* gradients, T* scratch) {
  const Mlp<T>& field = solve.field;
  const auto& first = field.layer[0];
  const auto& last = field.layer[field.layers - 1];
  const auto& timed_last = at.layer[field.layers - 1];
  const int64_t features = field.features;
  const int64_t stride = padded<T>(first.out), other = padded<T>(last.in);
  T* rows = scratch;                            // W₁ᵀ [D, stride]
  T* first_bar = rows + features * stride;      // of W₁ᵀ, without the gate
  T* last_bar = first_bar + features * stride;  // of the last weight [D, other], without the gate
  T* turned = last_bar + 2 * padded<T>(features) * other;
  transpose_first(first, rows);
  if (field.layers == 2) {
    for (int64_t d = 0; d < features; ++d) {
      for (int64_t j = 0; j < stride; ++j) {
        const T w = j < first.out ? last.weight[d * last.weight_stride + j] : T(0);
        first_bar[d * stride + j] = mixed_bar[j] * w;
        last_bar[d * other + j] = mixed_bar[j] * rows[d * stride + j];
      }
    }
  } else {
    const auto& middle = field.layer[1];
    // M = W₂∘N: first W₂'s part, then what is left is N's cotangent.
    for (int64_t i = 0; i < middle.out; ++i) {
      for (int64_t j = 0; j < middle.in; ++j) {
        const T bar = mixed_bar[i * stride + j];
        const auto& gradient = gradients[1];
        gradient.weight[gradient.swapped ? j * gradient.stride + i : i * gradient.stride + j] +=
            bar * at.unmixed[i * stride + j];
        mixed_bar[i * stride + j] = bar * middle.weight[i * middle.weight_stride + j];
      }
    }
    const int64_t columns = stride / kLanes<T>;
    product(weight_of(last), features, last.in, vectors(mixed_bar), columns, columns,
            vectors(first_bar), columns);
    for (int64_t c = 0; c < columns; ++c) {
      transpose(vectors(mixed_bar) + c, last.in, columns, other, turned + c * kLanes<T> * other);
    }
    product(transposed_weight(first), features, first.out, vectors(turned), other / kLanes<T>,
            other / kLanes<T>, vectors(last_bar), other / kLanes<T>);
  }
  T time_bar = T(0);
  for (int64_t d = 0; d < features; ++d) {
    const T s = timed_last.gate[d];
    T gate_bar = T(0);
    for (int64_t j = 0; j < first.out; ++j)
      gate_bar += first_bar[d * stride + j] * rows[d * stride + j];
    for (int64_t j = 0; j < stride; ++j) first_bar[d * stride + j] *= s;
    for (int64_t i = 0; i < other; ++i) last_bar[d * other + i] *= s;
    if (last.gate_weight == nullptr) continue;
    const LayerGradient<T>& gradient = gradients[field.layers - 1];
    gate_bar *= s * (T(1) - s);
    gradient.gate_bias[d] += gate_bar;
    for (int64_t f = 0; f < field.time_features; ++f) {
      gradient.gate_weight[f * padded<T>(features) + d] += gate_bar * at.tau[f];
    }
    if (timed_last.gate_rate != nullptr) time_bar += gate_bar * timed_last.gate_rate[d];
  }
  add_rows(gradients[0], first.out, first.in, first_bar, stride, true);
  add_rows(gradients[field.layers - 1], last.out, last.in, last_bar, other, false);
  return time_bar;
}
