// The reverse of a layer's activation, gate and shift: one pass over memory, which gives the
// cotangents of the layer's products, its outputs once more (what the next weight's gradient needs)
// and the sums over samples that its other parameters need.

#include "cuda/mlp_layer.cuh"

namespace pycnf {
namespace {

#include "cuda/scalar.cuh"
#include "core/activation.h"

// Of a multiprocessor, which leaves a thread enough registers.
constexpr int kBlocks = 2;

template <int kWidth, typename T>
__device__ inline void add(Group<T, kWidth>& sum, const Group<T, kWidth>& x) {
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sum.value[e] += x.value[e];
}

// The terms of one row's sums.
template <int kWidth, typename T>
struct Terms {
  Group<T, kWidth> shift;
  Group<T, kWidth> product;
};

// Adds up what the warps of a block have, in order, and stores it as the partial sum `index`.
template <int kWidth, typename T>
__device__ inline void store_partial(const Terms<kWidth, T>& terms, int64_t index, int64_t column,
                                     int64_t out, T* partial) {
  using Row = Group<T, kWidth>;
  Row* shared = shared_memory<Row>();  // [2, kRowLanes, kWarp]
  shared[threadIdx.x] = terms.shift;
  shared[kThreads + threadIdx.x] = terms.product;
  barrier();
  // The first warp adds up the first sums, the second the second.
  const int which = int(threadIdx.x / kWarp), lane = int(threadIdx.x % kWarp);
  if (which >= 2 || column >= out) return;
  Row sum = shared[which * kThreads + lane];
  for (int w = 1; w < kRowLanes; ++w) add(sum, shared[which * kThreads + w * kWarp + lane]);
  store(partial + (2 * index + which) * out + column, sum);
}

// Where one row's terms go.
template <int kWidth, typename T>
__device__ inline void keep_terms(const LayerSums<T>& sums, int64_t i,
                                  const Terms<kWidth, T>& of_row, Terms<kWidth, T>& total) {
  add(total.shift, of_row.shift);
  add(total.product, of_row.product);
  if (sums.shift == nullptr) return;
  store(sums.shift + i, of_row.shift);
  store(sums.product + i, of_row.product);
}

template <typename T>
constexpr size_t kPartialBytes = 2 * kThreads * 16;

template <Activation kind, int kWidth, typename T>
__device__ inline void reverse_row(const ReverseParams<T>& p, int64_t row, int64_t column,
                                   Terms<kWidth, T>& total) {
  const auto& products = p.products;
  const int64_t i = row * products.out + column, size = products.batch * products.out;
  const bool values = p.value_bar != nullptr;
  const bool inner_wanted = values || p.sums.inner_out != nullptr;
  const auto of = row_of_layer<kWidth>(products, row, column);
  Group<T, kWidth> value, slope, scale;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    value.value[e] = activate<kind, T>(of.h.value[e], slope.value[e]);
    scale.value[e] = of.gate.value[e] * slope.value[e];
  }
  auto inner = load_or<kWidth>(p.sums.inner, i, T(0));  // Σ_k (W ȧ_k)∘ǡ'_k
#pragma unroll 2
  for (int64_t k = 0; k < products.tangents; ++k) {
    Group<T, kWidth> bar;
    if (p.tangent_bar != nullptr) {
      bar = load<kWidth>(p.tangent_bar + k * size + i);
    } else {
      bar = load_or<kWidth>(p.mixed, column, T(1));
#pragma unroll
      for (int e = 0; e < kWidth; ++e) bar.value[e] *= p.trace_bar[row];
    }
    if (inner_wanted || p.tangent != nullptr) {
      auto tangent = tangent_of_layer<kWidth>(products, k, row, column);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        inner.value[e] += tangent.value[e] * bar.value[e];
        tangent.value[e] *= scale.value[e];
      }
      if (p.tangent != nullptr) store(p.tangent + k * size + i, tangent);
    }
    if (p.tangent_product_bar == nullptr) continue;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) bar.value[e] *= scale.value[e];
    store(p.tangent_product_bar + k * size + i, bar);
  }
  if (p.value != nullptr) store(p.value + i, value);
  if (p.sums.inner_out != nullptr) store(p.sums.inner_out + i, inner);
  if (!values) return;

  const auto value_bar = load<kWidth>(p.value_bar + i);
  const bool curved = products.tangents > 0 || p.sums.inner != nullptr;
  Terms<kWidth, T> terms;
  Group<T, kWidth> product_bar;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    T u = slope.value[e] * value_bar.value[e], product = T(0);
    if (curved) {
      u += curvature<kind, T>(of.h.value[e], value.value[e], slope.value[e]) *
           (of.gate.value[e] * inner.value[e]);
      product = slope.value[e] * inner.value[e];
    }
    terms.shift.value[e] = u;
    terms.product.value[e] = product + u * of.product.value[e];
    product_bar.value[e] = of.gate.value[e] * u;
  }
  store(p.value_product_bar + i, product_bar);
  keep_terms(p.sums, i, terms, total);
}

