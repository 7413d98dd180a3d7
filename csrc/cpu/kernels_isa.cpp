// The stepping and probe kernels. Compiled once per instruction set, with PYCNF_ISA naming the
// namespace; plain loops over blocks of a row, which the compiler vectorises for the set at hand.
//
// Everything here has internal linkage but the table at the end: a weak symbol compiled for AVX-512
// could be the copy that the linker keeps for all, and crash an older CPU.

#include "core/interpolant.h"
#include "core/philox.h"
#include "core/rk.h"
#include "cpu/kernels.h"

namespace pycnf {
namespace PYCNF_ISA {
namespace {

// Elements handled together: a block of every row of the largest tableau stays in L1 beside the
// partial sums.
constexpr int kBlock = 256;

template <typename T>
struct Block {
  alignas(64) T value[kBlock];
};

// sum = weighted rows over [begin, begin + length), in the order that rk.h prescribes. Rows of
// weight zero are not read.
template <typename T>
void weighted_sum(const WeightedRows<T>& terms, int64_t begin, int length, T* __restrict sum) {
  Block<T> groups[kSumGroups];
  bool used[kSumGroups] = {};
  for (int j = 0; j < terms.count; ++j) {
    const T weight = terms.weights[j];
    if (weight == T(0)) continue;
    const int group = terms.ordered ? 0 : sum_group<T>(j, terms.count);
    T* __restrict partial = groups[group].value;
    const T* __restrict row = terms.rows[j] + begin;
    if (used[group]) {
      for (int i = 0; i < length; ++i) partial[i] += row[i] * weight;
    } else {
      for (int i = 0; i < length; ++i) partial[i] = row[i] * weight;
      used[group] = true;
    }
  }
  bool first = true;
  for (int group = 0; group < kSumGroups; ++group) {
    if (!used[group]) continue;
    const T* __restrict partial = groups[group].value;
    if (first) {
      for (int i = 0; i < length; ++i) sum[i] = partial[i];
      first = false;
    } else {
      for (int i = 0; i < length; ++i) sum[i] += partial[i];
    }
  }
  if (first) {
    for (int i = 0; i < length; ++i) sum[i] = T(0);
  }
}

template <typename T>
void store_fresh(const T* fresh, T* fresh_row, int64_t begin, int length) {
  if (fresh == nullptr) return;
  const T* __restrict source = fresh + begin;
  T* __restrict target = fresh_row + begin;
  for (int i = 0; i < length; ++i) target[i] = source[i];
}

// out[0 .. length) = y0 + weighted rows over [begin, begin + length).
template <typename T>
void advance(const T* y0, const WeightedRows<T>& terms, int64_t begin, int length,
             T* __restrict out) {
  Block<T> sum;
  weighted_sum(terms, begin, length, sum.value);
  const T* __restrict start = y0 + begin;
  for (int i = 0; i < length; ++i) out[i] = start[i] + sum.value[i];
}

int block_length(int64_t begin, int64_t end) {
  return end - begin < kBlock ? int(end - begin) : kBlock;
}

template <typename T>
void stage(const StageParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kBlock) {
    const int length = block_length(at, end);
    store_fresh(p.fresh, p.fresh_row, at, length);
    advance(p.y0, p.terms, at, length, p.out + at);
  }
}

// Squares are summed in f64 over eight lanes, so that neither the width of the instruction set nor
// the length of the row matters to the accept decision.
constexpr int kNormLanes = 8;

template <typename T>
void add_squares(const T* value, int length, double* lanes) {
  int i = 0;
  for (; i + kNormLanes <= length; i += kNormLanes) {
    for (int lane = 0; lane < kNormLanes; ++lane) {
      lanes[lane] += double(value[i + lane]) * double(value[i + lane]);
    }
  }
  for (; i < length; ++i) lanes[i % kNormLanes] += double(value[i]) * double(value[i]);
}

double sum_lanes(const double* lanes) {
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// The scaled error of `value` over a block, with |y| (or max(|y0|, |y1|)) in `size`.
template <typename T>
void scale_block(const Tolerance<T>& tolerance, const T* size, int64_t begin, int length,
                 T* value) {
  if (tolerance.rtol_each == nullptr && tolerance.atol_each == nullptr) {
    const T rtol = tolerance.rtol, atol = tolerance.atol;
    for (int i = 0; i < length; ++i) value[i] = value[i] / (atol + rtol * size[i]);
  } else {
    for (int i = 0; i < length; ++i) value[i] = scaled(value[i], size[i], tolerance, begin + i);
  }
}

template <typename T>
NormPartial finish(const FinishParams<T>& p, int64_t begin, int64_t end) {
  NormPartial partial = {{0., 0.}, 0};
  double lanes[kNormLanes] = {};
  Block<T> error, size;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int length = block_length(at, end);
    store_fresh(p.fresh, p.fresh_row, at, length);
    if (p.solution.count > 0) advance(p.y0, p.solution, at, length, p.y1 + at);
    weighted_sum(p.error, at, length, error.value);
    const T* __restrict y0 = p.y0 + at;
    const T* __restrict y1 = p.y1 + at;
    int nonfinite = 0;
    for (int i = 0; i < length; ++i) {
      size.value[i] = larger_magnitude(y0[i], y1[i]);
      nonfinite += is_finite(y1[i]) ? 0 : 1;
    }
    scale_block(p.tolerance, size.value, at, length, error.value);
    if (p.ratio != nullptr) {
      for (int i = 0; i < length; ++i) p.ratio[at + i] = error.value[i];
    }
    add_squares(error.value, length, lanes);
    partial.nonfinite += nonfinite;
  }
  partial.sum_squares[0] = sum_lanes(lanes);
  return partial;
}

template <typename T>
void interpolate(const InterpolateParams<T>& p, int64_t begin, int64_t end) {
  Block<T> middle;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int length = block_length(at, end);
    advance(p.y0, p.middle, at, length, middle.value);
    for (int64_t time = 0; time < p.times; ++time) {
      const T x = p.x[time];
      T* __restrict out = p.out + time * p.size + at;
      const T* __restrict y0 = p.y0 + at;
      const T* __restrict y1 = p.y1 + at;
      const T* __restrict f0 = p.f0 + at;
      const T* __restrict f1 = p.f1 + at;
      for (int i = 0; i < length; ++i) {
        out[i] = evaluate_quartic(fit_quartic(y0[i], y1[i], middle.value[i], f0[i], f1[i], p.h), x);
      }
    }
  }
}

template <typename T>
NormPartial initial(const InitialParams<T>& p, int64_t begin, int64_t end) {
  NormPartial partial = {{0., 0.}, 0};
  double lanes0[kNormLanes] = {}, lanes1[kNormLanes] = {};
  Block<T> size, value;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int length = block_length(at, end);
    for (int i = 0; i < length; ++i) {
      size.value[i] = magnitude(p.y0[at + i]);
      value.value[i] = p.f1 != nullptr ? p.f1[at + i] - p.f0[at + i] : p.f0[at + i];
    }
    scale_block(p.tolerance, size.value, at, length, value.value);
    add_squares(value.value, length, lanes1);
    if (p.f1 == nullptr) {
      for (int i = 0; i < length; ++i) value.value[i] = p.y0[at + i];
      scale_block(p.tolerance, size.value, at, length, value.value);
      add_squares(value.value, length, lanes0);
    }
  }
  partial.sum_squares[0] = sum_lanes(p.f1 != nullptr ? lanes1 : lanes0);
  partial.sum_squares[1] = sum_lanes(lanes1);
  return partial;
}

