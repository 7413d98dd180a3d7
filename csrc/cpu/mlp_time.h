// Gates and shifts of all layers at a time. To be included within the namespace of an instruction
// set only.

// Numbers for `time_layers`: four rows of every layer, padded to whole vectors, one number for each
// output, or for each output and sample where these have times of their own.
template <typename T>
int64_t timed_numbers(const MlpSolve<T>& solve) {
  int64_t outputs = 0;
  for (int l = 0; l < solve.field.layers; ++l) outputs += padded<T>(solve.field.layer[l].out);
  return 4 * outputs * (solve.own_times ? solve.vectors * kLanes<T> : 1);
}

// Fills `timed` and the numbers it points to. tau [F], or [F, samples]; `rate` is τ', or null where
// no rates are wanted.
template <typename T>
void time_layers(const MlpSolve<T>& solve, const T* tau, const T* rate, T* numbers,
                 TimedLayer<T>* timed) {
  const Mlp<T>& field = solve.field;
  const int64_t features = field.time_features;
  const int64_t per = solve.own_times ? solve.vectors : 0;
  for (int l = 0; l < field.layers; ++l) {
    const auto& layer = field.layer[l];
    const int64_t width = padded<T>(layer.out) * (per > 0 ? per * kLanes<T> : 1);
    T* rows[4];
    for (int i = 0; i < 4; ++i, numbers += width) rows[i] = numbers;
    // Σ_f weight[o, f] times[f], for all outputs (and samples); weight rows `stride` apart.
    const auto linear = [&](const T* weight, int64_t stride, const T* bias, const T* times,
                            T* result) {
      for (int64_t o = 0; o < padded<T>(layer.out); ++o) {
        const bool real = o < layer.out && weight != nullptr;
        const T start = real && bias != nullptr ? bias[o] : T(0);
        for (int64_t v = 0; v < per; ++v) {
          Vec<T> sum = splat(start);
          for (int64_t f = 0; real && f < features; ++f) {
            sum += load(times, (f * per + v) * kLanes<T>) * weight[o * stride + f];
          }
          *vectors_at(result, (o * per + v) * kLanes<T>) = sum;
        }
        if (per > 0) continue;
        T sum = start;
        for (int64_t f = 0; real && f < features; ++f) sum += weight[o * stride + f] * times[f];
        result[o] = sum;
      }
    };
    linear(layer.gate_weight, features, layer.gate_bias, tau, rows[0]);
    linear(layer.shift_weight, layer.shift_stride, nullptr, tau, rows[1]);
    if (rate != nullptr) {
      linear(layer.gate_weight, features, nullptr, rate, rows[2]);
      linear(layer.shift_weight, layer.shift_stride, nullptr, rate, rows[3]);
    }
    for (int64_t i = 0; i < width; i += kLanes<T>) {
      Vec<T>* gate = vectors_at(rows[0], i);
      *gate = layer.gate_weight != nullptr ? sigmoid<T>(*gate) : splat(T(1));
    }
    const int64_t numbers_of_output = per > 0 ? per * kLanes<T> : 1;
    for (int64_t o = 0; o < layer.out && layer.bias != nullptr; ++o) {
      for (int64_t i = o * numbers_of_output; i < (o + 1) * numbers_of_output; ++i) {
        rows[1][i] += rows[0][i] * layer.bias[o];
      }
    }
    timed[l] = {rows[0], rows[1], rate != nullptr ? rows[2] : nullptr,
                rate != nullptr ? rows[3] : nullptr};
  }
}
