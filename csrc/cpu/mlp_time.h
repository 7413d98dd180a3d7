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

// One layer at a time, or at a time of each sample: see `time_layers`.
template <bool kOwn, typename T>
PYCNF_HD TimedLayer<T> time_layer(const MlpLayer<T>& layer, int64_t features, int64_t vectors,
                                  const T* tau, const T* rate, T* numbers) {
  const int64_t outputs = padded<T>(layer.out), width = outputs * (kOwn ? vectors * kLanes<T> : 1);
  T* const gate = numbers;
  T* const shift = gate + width;
  T* const gate_rate = shift + width;
  T* const shift_rate = gate_rate + width;
  // A vector has the times of some samples, or else some outputs.
  for (int64_t o = 0; o < outputs; o += kOwn ? 1 : kLanes<T>) {
    for (int64_t v = 0; v < (kOwn ? vectors : 1); ++v) {
      const auto of_output = [&](const T* row) {
        if constexpr (kOwn) {
          return splat(row[o]);
        } else {
          return load(row, o);
        }
      };
      const auto linear = [&](const T* weight, const T* bias, const T* times) {
        Vec<T> sum = bias != nullptr ? of_output(bias) : splat(T(0));
        for (int64_t f = 0; weight != nullptr && f < features; ++f) {
          sum += of_output(weight + f * outputs) * timed<kOwn>(times, f, v, vectors);
        }
        return sum;
      };
      const int64_t place = kOwn ? (o * vectors + v) * kLanes<T> : o;
      Vec<T> s = splat(T(1)), c = linear(layer.shift_weight, nullptr, tau);
      if (layer.gate_weight != nullptr) {
        s = sigmoid<T>(linear(layer.gate_weight, layer.gate_bias, tau));
      }
      if (layer.bias != nullptr) c += s * of_output(layer.bias);
      *vectors_at(gate, place) = s;
      *vectors_at(shift, place) = c;
      if (rate == nullptr) continue;
      *vectors_at(gate_rate, place) = linear(layer.gate_weight, nullptr, rate);
      *vectors_at(shift_rate, place) = linear(layer.shift_weight, nullptr, rate);
    }
  }
  return {gate, shift, rate != nullptr ? gate_rate : nullptr,
          rate != nullptr ? shift_rate : nullptr};
}

// Fills `timed` and the numbers it points to. tau [F], or [F, samples]; `rate` is τ', or null where
// no rates are wanted.
template <typename T>
void time_layers(const MlpSolve<T>& solve, const T* tau, const T* rate, T* numbers,
                 TimedLayer<T>* timed) {
  const Mlp<T>& field = solve.field;
  for (int l = 0; l < field.layers; ++l) {
    const auto& layer = field.layer[l];
    if (solve.own_times) {
      timed[l] = time_layer<true>(layer, field.time_features, solve.vectors, tau, rate, numbers);
      numbers += 4 * padded<T>(layer.out) * solve.vectors * kLanes<T>;
    } else {
      timed[l] = time_layer<false>(layer, field.time_features, 1, tau, rate, numbers);
      numbers += 4 * padded<T>(layer.out);
    }
  }
}
