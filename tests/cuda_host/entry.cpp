// The launchers of csrc/cuda as functions of C, for tests/host_kernels.py. "Device memory" is the
// host's. What csrc/torch/ops_cuda.cpp does between op and launcher is done here, without torch.

#include <vector>

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace {

using pycnf::NormLayout;
using pycnf::NormPartial;
using pycnf::NormPiece;
using pycnf::WeightedRows;

// Terms of a sum; the weights are still to be multiplied by h.
struct Terms {
  const void* const* rows;
  const double* weights;
  int count;
  bool ordered;
};

struct Segments {
  const int64_t* borders;  // pairs (begin, end)
  int64_t count;           // of borders
  int64_t chunk;           // of norm ranges, 0: the usual
};

// The tensors of core/attempt.h's AttemptPlan.
struct Plan {
  double* attempt;
  void* times;
  void* h;
  const double* outputs;
  const double* stops;
  double* report;
  int64_t output_count, stop_count, report_count;
};

// The tensors of core/flow_attempt.h's FlowPlan.
struct FlowTensors {
  double* attempt;
  void* times;
  void* h;
  double* tape;
  double* report;
  int64_t capacity;
};

// Calls body(T()) with T = double if `wide`, else float.
template <typename Body>
cudaError_t in_dtype(bool wide, const Body& body) {
  return wide ? body(double()) : body(float());
}

// The same for the dtypes of time and state; time is not the coarser of the two.
template <typename Body>
cudaError_t in_types(bool wide_time, bool wide, const Body& body) {
  if (wide) return body(double(), double());
  return wide_time ? body(double(), float()) : body(float(), float());
}

// What a state is stored in.
enum Storage { kFloat, kDouble, kHalf, kBfloat16 };

// Calls body(stored number, number to compute with).
template <typename Body>
cudaError_t in_storage(Storage storage, const Body& body) {
  if (storage == kHalf) return body(__half(), float());
  if (storage == kBfloat16) return body(__nv_bfloat16(), float());
  return storage == kDouble ? body(double(), double()) : body(float(), float());
}

template <typename S, typename T = S>
WeightedRows<S, T> weighted(const Terms& terms, double h) {
  WeightedRows<S, T> rows = {};
  rows.count = terms.count;
  rows.ordered = terms.ordered;
  for (int j = 0; j < terms.count; ++j) {
    rows.rows[j] = static_cast<const S*>(terms.rows[j]);
    rows.weights[j] = T(terms.weights[j]) * T(h);
  }
  return rows;
}

template <typename T>
pycnf::Tolerance<T> in_dtype_of(const pycnf::Tolerance<double>& x) {
  return {T(x.rtol), T(x.atol), x.rtol_each, x.atol_each, x.rtol_device, x.atol_device};
}

// A layout and the memory that it needs.
class Norm {
 public:
  Norm(const Segments& segments, int64_t size) {
    layout_.chunk = segments.chunk > 0 ? segments.chunk : pycnf::norm_chunk(size);
    int64_t at = 0;
    for (int64_t s = 0; s + 1 < segments.count; s += 2) {
      const int64_t begin = segments.borders[s], end = segments.borders[s + 1];
      if (at < begin) add(at, begin, -1);
      // Of the empty segments only the first matters: its RMS is NaN.
      if (begin < end || s == 0) add(begin, end, int32_t(s / 2));
      at = end;
    }
    if (at < size) add(at, size, -1);
    layout_.pieces = int32_t(pieces_.size());
    // Beyond what is asked for, so that nobody is handed null; all bytes are NaN's.
    partials_.resize(sizeof(NormPartial) * size_t(layout_.ranges) + 1, 0xff);
  }

  cudaError_t store_pieces() {
    if (pieces_.size() <= size_t(pycnf::kFewPieces)) {
      std::copy(pieces_.begin(), pieces_.end(), layout_.few);
      return cudaSuccess;
    }
    table_.resize(pieces_.size());
    layout_.table = table_.data();
    return pycnf::launch_store_pieces(pieces_.data(), layout_.pieces, table_.data(), nullptr);
  }

  const NormLayout& layout() const { return layout_; }
  NormPartial* partials() { return reinterpret_cast<NormPartial*>(partials_.data()); }

 private:
  void add(int64_t begin, int64_t end, int32_t segment) {
    pieces_.push_back({begin, end, segment, layout_.ranges});
    layout_.ranges += int32_t(pycnf::ranges_of_piece(begin, end, layout_.chunk));
  }

  NormLayout layout_ = {};
  std::vector<NormPiece> pieces_, table_;
  std::vector<unsigned char> partials_;
};

}  // namespace

