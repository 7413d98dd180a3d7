// A narrow multilayer perceptron over one tile of samples: value and divergence. To be included
// within a namespace without a name, after cuda/scalar.cuh, core/activation.h and
// cuda/tile_tensor.cuh.
//
// Tangents go through the network one at a time: the first beside the values, if it is the only one,
// else each after them, by the slopes that the values left. The closed form of the divergence is one
// tangent that starts as all ones behind the first layer; see cpu/mlp_tile.h.
//
// Index names: l layers, o outputs and i inputs of one, d features, s samples of the tile, c columns,
// k tangents.

// A block's view of the tile that it works on.
template <typename T>
struct Tile {
  const MlpSolve<T>& solve;
  const TileNoise<T>& noise;
  const TileLayout& layout;
  T* shared;
  int64_t batch;
  int64_t index;
  const int64_t* lanes;  // the sample of each column, -1 for none; null: the index-th so many

  __device__ T* at(int place) const { return known_shared(shared + place); }
  __device__ Columns<T> columns(int place) const { return {at(place), layout.stride}; }
  __device__ int samples() const { return layout.samples; }
  // A number that an output, or a time feature, has at the time of a sample.
  __device__ T timed(int place, int o, int s) const {
    return shared[place + (layout.timed == 1 ? o : o * layout.timed + s)];
  }
  __device__ int features() const { return int(solve.field.features); }
  __device__ int last() const { return solve.field.layers - 1; }
  __device__ int out(int l) const { return int(solve.field.layer[l].out); }
  __device__ int in(int l) const { return int(solve.field.layer[l].in); }
  // Columns that have no sample have copies of one, which do not count.
  __device__ int64_t sample(int s) const {
    if (lanes != nullptr) return lanes[s] < 0 ? 0 : lanes[s];
    const int64_t b = index * layout.samples + s;
    return b < batch ? b : batch - 1;
  }
  __device__ bool counts(int s) const {
    return lanes != nullptr ? lanes[s] >= 0 : index * layout.samples + s < batch;
  }
};

// Calls body(i, j) for all i < rows, j < width, neighbouring threads with neighbouring j.
template <typename Body>
__device__ inline void for_each_place(int rows, int width, const Body& body) {
  for (int place = threadIdx.x; place < rows * width; place += blockDim.x) {
    body(place / width, place % width);
  }
}

// Numbers of neighbouring samples, as many as a thread moves in one access.
template <typename T>
using Wide = Group<T, kFull<T>>;

// Calls body(row, s) for all rows and groups of samples that begin with s, neighbouring threads with
// neighbouring groups.
template <typename T, typename Body>
__device__ inline void for_each_group_of(const Tile<T>& tile, int rows, const Body& body) {
  const int shift = tile.layout.group_shift, count = rows << shift, mask = (1 << shift) - 1;
  for (int place = threadIdx.x; place < count; place += blockDim.x) {
    body(place >> shift, (place & mask) * kFull<T>);
  }
}

// Calls body(i) for groups of neighbouring numbers that begin with i, of a multiple of such groups.
template <typename T, typename Body>
__device__ inline void for_each_group_in(int numbers, const Body& body) {
  constexpr int kWide = kFull<T>;
  for (int i = threadIdx.x * kWide; i < numbers; i += blockDim.x * kWide) body(i);
}

template <typename T>
__device__ inline Wide<T> fetch_group(const T* from) {
  return fetch<kFull<T>>(from);
}

// What an output has at the times of a group of samples.
template <typename T>
__device__ inline Wide<T> timed_group(const T* from, int timed, int o, int s) {
  return timed == 1 ? filled<T, kFull<T>>(from[o]) : fetch_group(from + o * timed + s);
}

// Calls body(std::integral_constant<Activation, kind>()).
template <typename Body>
__device__ inline void with_activation(Activation kind, const Body& body) {
#define PYCNF_CASE(name) \
  case Activation::name: \
    return body(std::integral_constant<Activation, Activation::name>())
  switch (kind) {
    PYCNF_CASE(kTanh);
    PYCNF_CASE(kSoftplus);
    PYCNF_CASE(kElu);
    PYCNF_CASE(kSilu);
    PYCNF_CASE(kSelu);
    PYCNF_CASE(kRelu);
    PYCNF_CASE(kGelu);
    PYCNF_CASE(kSin);
    PYCNF_CASE(kSquare);
    PYCNF_CASE(kIdentity);
  }
#undef PYCNF_CASE
}

