// From tensors to the plain structs of core/params.h: the checks and allocations that the CPU and
// CUDA ops share.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/params.h"

namespace pycnf {

inline void check_state(const at::Tensor& y, const char* name) {
  TORCH_CHECK(y.is_contiguous(), name, " must be contiguous, got strides ", y.strides());
}

inline void check_like(const at::Tensor& x, const at::Tensor& y0, const char* name) {
  check_state(x, name);
  TORCH_CHECK(
      x.scalar_type() == y0.scalar_type() && x.device() == y0.device() && x.numel() == y0.numel(),
      name, " must have the ", y0.numel(), " values, dtype and device of y0 (", y0.scalar_type(),
      ", ", y0.device(), "), got ", x.numel(), " values, ", x.scalar_type(), ", ", x.device());
}

// torch's name for the numbers that kernels see as Storage.
template <typename Storage>
struct TorchNumber {
  using Type = Storage;
};

template <typename Storage>
Storage* numbers(const at::Tensor& x) {
  return reinterpret_cast<Storage*>(x.data_ptr<typename TorchNumber<Storage>::Type>());
}

template <typename Storage>
const Storage* const_numbers(const at::Tensor& x) {
  return reinterpret_cast<const Storage*>(x.const_data_ptr<typename TorchNumber<Storage>::Type>());
}

// A step size in memory where the state is.
inline void check_step(const at::Tensor& h, const at::Tensor& y0) {
  TORCH_CHECK(h.numel() >= 1 && h.scalar_type() == y0.scalar_type() && h.device() == y0.device() &&
                  h.is_contiguous(),
              "h must be [1] of y0's dtype and device, got ", h.scalar_type(), " ", h.sizes(),
              " on ", h.device());
}

// The rows of one step.
struct Rows {
  at::Tensor k;
  bool flip;

  Rows(const at::Tensor& k, const at::Tensor& y0, bool flip) : k(k), flip(flip) {
    check_state(k, "k");
    TORCH_CHECK(
        k.dim() == 2 && k.size(1) == y0.numel() && k.size(0) >= 1 && k.size(0) <= kMaxStages,
        "k must be [stages, ", y0.numel(), "] with 1 to ", kMaxStages, " stages, got ", k.sizes());
    TORCH_CHECK(k.scalar_type() == y0.scalar_type() && k.device() == y0.device(),
                "k must have y0's dtype and device");
  }

  int64_t stages() const { return k.size(0); }

  int64_t index(int64_t stage) const {
    const int64_t last = stages() - 1;
    return flip && (stage == 0 || stage == last) ? last - stage : stage;
  }

  template <typename Storage>
  Storage* row(int64_t stage) const {
    return numbers<Storage>(k) + index(stage) * k.size(1);
  }

  template <typename Storage, typename T = Storage>
  WeightedRows<Storage, T> weighted(at::ArrayRef<double> weights, double h) const {
    TORCH_CHECK(int64_t(weights.size()) <= stages(), "got ", weights.size(), " weights for ",
                stages(), " stages");
    WeightedRows<Storage, T> terms = {};
    terms.count = int(weights.size());
    for (int j = 0; j < terms.count; ++j) {
      terms.rows[j] = row<Storage>(j);
      terms.weights[j] = T(weights[j]) * T(h);
    }
    return terms;
  }

