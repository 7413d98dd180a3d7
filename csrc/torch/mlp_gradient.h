// The memory that threads add parameters' gradients up in, and the tensors made of it.
#pragma once

#include "torch/mlp_setup.h"

namespace pycnf {

// One sum of all parameters' gradients: where each is.
template <typename T>
struct GradientLayout {
  int64_t numbers = 0;
  struct Layer {
    int64_t weight, stride, bias, gate_weight, gate_bias, shift_weight;
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
    }
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

// Sums of one thread: of the parameters' gradients, and of the cotangents of M.
template <typename T>
struct ThreadSums {
  LayerGradient<T> layers[kMaxLayers];
  T* numbers;  // layout.numbers
  T* mixed;    // mixed_numbers, or null
};

// `sets` of sums for each thread, zeros.
template <typename T>
class GradientSums {
 public:
  GradientSums(const MlpSetup<T>& setup, int sets)
      : setup_(setup),
        layout_(setup),
        mixed_(setup.padded(setup.table.mixed_numbers(setup.solve))),
        sets_(sets),
        memory_(at::zeros({setup.chunks * sets * (layout_.numbers + mixed_) + kAlign<T>},
                          setup.options)),
        sums_(setup.chunks * sets) {
    T* at = aligned(mutable_values<T>(memory_));
    for (auto& sums : sums_) {
      layout_.pointers(at, sums.layers, setup.solve.field.layers);
      sums.numbers = at;
      sums.mixed = mixed_ > 0 ? at + layout_.numbers : nullptr;
      at += layout_.numbers + mixed_;
    }
  }

  ThreadSums<T>& of(int64_t chunk, int set = 0) { return sums_[chunk * sets_ + set]; }

  void clear() { memory_.zero_(); }
  void clear_mixed(ThreadSums<T>& sums) const { std::fill_n(sums.mixed, mixed_, T(0)); }

  // Adds set `set` of all threads to the first thread's, in order.
  void reduce(int set) {
    for (int64_t chunk = 1; chunk < setup_.chunks; ++chunk) {
      const T* from = of(chunk, set).numbers;
      T* to = of(0, set).numbers;
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
      // value(i) of parameter `which`, in the order of its own numbers.
      const auto add = [&](int which, const auto& value) {
        const std::optional<at::Tensor> parameter = parameters.get(l * kPerLayer + which);
        auto gradient = at::empty(parameter.has_value() ? parameter->sizes() : at::IntArrayRef{0},
                                  setup_.options);
        T* out = mutable_values<T>(gradient);
        for (int64_t i = 0; i < gradient.numel(); ++i) out[i] = value(i);
        result.push_back(gradient);
      };
      const auto of_time = [&](int64_t first) {
        return [&, first](int64_t i) {
          return memory[first + i % field.time_features * width + i / field.time_features];
        };
      };
      add(0, [&](int64_t i) {
        const int64_t o = i / of.in, in = i % of.in;
        return memory[at.weight + (at.swapped ? in * at.stride + o : o * at.stride + in)];
      });
      add(1, [&](int64_t i) { return memory[at.bias + i]; });
      add(2, of_time(at.gate_weight));
      add(3, [&](int64_t i) { return memory[at.gate_bias + i]; });
      add(4, of_time(at.shift_weight));
    }
    return result;
  }

  const GradientLayout<T>& layout() const { return layout_; }

 private:
  const MlpSetup<T>& setup_;
  GradientLayout<T> layout_;
  int64_t mixed_;
  int sets_;
  at::Tensor memory_;
  std::vector<ThreadSums<T>> sums_;
};

// Memory for the scratch of unmixing, aligned.
template <typename T>
std::vector<T> mixing_scratch(const MlpSetup<T>& setup) {
  return std::vector<T>(setup.table.mixing_numbers(setup.solve) + kAlign<T>);
}

}  // namespace pycnf