// Which probes are in shared memory: a tangent of a tile, -1 for none.
template <typename T>
__device__ inline int64_t* probe_held(const TileLayout& layout, T* shared) {
  return reinterpret_cast<int64_t*>(shared + layout.held);
}

// ---- what all tiles share -----------------------------------------------------------------------

// Whether the closed form's M is another one at another time.
template <typename T>
__device__ inline bool mix_depends_on_time(const MlpSolve<T>& solve) {
  return solve.field.layer[solve.field.layers - 1].gate_weight != nullptr;
}

// M and, if wanted, N of core/mlp.h at the time of the gates; see cpu/mlp_trace.h.
template <typename T>
__device__ void mix(const MlpSolve<T>& solve, const TileLayout& layout, T* shared) {
  const auto& field = solve.field;
  const int last = field.layers - 1, features = int(field.features);
  const T* first = shared + layout.weight[0];      // [D, first_stride]
  const T* behind = shared + layout.weight[last];  // [in, last_stride]
  const T* gate = mix_depends_on_time(solve) ? shared + layout.gate[last] : nullptr;
  const int first_stride = layout.weight_stride[0], last_stride = layout.weight_stride[last];
  const auto trace = [&](int j, int i) {
    T sum = T(0);
    for (int d = 0; d < features; ++d) {
      const T s = gate != nullptr ? gate[d * layout.timed] : T(1);
      sum += first[d * first_stride + j] * s * behind[i * last_stride + d];
    }
    return sum;
  };
  const int width = int(field.layer[0].out);
  if (last == 1) {
    for_each_place(1, width, [&](int, int j) { shared[layout.mixed + j] = trace(j, j); });
    return;
  }
  const int stride = layout.weight_stride[1];
  // Rows of the last weight are read by all lanes of a warp at once.
  for_each_place(stride, width, [&](int i, int j) {
    const int place = j * stride + i;
    const T n = i < field.layer[1].out ? trace(j, i) : T(0);
    if (layout.unmixed >= 0) shared[layout.unmixed + place] = n;
    shared[layout.mixed + place] = shared[layout.weight[1] + place] * n;
  });
}

// What stays the same over a solve: weights, and M where no gate changes it.
template <typename T>
__device__ void load_weights(const MlpSolve<T>& solve, const TileLayout& layout, T* shared) {
  for (int l = 0; l < solve.field.layers; ++l) {
    const auto& layer = solve.field.layer[l];
    const int in = int(layer.in), out = int(layer.out), stride = layout.weight_stride[l];
    T* const weight = shared + layout.weight[l];
    for_each_place(out, in, [&](int o, int i) {
      weight[i * stride + o] = layer.weight[o * layer.weight_stride + i];
    });
    for_each_place(in, stride - out, [&](int i, int o) { weight[i * stride + out + o] = T(0); });
  }
  if (has_probes(solve) && threadIdx.x == 0) *probe_held(layout, shared) = -1;
  if (!solve.closed_form || mix_depends_on_time(solve)) return;
  barrier();
  mix(solve, layout, shared);
}

// Σ_f weight[f, o] τ_f + bias_o, features `width` apart.
template <typename T>
__device__ inline T linear_in_time(const T* weight, const T* bias, const T* tau, int features,
                                   int width, int out, int o) {
  T sum = bias != nullptr ? bias[o] : T(0);
  for (int f = 0; weight != nullptr && f < features; ++f) {
    sum += weight[f * out + o] * tau[f * width];
  }
  return sum;
}

// The network at a time, or at times of the samples' own, `times[s * stride]`. The caller has put a
// barrier between the last use of another time's and this, and puts one behind it.
template <typename T>
__device__ void set_time(const MlpSolve<T>& solve, const TileLayout& layout, T* shared,
                         const T* times, int stride) {
  const auto& field = solve.field;
  const int features = int(field.time_features), half = features / 2, width = layout.timed;
  T* const tau = shared + layout.tau;
  for_each_place(features, width, [&](int f, int s) {
    const T time = times[s * stride];
    if (!field.fourier) {
      tau[s] = time;
    } else {
      const T angle = time * (T((f < half ? f : f - half) + 1) * T(3.14159265358979323846));
      tau[f * width + s] = f < half ? cosine(angle) : sine(angle);
    }
  });
  barrier();
  for (int l = 0; l < field.layers; ++l) {
    const auto& layer = field.layer[l];
    const int out = int(layer.out);
    for_each_place(out, width, [&](int o, int s) {
      const auto linear = [&](const T* weight, const T* bias) {
        return linear_in_time<T>(weight, bias, tau + s, features, width, out, o);
      };
      T gate = T(1), shift = linear(layer.shift_weight, nullptr);
      if (layer.gate_weight != nullptr)
        gate = sigmoid<T>(linear(layer.gate_weight, layer.gate_bias));
      if (layer.bias != nullptr) shift += gate * layer.bias[o];
      shared[layout.gate[l] + o * width + s] = gate;
      shared[layout.shift[l] + o * width + s] = shift;
    });
  }
  if (!solve.closed_form || !mix_depends_on_time(solve)) return;
  barrier();
  mix(solve, layout, shared);
}