  // Where the kernel can store the new row itself, the pointer to read from; null once it is stored
  // here.
  template <typename Storage>
  const Storage* store(at::TensorList fresh, int64_t stage) const {
    if (fresh.empty()) return nullptr;
    int64_t total = 0;
    for (const auto& part : fresh) total += part.numel();
    TORCH_CHECK(total == k.size(1), "func must return as many values as the state has: expected ",
                k.size(1), ", got ", total);
    const auto& first = fresh[0];
    if (fresh.size() == 1 && first.scalar_type() == k.scalar_type() && first.is_contiguous() &&
        first.device() == k.device()) {
      return const_numbers<Storage>(first);
    }
    auto target = k.select(0, index(stage));
    int64_t begin = 0;
    for (const auto& part : fresh) {
      if (part.is_cpu() && target.is_cpu() && part.is_contiguous() &&
          part.scalar_type() == k.scalar_type()) {
        std::memcpy(numbers<Storage>(target) + begin, const_numbers<Storage>(part), part.nbytes());
      } else {
        // Detached: the rows carry no graph, whatever the field returned.
        target.narrow(0, begin, part.numel()).view(part.sizes()).copy_(part.detach());
      }
      begin += part.numel();
    }
    return nullptr;
  }
};

template <typename T>
Tolerance<T> tolerance(const at::Tensor& rtol, const at::Tensor& atol, const at::Tensor& y0) {
  Tolerance<T> result = {};
  const auto read = [&](const at::Tensor& x, const char* name, T& value, const double*& each,
                        const double*& on_device) {
    TORCH_CHECK(x.scalar_type() == at::kDouble, name, " must be float64, got ", x.scalar_type());
    if (x.dim() == 0 && x.is_cpu()) {
      value = T(x.item<double>());
    } else if (x.dim() == 0) {
      TORCH_CHECK(x.device() == y0.device(), name, " must be on the CPU or on ", y0.device(),
                  ", got ", x.device());
      on_device = x.const_data_ptr<double>();
    } else {
      TORCH_CHECK(x.numel() == y0.numel() && x.is_contiguous() && x.device() == y0.device(), name,
                  " must be 0-dim or have one value per value of the state (", y0.numel(),
                  "), contiguous on ", y0.device(), "; got ", x.sizes(), " on ", x.device());
      each = x.const_data_ptr<double>();
    }
  };
  read(rtol, "rtol", result.rtol, result.rtol_each, result.rtol_device);
  read(atol, "atol", result.atol, result.atol_each, result.atol_device);
  return result;
}

template <typename Storage, typename T = Storage>
StageParams<Storage, T> stage_params(const at::Tensor& y0, const Rows& rows, at::TensorList fresh,
                                     at::ArrayRef<double> weights, double h,
                                     const at::Tensor& out) {
  StageParams<Storage, T> p = {};
  p.y0 = const_numbers<Storage>(y0);
  p.terms = rows.weighted<Storage, T>(weights, h);
  p.fresh = rows.store<Storage>(fresh, p.terms.count - 1);
  p.fresh_row = rows.row<Storage>(p.terms.count - 1);
  p.out = numbers<Storage>(out);
  return p;
}

// The rows of rk_combine, contiguous. They must outlive the kernel's use of combine_params.
inline std::vector<at::Tensor> combine_rows(const at::Tensor& y0, at::TensorList k,
                                            at::ArrayRef<double> weights) {
  TORCH_CHECK(k.size() == weights.size() && k.size() <= size_t(kMaxStages) && !k.empty(),
              "k and weights must have the same length, 1 to ", kMaxStages, "; got ", k.size(),
              " and ", weights.size());
  std::vector<at::Tensor> rows;
  for (const auto& row : k) {
    rows.push_back(row.contiguous());
    check_like(rows.back(), y0, "k");
  }
  return rows;
}

template <typename Storage, typename T = Storage>
StageParams<Storage, T> combine_params(const at::Tensor& y0, const std::vector<at::Tensor>& rows,
                                       at::ArrayRef<double> weights, double h, bool ordered,
                                       const at::Tensor& out) {
  StageParams<Storage, T> p = {};
  p.y0 = const_numbers<Storage>(y0);
  p.out = numbers<Storage>(out);
  p.terms.count = int(rows.size());
  p.terms.ordered = ordered;
  for (int j = 0; j < p.terms.count; ++j) {
    p.terms.rows[j] = const_numbers<Storage>(rows[j]);
    p.terms.weights[j] = T(weights[j]) * T(h);
  }
  return p;
}

template <typename Storage, typename T = Storage>
FinishParams<Storage, T> finish_params(const at::Tensor& y0, const Rows& rows, at::TensorList fresh,
                                       const at::Tensor& y1, at::ArrayRef<double> solution,
                                       at::ArrayRef<double> error, double h, const at::Tensor& rtol,
                                       const at::Tensor& atol,
                                       const std::optional<at::Tensor>& ratio) {
  TORCH_CHECK(solution.empty() || solution.size() == error.size(),
              "solution must be empty or as long as error, got ", solution.size(), " and ",
              error.size(), " weights");
  FinishParams<Storage, T> p = {};
  p.tolerance = tolerance<T>(rtol, atol, y0);  // first: a refused call writes nothing
  p.y0 = const_numbers<Storage>(y0);
  p.solution = rows.weighted<Storage, T>(solution, h);
  p.error = rows.weighted<Storage, T>(error, h);
  p.fresh = rows.store<Storage>(fresh, rows.stages() - 1);
  p.fresh_row = rows.row<Storage>(rows.stages() - 1);
  p.y1 = numbers<Storage>(y1);
  p.ratio = ratio.has_value() ? numbers<Storage>(*ratio) : nullptr;
  return p;
}

template <typename Storage, typename T = Storage>
InitialParams<Storage, T> initial_params(const at::Tensor& y0, const at::Tensor& f0,
                                         const std::optional<at::Tensor>& f1,
                                         const at::Tensor& rtol, const at::Tensor& atol) {
  InitialParams<Storage, T> p = {};
  p.y0 = const_numbers<Storage>(y0);
  p.f0 = const_numbers<Storage>(f0);
  p.f1 = f1.has_value() ? const_numbers<Storage>(*f1) : nullptr;
  p.tolerance = tolerance<T>(rtol, atol, y0);
  return p;
}

template <typename Storage, typename T = Storage>
InterpolateParams<Storage, T> interpolate_params(const at::Tensor& y0, const at::Tensor& y1,
                                                 const Rows& rows, at::ArrayRef<double> middle,
                                                 double h, const at::Tensor& x,
                                                 const at::Tensor& out) {
  InterpolateParams<Storage, T> p = {};
  p.y0 = const_numbers<Storage>(y0);
  p.y1 = const_numbers<Storage>(y1);
  p.f0 = rows.row<Storage>(0);
  p.f1 = rows.row<Storage>(rows.stages() - 1);
  p.middle = rows.weighted<Storage, T>(middle, h);
  p.h = T(h);
  p.x = x.const_data_ptr<T>();
  p.times = x.numel();
  p.out = numbers<Storage>(out);
  p.size = y0.numel();
  return p;
}

inline void check_interpolate(const at::Tensor& y0, const at::Tensor& y1, at::ArrayRef<double> x,
                              const at::Tensor& out) {
  check_state(y0, "y0");
  check_like(y1, y0, "y1");
  check_state(out, "out");
  TORCH_CHECK(out.numel() == int64_t(x.size()) * y0.numel() &&
                  out.scalar_type() == y0.scalar_type() && out.device() == y0.device(),
              "out must hold ", x.size(), " states of ", y0.numel(), " values like y0, got ",
              out.sizes(), " of ", out.scalar_type());
}

inline void check_keys(const at::Tensor& keys, int64_t probes, int64_t features) {
  TORCH_CHECK(keys.dim() == 1 && keys.scalar_type() == at::kLong, "keys must be int64 [B], got ",
              keys.scalar_type(), " ", keys.sizes());
  TORCH_CHECK(probes >= 0 && features >= 0, "probes and features must not be negative, got ",
              probes, " and ", features);
}

// A run of elements that belongs to one segment, or to none (-1).
struct Range {
  int64_t begin;
  int64_t end;
  int64_t segment;
};

// The state cut at segment borders and into chunks, so that the order of summation depends on
// neither the number of threads nor of blocks.
inline std::vector<Range> norm_ranges(at::IntArrayRef segments, int64_t size, int64_t chunk) {
  TORCH_CHECK(segments.size() % 2 == 0, "segments must be pairs (begin, end), got ",
              segments.size(), " numbers");
  std::vector<Range> ranges;
  int64_t at = 0;
  const auto cut = [&](int64_t end, int64_t segment) {
    for (; at < end; at = std::min(at + chunk, end)) {
      ranges.push_back({at, std::min(at + chunk, end), segment});
    }
  };
  for (size_t s = 0; s + 1 < segments.size(); s += 2) {
    TORCH_CHECK(segments[s] >= at && segments[s + 1] >= segments[s] && segments[s + 1] <= size,
                "segments must be ascending within the state of ", size, " values, got ", segments);
    cut(segments[s], -1);
    cut(segments[s + 1], int64_t(s / 2));
  }
  cut(size, -1);
  return ranges;
}

// The largest RMS over the segments, for both sums of a partial. Comparisons with NaN are as in
// Python's max().
inline std::array<double, 2> largest_rms(const std::vector<Range>& ranges,
                                         const std::vector<NormPartial>& partials,
                                         at::IntArrayRef segments) {
  std::array<double, 2> largest = {0., 0.};
  std::vector<std::array<double, 2>> sums(segments.size() / 2, {0., 0.});
  for (size_t r = 0; r < ranges.size(); ++r) {
    if (ranges[r].segment < 0) continue;
    sums[ranges[r].segment][0] += partials[r].sum_squares[0];
    sums[ranges[r].segment][1] += partials[r].sum_squares[1];
  }
  for (size_t s = 0; s < sums.size(); ++s) {
    const double count = double(segments[2 * s + 1] - segments[2 * s]);
    for (int which = 0; which < 2; ++which) {
      const double rms = std::sqrt(sums[s][which] / count);
      if (s == 0 || rms > largest[which]) largest[which] = rms;
    }
  }
  return largest;
}

}  // namespace pycnf