// Rows and states are in `storage`, or of `wide`'s dtype. Every function returns the launcher's error.
extern "C" {

cudaError_t stage(Storage storage, const void* y0, Terms terms, const void* fresh, void* fresh_row,
                  void* out, double h, int64_t size) {
  return in_storage(storage, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const pycnf::StageParams<S, T> p = {static_cast<const S*>(y0), weighted<S, T>(terms, h),
                                        static_cast<const S*>(fresh), static_cast<S*>(fresh_row),
                                        static_cast<S*>(out)};
    return pycnf::launch_stage(p, size, nullptr);
  });
}

cudaError_t finish(Storage storage, const void* y0, Terms solution, Terms error, const void* fresh,
                   void* fresh_row, void* y1, void* ratio, double h,
                   pycnf::Tolerance<double> tolerance, Segments segments, double* result,
                   int64_t size) {
  Norm norm(segments, size);
  if (const auto failure = norm.store_pieces(); failure != cudaSuccess) return failure;
  return in_storage(storage, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const pycnf::FinishParams<S, T> p = {static_cast<const S*>(y0),  weighted<S, T>(solution, h),
                                         weighted<S, T>(error, h),   static_cast<const S*>(fresh),
                                         static_cast<S*>(fresh_row), static_cast<S*>(y1),
                                         static_cast<S*>(ratio),     in_dtype_of<T>(tolerance)};
    return pycnf::launch_finish(p, norm.layout(), norm.partials(), result, nullptr);
  });
}

// ---- steps that the device chooses: h is in device memory ----

cudaError_t attempt_stage(bool wide, const void* y0, Terms terms, const void* fresh,
                          void* fresh_row, void* out, const void* h, int64_t size) {
  return in_dtype(wide, [&](auto zero) {
    using T = decltype(zero);
    pycnf::StageParams<T> p = {static_cast<const T*>(y0), weighted<T>(terms, 1.),
                               static_cast<const T*>(fresh), static_cast<T*>(fresh_row),
                               static_cast<T*>(out)};
    p.terms.scale = static_cast<const T*>(h);
    return pycnf::launch_stage(p, size, nullptr);
  });
}

cudaError_t attempt_finish(bool wide, const void* y0, Terms solution, Terms error,
                           const void* fresh, void* fresh_row, void* y1, const void* h,
                           pycnf::Tolerance<double> tolerance, Segments segments, double* result,
                           int64_t size) {
  Norm norm(segments, size);
  if (const auto failure = norm.store_pieces(); failure != cudaSuccess) return failure;
  return in_dtype(wide, [&](auto zero) {
    using T = decltype(zero);
    pycnf::FinishParams<T> p = {static_cast<const T*>(y0),
                                weighted<T>(solution, 1.),
                                weighted<T>(error, 1.),
                                static_cast<const T*>(fresh),
                                static_cast<T*>(fresh_row),
                                static_cast<T*>(y1),
                                nullptr,
                                in_dtype_of<T>(tolerance)};
    p.solution.scale = p.error.scale = static_cast<const T*>(h);
    return pycnf::launch_finish(p, norm.layout(), norm.partials(), result, nullptr);
  });
}

cudaError_t control(bool wide_time, bool wide, int moment, Plan plan, const double* rule,
                    const double* nodes, int node_count, const double* norms) {
  return in_types(wide_time, wide, [&](auto time, auto zero) {
    using T = decltype(zero);
    pycnf::AttemptPlan<T> p = {};
    p.rule = {rule[0],      rule[1],      rule[2],      rule[3],    rule[4], rule[5],
              int(rule[6]), int(rule[7]), rule[8] != 0, node_count, {}};
    std::copy(nodes, nodes + node_count, p.rule.c);
    p.outputs = plan.outputs;
    p.output_count = plan.output_count;
    p.stops = plan.stops;
    p.stop_count = plan.stop_count;
    p.attempt = reinterpret_cast<pycnf::Attempt*>(plan.attempt);
    p.times = static_cast<T*>(plan.times);
    p.h = static_cast<T*>(plan.h);
    p.report = plan.report;
    p.report_count = plan.report_count;
    return pycnf::launch_control<decltype(time)>(pycnf::Moment(moment), p, norms, nullptr);
  });
}

cudaError_t advance(bool wide_time, bool wide, Plan plan, void* y, const void* y1, void* first_row,
                    const void* last_row, Terms middle, void* solution, int64_t size) {
  return in_types(wide_time, wide, [&](auto time, auto zero) {
    using T = decltype(zero);
    pycnf::AdvanceParams<T> p = {};
    p.attempt = reinterpret_cast<const pycnf::Attempt*>(plan.attempt);
    p.outputs = plan.outputs;
    p.y = static_cast<T*>(y);
    p.y1 = static_cast<const T*>(y1);
    p.first_row = static_cast<T*>(first_row);
    p.last_row = static_cast<const T*>(last_row);
    p.middle = weighted<T>(middle, 1.);
    p.h = p.middle.scale = static_cast<const T*>(plan.h) + 1;
    p.solution = static_cast<T*>(solution);
    p.size = size;
    return pycnf::launch_advance<decltype(time)>(p, nullptr);
  });
}