// ---- layers -------------------------------------------------------------------------------------

// Which columns a pass through the network has.
struct Pass {
  bool values;
  bool tangents;

  __device__ int first(int samples) const { return values ? 0 : samples; }
  __device__ int count(int samples) const { return (int(values) + int(tangents)) * samples; }
};

// Makes the key of a sample, where it is a hash.
template <typename T>
__device__ void make_key(const Tile<T>& tile, int s) {
  const auto& noise = tile.noise;
  if (!tile.solve.drawn || noise.rows == nullptr || !tile.counts(s)) return;
  const int64_t b = tile.sample(s), features = tile.features();
  noise.keys[b] = int64_t(hash_row(noise.rows + b * features, features));
}

// Where columns have other samples than before, probes that are held are no longer theirs.
template <typename T>
__device__ void drop_probe(const Tile<T>& tile) {
  if (has_probes(tile.solve)) *probe_held(tile.layout, tile.shared) = -1;
}

// Sees to it that the k-th tangent's probes are in shared memory. Begins, and where they were not
// there ends, with a barrier.
template <typename T>
__device__ void hold_probe(const Tile<T>& tile, int k) {
  const auto& solve = tile.solve;
  if (!has_probes(solve)) return;
  int64_t& held = *probe_held(tile.layout, tile.shared);
  const int64_t wanted = tile.index * solve.tangents + k;
  const bool there = held == wanted;
  barrier();
  if (there) return;
  const auto& noise = tile.noise;
  const int features = tile.features(), samples = tile.samples();
  T* const probe = tile.at(tile.layout.probe);
  if (!solve.drawn) {
    const T* const given = solve.probe + k * tile.batch * features;
    for_each_place(samples, features, [&](int s, int d) {
      probe[d * samples + s] = given[tile.sample(s) * features + d];
    });
  } else {
    for_each_place(ceil_div(features, kProbeGroup), samples, [&](int group, int s) {
      const int first = group * kProbeGroup;
      T value[kProbeGroup];
      // Who has no sample has no key, which somebody else may be making.
      const uint64_t key = tile.counts(s) ? uint64_t(noise.keys[tile.sample(s)]) : 0;
      probe_group(noise.seed, key, uint32_t(k), first, noise.gaussian, value);
#pragma unroll
      for (int i = 0; i < kProbeGroup; ++i) {
        if (first + i < features) probe[(first + i) * samples + s] = value[i];
      }
    });
  }
  if (threadIdx.x == 0) held = wanted;
  barrier();
}

// Values of the k-th tangent, which is held, at feature d.
template <typename T>
__device__ inline T probe_at(const Tile<T>& tile, int k, int d, int s) {
  if (!has_probes(tile.solve)) return T(k == d);
  return tile.at(tile.layout.probe)[d * tile.samples() + s];
}

template <typename T>
__device__ inline Wide<T> probes_at(const Tile<T>& tile, int k, int d, int s) {
  if (!has_probes(tile.solve)) return filled<T, kFull<T>>(T(k == d));
  return fetch_group(tile.at(tile.layout.probe) + d * tile.samples() + s);
}

// What enters the network: the state and the k-th tangent, where it enters there.
template <typename T>
__device__ void load_inputs(const Tile<T>& tile, const Pass& pass, int k, Columns<T> x) {
  const int samples = tile.samples();
  const T* const z = tile.at(tile.layout.z);
  const bool tangents = pass.tangents && !tile.solve.closed_form;
  if (tangents) hold_probe(tile, k);
  for_each_group_of(tile, tile.features(), [&](int d, int s) {
    if (pass.values) store(x.row(d) + s, fetch_group(z + d * samples + s));
    if (tangents) store(x.row(d) + samples + s, probes_at(tile, k, d, s));
  });
}

