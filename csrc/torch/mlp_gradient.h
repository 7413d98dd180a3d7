// The memory that threads add parameters' gradients up in, and the tensors made of it.
#pragma once

#include <array>

#include "torch/mlp_setup.h"

namespace pycnf {

// One sum of all parameters' gradients: where each is.
template <typename T>
struct GradientLayout {
  int64_t numbers = 0;
  struct Layer {
    int64_t weight, stride, bias, gate_weight, gate_bias, shift_weight, end;
    bool swapped;
  } layer[kMaxLayers];

  explicit GradientLayout(const MlpSetup<T>& setup) {
    const auto& field = setup.solve.field;
    const auto take = [&](int64_t count) {
      const int64_t at = numbers;
      numbers += count;
      return at;
    };
    for (int l = 0; l < field.layers; ++l) {
      const auto& of = field.layer[l];
      const int64_t width = setup.padded(of.out);
      auto& at = layer[l];
      // Rows of whole vectors: along the inputs, unless that would leave most lanes empty.
      at.swapped = of.in < setup.table.lanes && of.out > of.in;
      at.stride = setup.padded(at.swapped ? of.out : of.in);
      at.weight = take((at.swapped ? of.in : of.out) * at.stride);
      at.bias = take(width);
      at.gate_weight = take(field.time_features * width);
      at.gate_bias = take(width);
      at.shift_weight = take(field.time_features * width);
      at.end = numbers;
    }
  }

  // Where parameter `which` of a layer is, padding included (which is 0).
  std::pair<int64_t, int64_t> range(int64_t l, int64_t which) const {
    const auto& at = layer[l];
    const int64_t places[] = {at.weight,    at.bias,         at.gate_weight,
                              at.gate_bias, at.shift_weight, at.end};
    return {places[which], places[which + 1]};
  }

  void pointers(T* memory, LayerGradient<T>* gradients, int layers) const {
    for (int l = 0; l < layers; ++l) {
      const auto& at = layer[l];
      gradients[l] = {memory + at.weight,
                      at.stride,
                      at.swapped,
                      memory + at.bias,
                      memory + at.gate_weight,
                      memory + at.gate_bias,
                      memory + at.shift_weight};
    }
  }
};

// `sets` of sums for each thread, zeros.
template <typename T>
class GradientSums {
 public:
  GradientSums(const MlpSetup<T>& setup, int sets)
      : setup_(setup),
        layout_(setup),
        sets_(sets),
        memory_(at::empty({setup.chunks * sets * layout_.numbers + kAlign<T>}, setup.options)),
        layers_(setup.chunks * sets) {
    for (int64_t i = 0; i < int64_t(layers_.size()); ++i) {
      layout_.pointers(numbers(0, 0) + i * layout_.numbers, layers_[i].data(),
                       setup.solve.field.layers);
    }
    // Each thread its own, which are then in its cache.
    setup.for_each_chunk([&](int64_t chunk) {
      for (int set = 0; set < sets; ++set) clear(chunk, set);
    });
  }

  const LayerGradient<T>* layers(int64_t chunk, int set) const {
    return layers_[chunk * sets_ + set].data();
  }

  T* numbers(int64_t chunk, int set) const {
    return aligned(mutable_values<T>(memory_)) + (chunk * sets_ + set) * layout_.numbers;
  }

  void clear(int64_t chunk, int set) { std::fill_n(numbers(chunk, set), layout_.numbers, T(0)); }

  // Adds a set of all threads to the first thread's, in order.
  void reduce(int set) {
    for (int64_t chunk = 1; chunk < setup_.chunks; ++chunk) {
      const T* from = numbers(chunk, set);
      T* to = numbers(0, set);
      for (int64_t i = 0; i < layout_.numbers; ++i) to[i] += from[i];
    }
  }

  // A sum as tensors like the parameters; empty where there is none.
  std::vector<at::Tensor> tensors(const T* memory, const Parameters& parameters) const {
    const auto& field = setup_.solve.field;
    std::vector<at::Tensor> result;
    for (int l = 0; l < field.layers; ++l) {
      const auto& of = field.layer[l];
      const auto& at = layout_.layer[l];
      const int64_t width = setup_.padded(of.out);
      // [rows, columns] of parameter `which`, the numbers of a row and of a column so far apart.
      const auto add = [&](int which, int64_t first, int64_t rows, int64_t row, int64_t columns,
                           int64_t column) {
        const std::optional<at::Tensor> parameter = parameters.get(l * kPerLayer + which);
        auto gradient = at::empty(parameter.has_value() ? parameter->sizes() : at::IntArrayRef{0},
                                  setup_.options);
        result.push_back(gradient);
        if (gradient.numel() == 0) return;
        T* out = mutable_values<T>(gradient);
        for (int64_t i = 0; i < rows; ++i) {
          const T* from = memory + first + i * row;
          for (int64_t j = 0; j < columns; ++j) *out++ = from[j * column];
        }
      };
      add(0, at.weight, of.out, at.swapped ? 1 : at.stride, of.in, at.swapped ? at.stride : 1);
      add(1, at.bias, 1, 0, of.out, 1);
      add(2, at.gate_weight, of.out, 1, field.time_features, width);
      add(3, at.gate_bias, 1, 0, of.out, 1);
      add(4, at.shift_weight, of.out, 1, field.time_features, width);
    }
    return result;
  }

  const GradientLayout<T>& layout() const { return layout_; }

 private:
  const MlpSetup<T>& setup_;
  GradientLayout<T> layout_;
  int sets_;
  at::Tensor memory_;
  std::vector<std::array<LayerGradient<T>, kMaxLayers>> layers_;
};

// One thread's cotangents of the closed form's M: one for each stage, or `one` for all of them.
template <typename T>
class MixedBars {
 public:
  MixedBars(const MlpSetup<T>& setup, int stages, bool one)
      : setup_(setup),
        numbers_(setup.padded(setup.table.mixed_numbers(setup.solve))),
        stages_(numbers_ == 0 ? 0
                : one         ? 1
                              : stages),
        memory_(stages_ * numbers_ + kAlign<T>),
        scratch_(setup.table.mixing_numbers(setup.solve) + kAlign<T>) {
    for (int i = 0; i < stages && stages_ > 0; ++i) {
      pointers_[i] = aligned(memory_.data()) + (one ? 0 : i) * numbers_;
    }
  }

  T* const* pointers() const { return pointers_; }

  // Moves what there is for one stage to the parameters' gradients; returns that of time.
  T unmix(int stage, const MlpAt<T>& at, const LayerGradient<T>* gradients) {
    if (stages_ == 0) return T(0);
    const T time_bar =
        setup_.table.unmix(setup_.solve, at, pointers_[stage], gradients, aligned(scratch_.data()));
    std::fill_n(pointers_[stage], numbers_, T(0));
    return time_bar;
  }

 private:
  const MlpSetup<T>& setup_;
  int64_t numbers_;
  int stages_;
  std::vector<T> memory_, scratch_;
  T* pointers_[kMaxStages] = {};
};

}  // namespace pycnf