cudaError_t flow_control(bool wide, int moment, FlowTensors tensors, const double* rule,
                         const double* nodes, int node_count, const double* norms) {
  return in_dtype(wide, [&](auto zero) {
    using T = decltype(zero);
    pycnf::FlowPlan<T> p = {};
    p.rule.control.max_step = rule[0];
    p.rule.control.safety = rule[1];
    p.rule.control.ifactor = rule[2];
    p.rule.control.dfactor = rule[3];
    p.rule.control.max_num_steps = int64_t(rule[4]);
    p.rule.order = int(rule[5]);
    p.rule.nodes = node_count;
    std::copy(nodes, nodes + node_count, p.rule.c);
    p.attempt = reinterpret_cast<pycnf::FlowAttempt*>(tensors.attempt);
    p.times = static_cast<T*>(tensors.times);
    p.h = static_cast<T*>(tensors.h);
    p.tape = tensors.tape;
    p.capacity = tensors.capacity;
    p.report = tensors.report;
    return pycnf::launch_flow_control(pycnf::FlowMoment(moment), p, norms, nullptr);
  });
}

cudaError_t flow_advance(bool wide, FlowTensors tensors, void* y, const void* y1, void* first_row,
                         const void* last_row, void* tape, int64_t kept, int64_t size) {
  return in_dtype(wide, [&](auto zero) {
    using T = decltype(zero);
    pycnf::FlowAdvanceParams<T> p = {};
    p.attempt = reinterpret_cast<const pycnf::FlowAttempt*>(tensors.attempt);
    p.y = static_cast<T*>(y);
    p.y1 = static_cast<const T*>(y1);
    p.first_row = static_cast<T*>(first_row);
    p.last_row = static_cast<const T*>(last_row);
    p.tape = tensors.capacity > 0 ? static_cast<T*>(tape) : nullptr;
    p.kept = kept;
    p.size = size;
    return pycnf::launch_flow_advance(p, nullptr);
  });
}

cudaError_t initial(Storage storage, const void* y0, const void* f0, const void* f1,
                    pycnf::Tolerance<double> tolerance, Segments segments, double* result,
                    int64_t size) {
  Norm norm(segments, size);
  if (const auto failure = norm.store_pieces(); failure != cudaSuccess) return failure;
  return in_storage(storage, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const pycnf::InitialParams<S, T> p = {static_cast<const S*>(y0), static_cast<const S*>(f0),
                                          static_cast<const S*>(f1), in_dtype_of<T>(tolerance)};
    return pycnf::launch_initial(p, norm.layout(), norm.partials(), result, nullptr);
  });
}

cudaError_t interpolate(Storage storage, const void* y0, const void* y1, const void* f0,
                        const void* f1, Terms middle, double h, const double* x, int64_t times,
                        void* out, int64_t size) {
  return in_storage(storage, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const std::vector<T> points(x, x + times);
    const pycnf::InterpolateParams<S, T> p = {static_cast<const S*>(y0),
                                              static_cast<const S*>(y1),
                                              static_cast<const S*>(f0),
                                              static_cast<const S*>(f1),
                                              weighted<S, T>(middle, h),
                                              T(h),
                                              points.data(),
                                              times,
                                              static_cast<S*>(out),
                                              size};
    return pycnf::launch_interpolate(p, nullptr);
  });
}

cudaError_t store_values(bool wide, const double* values, int64_t count, void* out) {
  return in_dtype(wide, [&](auto zero) {
    return pycnf::launch_store_values(values, count, static_cast<decltype(zero)*>(out), nullptr);
  });
}

cudaError_t store_pieces(const NormPiece* pieces, int32_t count, NormPiece* table) {
  return pycnf::launch_store_pieces(pieces, count, table, nullptr);
}

cudaError_t hash_keys(bool wide, const void* rows, int64_t batch, int64_t features, int64_t* keys) {
  return in_dtype(wide, [&](auto zero) {
    using T = decltype(zero);
    const pycnf::KeyParams<T> p = {static_cast<const T*>(rows), features, keys};
    return pycnf::launch_hash_keys(p, batch, nullptr);
  });
}

cudaError_t sample_probes(bool wide, const int64_t* keys, uint64_t seed, int64_t probes,
                          int64_t batch, int64_t features, bool gaussian, void* out) {
  return in_dtype(wide, [&](auto zero) {
    using T = decltype(zero);
    const pycnf::ProbeParams<T> p = {
        keys, seed, probes, batch, features, gaussian, static_cast<T*>(out)};
    return pycnf::launch_sample_probes(p, nullptr);
  });
}

}  // extern "C"