// W x of a layer; for the closed form's tangents M x instead, or nothing where it has no product.
template <Precision kPrecision, typename T>
__device__ void layer_product(const Tile<T>& tile, int l, const Pass& pass, Columns<T> x,
                              Columns<T> y) {
  const auto& layout = tile.layout;
  const int samples = tile.samples(), first = pass.first(samples);
  const bool closed = tile.solve.closed_form;
  const int count = closed ? (pass.values ? samples : 0) : pass.count(samples);
  product<kPrecision>(tile.at(layout.weight[l]), layout.weight_stride[l], tile.out(l), tile.in(l),
                      x.from(first), count, y.from(first));
  if (closed && pass.tangents && l == 1 && tile.last() == 2) {
    product<kPrecision>(tile.at(layout.mixed), layout.weight_stride[1], tile.out(1), tile.in(1),
                        x.from(samples), samples, y.from(samples));
  }
  const T* const context = tile.solve.context;
  if (l > 0 || context == nullptr || !pass.values) return;
  barrier();
  for_each_place(samples, tile.out(0),
                 [&](int s, int o) { y.row(o)[s] += context[tile.sample(s) * tile.out(0) + o]; });
}

// The tangents' products of a layer; behind the first the closed form's are all ones.
template <typename T>
__device__ inline Wide<T> tangent_products(const Tile<T>& tile, int l, const Columns<T>& p, int o,
                                           int s) {
  if (l == 0 && tile.solve.closed_form) return filled<T, kFull<T>>(T(1));
  return fetch_group(p.row(o) + tile.samples() + s);
}

// From a hidden layer's products to its outputs; x may be p.
template <typename T>
__device__ void activate_layer(const Tile<T>& tile, int l, const Pass& pass, Columns<T> p,
                               Columns<T> x) {
  const auto& layout = tile.layout;
  const int samples = tile.samples(), timed = layout.timed;
  T* const slopes = layout.slope[l] >= 0 ? tile.at(layout.slope[l]) : nullptr;
  if (!pass.values) {
    for_each_group_of(tile, tile.out(l), [&](int o, int s) {
      const Wide<T> scale = fetch_group(slopes + o * samples + s);
      Wide<T> q = fetch_group(p.row(o) + samples + s);
#pragma unroll
      for (int e = 0; e < kFull<T>; ++e) q.value[e] *= scale.value[e];
      store(x.row(o) + samples + s, q);
    });
    return;
  }
  const T* const gates = tile.at(layout.gate[l]);
  const T* const shifts = tile.at(layout.shift[l]);
  with_activation(tile.solve.field.activation, [&](auto kind) {
    for_each_group_of(tile, tile.out(l), [&](int o, int s) {
      const Wide<T> gate = timed_group(gates, timed, o, s);
      const Wide<T> shift = timed_group(shifts, timed, o, s);
      Wide<T> a = fetch_group(p.row(o) + s), scale;
#pragma unroll
      for (int e = 0; e < kFull<T>; ++e) {
        T slope;
        const T h = gate.value[e] * a.value[e] + shift.value[e];
        a.value[e] = activate<decltype(kind)::value, T>(h, slope);
        scale.value[e] = gate.value[e] * slope;
      }
      if (slopes != nullptr) store(slopes + o * samples + s, scale);
      if (pass.tangents) {
        const Wide<T> q = tangent_products(tile, l, p, o, s);
#pragma unroll
        for (int e = 0; e < kFull<T>; ++e) scale.value[e] *= q.value[e];
        store(x.row(o) + samples + s, scale);
      }
      store(x.row(o) + s, a);
    });
  });
}

// Goes through all layers. `product_of(l)` is where a layer's products go, `input_of(l)` where its
// inputs are, those of the first layer already there. Ends with a barrier.
template <Precision kPrecision, typename T, typename Products, typename Inputs>
__device__ void through_layers(const Tile<T>& tile, const Pass& pass, const Products& product_of,
                               const Inputs& input_of) {
  for (int l = 0; l <= tile.last(); ++l) {
    layer_product<kPrecision>(tile, l, pass, input_of(l), product_of(l));
    barrier();
    if (l == tile.last()) return;
    activate_layer(tile, l, pass, product_of(l), input_of(l + 1));
    barrier();
  }
}

// ---- the field ----------------------------------------------------------------------------------

