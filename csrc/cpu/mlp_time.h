// Gates and shifts of all layers at a time. To be included within the namespace of an instruction
// set only.

// Fills s and s∘b + c of every layer, each padded to whole vectors, and `timed` with where they
// are; numbers is room for two rows of every layer.
template <typename T>
void time_layers(const Mlp<T>& field, const T* tau, T* numbers, TimedLayer<T>* timed) {
  for (int l = 0; l < field.layers; ++l) {
    const auto& layer = field.layer[l];
    const int64_t width = padded<T>(layer.out);
    T* gate = numbers;
    T* shift = numbers + width;
    numbers += 2 * width;
    for (int64_t o = 0; o < width; ++o) {
      T inner = T(0), outer = T(0);
      if (o < layer.out && layer.gate_weight != nullptr) {
        inner = layer.gate_bias[o];
        for (int64_t f = 0; f < field.time_features; ++f) {
          inner += layer.gate_weight[o * field.time_features + f] * tau[f];
        }
      }
      if (o < layer.out && layer.shift_weight != nullptr) {
        for (int64_t f = 0; f < field.time_features; ++f) {
          outer += layer.shift_weight[o * layer.shift_stride + f] * tau[f];
        }
      }
      gate[o] = inner;
      shift[o] = outer;
    }
    if (layer.gate_weight != nullptr) {
      for (int64_t o = 0; o < width; o += kLanes<T>) {
        *vectors(gate + o) = sigmoid<T>(*vectors(gate + o));
      }
    }
    for (int64_t o = 0; o < layer.out && layer.bias != nullptr; ++o) {
      shift[o] += layer.gate_weight != nullptr ? gate[o] * layer.bias[o] : layer.bias[o];
    }
    timed[l] = {layer.gate_weight != nullptr ? gate : nullptr, shift};
  }
}