template <Activation kind, int kWidth, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    reverse_kernel(const __grid_constant__ ReverseParams<T> p, int64_t rows_of_blocks) {
  const auto& products = p.products;
  const auto rows = rows_of_block<kWidth>(products.batch, products.out, rows_of_blocks);
  Terms<kWidth, T> total = {filled<T, kWidth>(T(0)), filled<T, kWidth>(T(0))};
  if (rows.column < products.out) {
    for (int64_t row = rows.first; row < rows.end; row += kRowLanes) {
      reverse_row<kind, kWidth>(p, row, rows.column, total);
    }
  }
  if (p.sums.partial == nullptr) return;
  store_partial(total, rows.index, rows.column, products.out, p.sums.partial);
}

template <typename T>
__device__ inline void reverse_last_element(const ReverseLastParams<T>& p, int64_t row, int64_t o,
                                            Terms<1, T>& total) {
  const auto& products = p.products;
  const int64_t i = row * products.out + o, size = products.batch * products.out;
  const auto of = row_of_layer<1>(products, row, o);
  const T s = of.gate.value[0];
  const T divergence_bar =
      p.divergence_bar != nullptr ? p.divergence_bar[row] * p.probes.weight : T(0);
  T inner = p.sums.inner != nullptr ? p.sums.inner[i] : T(0);
  for (int64_t k = 0; k < products.tangents; ++k) {
    const T product = tangent_of_layer<1>(products, k, row, o).value[0];
    T bar = T(0);
    if (p.images_bar != nullptr) {
      bar = p.images_bar[k * size + i];
    } else if (p.probes.probe != nullptr) {
      bar = divergence_bar * p.probes.probe[k * size + i];
    } else if (o == p.probes.first + k) {
      bar = divergence_bar;
    }
    inner += bar * product;
    p.tangent_product_bar[k * size + i] = s * bar;
    if (p.probe_bar != nullptr) p.probe_bar[k * size + i] = divergence_bar * (s * product);
  }
  if (p.sums.inner_out != nullptr) p.sums.inner_out[i] = inner;
  if (!p.values) return;
  const T bar = p.value_bar != nullptr ? p.value_bar[i] : T(0);
  p.value_product_bar[i] = s * bar;
  const Terms<1, T> terms = {{{bar}}, {{inner + bar * of.product.value[0]}}};
  keep_terms(p.sums, i, terms, total);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    reverse_last_kernel(const __grid_constant__ ReverseLastParams<T> p, int64_t rows_of_blocks) {
  const auto& products = p.products;
  const auto rows = rows_of_block<1>(products.batch, products.out, rows_of_blocks);
  Terms<1, T> total = {filled<T, 1>(T(0)), filled<T, 1>(T(0))};
  if (rows.column < products.out) {
    for (int64_t row = rows.first; row < rows.end; row += kRowLanes) {
      reverse_last_element(p, row, rows.column, total);
    }
  }
  if (p.sums.partial == nullptr) return;
  store_partial(total, rows.index, rows.column, products.out, p.sums.partial);
}

template <typename T>
bool full_groups(const LayerSums<T>& sums) {
  return aligned({sums.partial, sums.shift, sums.product, sums.inner, sums.inner_out});
}

template <Activation kind, typename T>
cudaError_t reverse_by(const ReverseParams<T>& p, cudaStream_t stream) {
  const auto& products = p.products;
  const bool full = full_groups(products) && full_groups(p.sums) &&
                    aligned({p.value_bar, p.tangent_bar, p.mixed, p.value_product_bar,
                             p.tangent_product_bar, p.value, p.tangent});
  return with_width<T>(full, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t blocks = partial_sums(products.batch) * blocks_across(products.out, kWidth);
    return launch(reverse_kernel<kind, kWidth, T>, blocks, kThreads, kPartialBytes<T>, stream, p,
                  samples_of_sum(products.batch));
  });
}

}  // namespace

template <typename T>
cudaError_t launch_reverse(Activation activation, const ReverseParams<T>& p, cudaStream_t stream) {
  return with_activation(activation,
                         [&](auto kind) { return reverse_by<decltype(kind)::value>(p, stream); });
}

template <typename T>
cudaError_t launch_reverse_last(const ReverseLastParams<T>& p, cudaStream_t stream) {
  const auto& products = p.products;
  const int64_t blocks = partial_sums(products.batch) * blocks_across(products.out, 1);
  return launch(reverse_last_kernel<T>, blocks, kThreads, kPartialBytes<T>, stream, p,
                samples_of_sum(products.batch));
}

template cudaError_t launch_reverse(Activation, const ReverseParams<float>&, cudaStream_t);
template cudaError_t launch_reverse(Activation, const ReverseParams<double>&, cudaStream_t);
template cudaError_t launch_reverse_last(const ReverseLastParams<float>&, cudaStream_t);
template cudaError_t launch_reverse_last(const ReverseLastParams<double>&, cudaStream_t);

}  // namespace pycnf