// Of two terms of every sample: body(i, s, first, second) adds those of i < count to two sums, and
// done(s, first, second) takes them. Neighbouring threads share a sample.
template <typename T, typename Body, typename Done>
__device__ void sum_for_samples(int samples, int count, const Body& body, const Done& done) {
  const int part = int(threadIdx.x) % kSharers;
  for (int begin = 0; begin < samples; begin += int(blockDim.x) / kSharers) {
    const int s = begin + int(threadIdx.x) / kSharers;
    T first = T(0), second = T(0);
    for (int i = part; s < samples && i < count; i += kSharers) body(i, s, first, second);
    first = shared_sum<kSharers>(first);
    second = shared_sum<kSharers>(second);
    if (part == 0 && s < samples) done(s, first, second);
  }
}

// Adds what a tangent gives to the sums of its samples: the divergence and the Jacobian's squares.
// A sample's thread is always the same.
template <typename T>
__device__ void add_divergence(const Tile<T>& tile, int k, Columns<T> p, Columns<T> before) {
  const auto& solve = tile.solve;
  const auto& layout = tile.layout;
  const int samples = tile.samples(), last = tile.last();
  T* const sums = tile.at(layout.sums);
  const auto take = [&](int s, T sum, T squares) {
    sums[s] += sum * solve.probe_weight;
    sums[samples + s] += squares * solve.probe_weight;
  };
  if (solve.closed_form) {
    const T* const mixed = last == 1 ? tile.at(layout.mixed) : nullptr;
    sum_for_samples<T>(
        samples, tile.in(last),
        [&](int i, int s, T& sum, T&) {
          const T d = before.row(i)[samples + s];
          sum += mixed != nullptr ? d * mixed[i] : d;
        },
        take);
    return;
  }
  // Of a unit vector's image the divergence has one number.
  const bool one = !has_probes(solve) && !solve.jacobian;
  sum_for_samples<T>(
      samples, one ? 1 : tile.features(),
      [&](int i, int s, T& sum, T& squares) {
        const int d = one ? k : i;
        const T image = tile.timed(layout.gate[last], d, s) * p.row(d)[samples + s];
        sum += probe_at(tile, k, d, s) * image;
        squares += image * image;
      },
      take);
}

// The rates k [rows, samples] of the state that is in its place, at the time that is set; those of
// extras that are not wanted are 0. Begins and ends with a barrier. Much code, which a kernel
// has once.
template <Precision kPrecision, typename T>
__device__ __noinline__ void evaluate(const Tile<T>& tile, bool with_divergence, T* rates) {
  const auto& solve = tile.solve;
  const auto& layout = tile.layout;
  const int samples = tile.samples(), last = tile.last(), features = tile.features();
  const int tangents = with_divergence ? int(solve.tangents) : 0;
  // Layers read one of two buffers and write the other; outputs stay where the products were.
  const auto x = [&](int l) { return tile.columns(layout.x[l % 2]); };
  const auto y = [&](int l) { return tile.columns(layout.x[(l + 1) % 2]); };
  T* const sums = tile.at(layout.sums);
  T* const extras = rates + features * samples;

  barrier();
  for (int k = 0; k == 0 || k < tangents; ++k) {
    const Pass pass = {k == 0, k < tangents};
    load_inputs(tile, pass, k, x(0));
    if (k == 0) for_each_place(2, samples, [&](int i, int s) { sums[i * samples + s] = T(0); });
    barrier();
    through_layers<kPrecision>(tile, pass, y, x);
    if (pass.values) {
      const T* const gates = tile.at(layout.gate[last]);
      const T* const shifts = tile.at(layout.shift[last]);
      for_each_group_of(tile, features, [&](int d, int s) {
        const Wide<T> gate = timed_group(gates, layout.timed, d, s);
        const Wide<T> shift = timed_group(shifts, layout.timed, d, s);
        Wide<T> f = fetch_group(y(last).row(d) + s);
#pragma unroll
        for (int e = 0; e < kFull<T>; ++e) {
          f.value[e] = gate.value[e] * f.value[e] + shift.value[e];
        }
        store(rates + d * samples + s, f);
      });
    }
    if (pass.tangents) add_divergence(tile, k, y(last), x(last));
    barrier();
  }
  const int rows = int(extra_rows(solve));
  if (rows == 0) return;
  sum_for_samples<T>(
      samples, solve.kinetic && with_divergence ? features : 0,
      [&](int d, int s, T& squares, T&) {
        const T f = rates[d * samples + s];
        squares += f * f;
      },
      [&](int s, T squares, T) {
        extras[s] = with_divergence ? sums[s] * solve.sign : T(0);
        if (solve.kinetic) extras[samples + s] = squares * solve.kinetic_weight;
        if (solve.jacobian) {
          extras[(rows - 1) * samples + s] =
              with_divergence ? sums[samples + s] * solve.jacobian_weight : T(0);
        }
      });
  barrier();
}