template <typename T>
double dot(const T* x, const T* y, int64_t size) {
  double lanes[kNormLanes] = {};
  int64_t i = 0;
  for (; i + kNormLanes <= size; i += kNormLanes) {
    for (int lane = 0; lane < kNormLanes; ++lane) {
      lanes[lane] += double(x[i + lane]) * double(y[i + lane]);
    }
  }
  for (; i < size; ++i) lanes[i % kNormLanes] += double(x[i]) * double(y[i]);
  return sum_lanes(lanes);
}

template <typename T>
void broyden_step(const BroydenParams<T>& p) {
  T* __restrict step = p.step;
  for (int64_t i = 0; i < p.size; ++i) step[i] = -p.residual[i];
  for (int64_t j = 0; j < p.count; ++j) {
    const T* s = p.steps[j];
    const double along = dot(s, step, p.size) / dot(s, s, p.size);
    if (j + 1 < p.count) {
      const T* __restrict next = p.steps[j + 1];
      const T weight = T(along);
      for (int64_t i = 0; i < p.size; ++i) step[i] += next[i] * weight;
    } else {
      const T scale = T(1. / (1. - along));
      for (int64_t i = 0; i < p.size; ++i) step[i] *= scale;
    }
  }
}

template <typename T>
void sample_probes(const ProbeParams<T>& p, int64_t begin, int64_t end) {
  const int per_block = p.gaussian ? kGaussianPerBlock : kRademacherPerBlock;
  for (int64_t sample = begin; sample < end; ++sample) {
    for (int64_t probe = 0; probe < p.probes; ++probe) {
      T* out = p.out + (probe * p.batch + sample) * p.features;
      for (int64_t at = 0; at < p.features; at += per_block) {
        const Philox4 block =
            philox(p.seed, uint64_t(p.keys[sample]), uint32_t(probe), uint32_t(at / per_block));
        const int length = p.features - at < per_block ? int(p.features - at) : per_block;
        for (int i = 0; i < length; ++i) {
          out[at + i] = p.gaussian ? gaussian<T>(block, i) : rademacher<T>(block, i);
        }
      }
    }
  }
}

template <typename T>
void hash_keys(const KeyParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    p.keys[sample] = int64_t(hash_row(p.rows + sample * p.features, p.features));
  }
}

#define PYCNF_QUOTE_(x) #x
#define PYCNF_QUOTE(x) PYCNF_QUOTE_(x)

}  // namespace

extern const CpuKernels kKernels = {
    PYCNF_QUOTE(PYCNF_ISA) + sizeof("cpu_") - 1,
    {stage<float>, finish<float>, interpolate<float>, initial<float>, broyden_step<float>,
     sample_probes<float>, hash_keys<float>},
    {stage<double>, finish<double>, interpolate<double>, initial<double>, broyden_step<double>,
     sample_probes<double>, hash_keys<double>},
};

}  // namespace PYCNF_ISA
}  // namespace pycnf