// ---- a step -------------------------------------------------------------------------------------

// Whether the extras' rates at a stage have a weight in the solution or in the error.
template <typename T>
__device__ inline bool needs_divergence(const MlpSolve<T>& solve, const Tableau& tableau,
                                        int stage) {
  return solve.tangents > 0 && (tableau.b[stage] != 0 || tableau.e[stage] != 0 || stage == 0 ||
                                (stage == tableau.stages - 1 && tableau.solution_is_last_stage));
}

// A tile's derivatives at all stages, [rows, samples] each.
template <typename T>
struct StageRows {
  T* first;
  int64_t stride;
  int swapped;  // the stage that has changed places with the first; 0 for none

  __device__ T* row(int i) const {
    return first + (i == 0 ? swapped : i == swapped ? 0 : i) * stride;
  }
};

// A method's weights in the state's dtype.
template <typename T>
struct Weights {
  T a[kMaxStages][kMaxStages];
  T b[kMaxStages];
  T e[kMaxStages];
};

template <typename T>
__device__ void load_method(const Tableau& tableau, Weights<T>& weights) {
  for_each_place(tableau.stages, tableau.stages, [&](int i, int j) {
    weights.a[i][j] = T(tableau.a[i][j]);
    if (i > 0) return;
    weights.b[j] = T(tableau.b[j]);
    weights.e[j] = T(tableau.e[j]);
  });
}

// Σ_j weights_j k_j[i] over the weights that are not zero, and so for the numbers after i.
template <typename T>
__device__ inline Wide<T> combined(const StageRows<T>& k, const T* weights, int count, int i) {
  Wide<T> sum = {};
#pragma unroll 4
  for (int j = 0; j < count; ++j) {
    // Read in any case, so that many numbers are on their way at a time.
    const Wide<T> rate = fetch_group(k.row(j) + i);
    const T weight = weights[j];
#pragma unroll
    for (int e = 0; e < kFull<T>; ++e) {
      sum.value[e] = weight != T(0) ? sum.value[e] + rate.value[e] * weight : sum.value[e];
    }
  }
  return sum;
}

// y + h Σ_j weights_j k_j, likewise.
template <typename T>
__device__ inline Wide<T> stepped(const T* y, const Wide<T>& h, const StageRows<T>& k,
                                  const T* weights, int count, int i) {
  Wide<T> result = fetch_group(y + i);
  const Wide<T> slope = combined(k, weights, count, i);
#pragma unroll
  for (int e = 0; e < kFull<T>; ++e) result.value[e] += h.value[e] * slope.value[e];
  return result;
}

// A solve before its first attempt.
__device__ inline FlowAttempt attempt_at_start(double start, double end, double first_step) {
  FlowAttempt a = {};
  a.t = start;
  a.end = end;
  a.length = fabs(end - start);
  a.direction = end > start ? 1 : -1;
  a.size = first_step;
  return a;
}

// Rows of the state that the error's norm has: z and the logdet.
template <typename T>
__device__ inline int rows_in_norm(const MlpSolve<T>& solve) {
  return int(solve.field.features) + (solve.tangents > 0 ? 1 : 0);
}

// Adds a row's value, scaled for the norm.
template <typename T>
__device__ inline void add_square(const MlpSolve<T>& solve, int row, T scaled, T value,
                                  TilePartial& sum) {
  if (!is_finite(value)) sum.nonfinite += 1;
  if (row >= rows_in_norm(solve)) return;
  const double square = double(scaled) * double(scaled);
  (row < int(solve.field.features) ? sum.z : sum.logdet) += square;
}

// The larger RMS of z and of the logdet, of the sums over so many samples.
template <typename T>
__device__ inline double norm_of(const MlpSolve<T>& solve, double z, double logdet,
                                 double samples) {
  const double first = sqrt(z / (samples * double(solve.field.features)));
  const double second = sqrt(logdet / samples);
  return first - first != 0 || second - second != 0 ? double(INFINITY) : larger(first, second);
}
