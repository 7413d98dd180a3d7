// The reverse of cuda/mlp_tile.cuh: from the cotangents of a tile's rates to those of its state, and
// of the parameters. To be included after it, within the same namespace.
//
// What an evaluation leaves for the reverse pass are the products W a and W ȧ of every layer; the
// rest is computed again. One tangent goes back together with the values; of several, all but the
// first go back before, each by itself, and leave what they do to the values in `curved`.

// Where the block adds up the gradients of all parameters.
template <typename T>
struct GradientSums {
  const GradientPlaces& places;
  T* numbers;
  T* mixed;  // of the closed form's M, like TileLayout's
};

// Cotangents of a tile's rates.
template <typename T>
struct RatesBar {
  const T* value;   // of f [D, samples]
  const T* extras;  // [extras, samples]: of the extras at the end of the step
  T weight;         // of the stage in the solution
  const T* h;       // [timed]
  int samples;
  bool own_h;

  __device__ T extra(int row, int s) const {
    return extras[row * samples + s] * (weight * h[own_h ? s : 0]);
  }
};

template <typename T>
__device__ inline T divergence_bar(const Tile<T>& tile, const RatesBar<T>& bar, int s) {
  return tile.solve.sign * bar.extra(0, s);
}

template <typename T>
__device__ inline T kinetic_bar(const Tile<T>& tile, const RatesBar<T>& bar, int s) {
  return tile.solve.kinetic ? tile.solve.kinetic_weight * bar.extra(1, s) : T(0);
}

template <typename T>
__device__ inline T jacobian_bar(const Tile<T>& tile, const RatesBar<T>& bar, int s) {
  if (!tile.solve.jacobian) return T(0);
  return tile.solve.jacobian_weight * bar.extra(tile.solve.kinetic ? 2 : 1, s);
}

template <typename T>
__device__ inline T sum_of(const Wide<T>& group) {
  T sum = T(0);
#pragma unroll
  for (int e = 0; e < kFull<T>; ++e) sum += group.value[e];
  return sum;
}

template <typename T>
__device__ inline void add_group(T* to, const Wide<T>& group) {
  Wide<T> sum = fetch_group(to);
#pragma unroll
  for (int e = 0; e < kFull<T>; ++e) sum.value[e] += group.value[e];
  store(to, sum);
}

// Adds up two terms over a row's samples: body(o, s, first, second) has those of a group of samples of
// a row o < rows; sums go to first_sum[o] and second_sum[o], or where samples have times of their own
// each sample's to [o, s]. Neighbouring lanes of a warp have a row's samples.
template <typename T, typename Body>
__device__ void sum_over_samples(const Tile<T>& tile, int rows, T* first_sum, T* second_sum,
                                 const Body& body) {
  const int shift = tile.layout.group_shift, lanes = 1 << shift, timed = tile.layout.timed;
  const int lane = int(threadIdx.x) & (lanes - 1), s = lane * kFull<T>;
  for (int row = 0; row < rows; row += int(blockDim.x) >> shift) {
    const int o = row + (int(threadIdx.x) >> shift);
    Wide<T> first = {}, second = {};
    if (o < rows) body(o, s, first, second);
    if (timed > 1) {
      if (o >= rows) continue;
      add_group(first_sum + o * timed + s, first);
      add_group(second_sum + o * timed + s, second);
      continue;
    }
    T first_of_row = sum_of(first), second_of_row = sum_of(second);
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      first_of_row += shuffle_down(first_of_row, offset);
      second_of_row += shuffle_down(second_of_row, offset);
    }
    if (o >= rows || lane > 0) continue;
    first_sum[o] += first_of_row;
    second_sum[o] += second_of_row;
  }
}

// The last layer has no activation, and tangents whose cotangent is the probe's, and their own for
// their squares. Leaves the cotangents of its products in u.
template <typename T>
__device__ void reverse_last(const Tile<T>& tile, const Pass& pass, int k, const RatesBar<T>& bar,
                             Columns<T> u) {
  const auto& layout = tile.layout;
  const int l = tile.last(), samples = tile.samples();
  const auto p = tile.columns(layout.product[l]);
  const bool tangents = pass.tangents && !tile.solve.closed_form;
  const T* const gates = tile.at(layout.gate[l]);
  const T* const shifts = tile.at(layout.shift[l]);
  const auto each = [&](int o, int s, Wide<T>& shift_bar, Wide<T>& product_bar) {
    const Wide<T> gate = timed_group(gates, layout.timed, o, s);
    if (pass.values) {
      const Wide<T> shift = timed_group(shifts, layout.timed, o, s);
      const Wide<T> value = fetch_group(p.row(o) + s);
      Wide<T> f_bar = fetch_group(bar.value + o * samples + s);
#pragma unroll
      for (int e = 0; e < kFull<T>; ++e) {
        if (tile.solve.kinetic) {
          const T f = gate.value[e] * value.value[e] + shift.value[e];
          f_bar.value[e] += kinetic_bar(tile, bar, s + e) * T(2) * f;
        }
        shift_bar.value[e] += f_bar.value[e];
        product_bar.value[e] += f_bar.value[e] * value.value[e];
        f_bar.value[e] *= gate.value[e];
      }
      store(u.row(o) + s, f_bar);
    }
    if (!tangents) return;
    const Wide<T> q = fetch_group(p.row(o) + samples + s);
    Wide<T> image_bar = probes_at(tile, k, o, s);
#pragma unroll
    for (int e = 0; e < kFull<T>; ++e) {
      T of_image = divergence_bar(tile, bar, s + e) * image_bar.value[e];
      if (tile.solve.jacobian) {
        of_image += jacobian_bar(tile, bar, s + e) * T(2) * gate.value[e] * q.value[e];
      }
      of_image *= tile.solve.probe_weight;
      product_bar.value[e] += of_image * q.value[e];
      image_bar.value[e] = gate.value[e] * of_image;
    }
    store(u.row(o) + samples + s, image_bar);
  };
  sum_over_samples(tile, tile.out(l), tile.at(layout.shift_sum[l]), tile.at(layout.product_sum[l]),
                   each);
}

// From the cotangents of a hidden layer's outputs to those of its products, in their place.
template <typename T>
__device__ void reverse_activation(const Tile<T>& tile, int l, const Pass& pass, Columns<T> u) {
  const auto& layout = tile.layout;
  const int samples = tile.samples(), timed = layout.timed;
  const auto p = tile.columns(layout.product[l]);
  T* const curved = layout.curved[l] >= 0 ? tile.at(layout.curved[l]) : nullptr;
  const T* const gates = tile.at(layout.gate[l]);
  const T* const shifts = tile.at(layout.shift[l]);
  with_activation(tile.solve.field.activation, [&](auto kind) {
    constexpr Activation activation = decltype(kind)::value;
    const auto each = [&](int o, int s, Wide<T>& shift_bar, Wide<T>& product_bar) {
      const Wide<T> gate = timed_group(gates, timed, o, s);
      const Wide<T> shift = timed_group(shifts, timed, o, s);
      const Wide<T> value = fetch_group(p.row(o) + s);
      Wide<T> slope, curve = {};
#pragma unroll
      for (int e = 0; e < kFull<T>; ++e) {
        const T h = gate.value[e] * value.value[e] + shift.value[e];
        const T a = activate<activation, T>(h, slope.value[e]);
        if (pass.tangents) curve.value[e] = curvature<activation, T>(h, a, slope.value[e]);
      }
      Wide<T> by_tangent = {};
      if (pass.tangents) {
        const Wide<T> q = tangent_products(tile, l, p, o, s);
        Wide<T> bar = fetch_group(u.row(o) + samples + s);
#pragma unroll
        for (int e = 0; e < kFull<T>; ++e) {
          by_tangent.value[e] = curve.value[e] * (gate.value[e] * q.value[e]) * bar.value[e];
          const T slope_bar = slope.value[e] * bar.value[e];
          product_bar.value[e] += slope_bar * q.value[e];
          bar.value[e] = gate.value[e] * slope_bar;
        }
        store(u.row(o) + samples + s, bar);
      }
      if (!pass.values) {
        add_group(curved + o * samples + s, by_tangent);
        return;
      }
      const Wide<T> before = curved != nullptr ? fetch_group(curved + o * samples + s) : Wide<T>{};
      Wide<T> bar = fetch_group(u.row(o) + s);
#pragma unroll
      for (int e = 0; e < kFull<T>; ++e) {
        const T h_bar = slope.value[e] * bar.value[e] + (by_tangent.value[e] + before.value[e]);
        shift_bar.value[e] += h_bar;
        product_bar.value[e] += h_bar * value.value[e];
        bar.value[e] = gate.value[e] * h_bar;
      }
      store(u.row(o) + s, bar);
    };
    sum_over_samples(tile, tile.out(l), tile.at(layout.shift_sum[l]),
                     tile.at(layout.product_sum[l]), each);
  });
}

// From the cotangents u of a layer's products to those of its inputs, v, and of its weight. x are the
// inputs. The closed form's tangents meet M, or behind the last layer their own sum.
template <Precision kPrecision, typename T>
__device__ void reverse_product(const Tile<T>& tile, int l, const Pass& pass,
                                const RatesBar<T>& bar, Columns<T> x, Columns<T> u, Columns<T> v,
                                const GradientSums<T>& sums) {
  const auto& layout = tile.layout;
  const int samples = tile.samples(), out = tile.out(l), in = tile.in(l);
  const int stride = layout.weight_stride[l], last = tile.last();
  const bool closed = tile.solve.closed_form;
  const int first = closed ? 0 : pass.first(samples);
  const int count = closed ? samples : pass.count(samples);
  add_outer<kPrecision>(out, in, u.from(first), x.from(first), count,
                        sums.numbers + sums.places.weight[l], stride);
  if (l > 0 || pass.values) {
    turned_product<kPrecision>(tile.at(layout.weight[l]), stride, out, in, u.from(first),
                               l > 0 ? count : samples, v.from(first));
  }
  if (!closed || !pass.tangents || l == 0) return;
  if (l < last) {
    add_outer<kPrecision>(out, in, u.from(samples), x.from(samples), samples, sums.mixed, stride);
    turned_product<kPrecision>(tile.at(layout.mixed), stride, out, in, u.from(samples), samples,
                               v.from(samples));
    return;
  }
  const T* const mixed = last == 1 ? tile.at(layout.mixed) : nullptr;
  for_each_place(in, samples, [&](int i, int s) {
    v.row(i)[samples + s] = divergence_bar(tile, bar, s) * (mixed != nullptr ? mixed[i] : T(1));
  });
  if (mixed == nullptr) return;
  for_each_place(1, in, [&](int, int i) {
    T sum = T(0);
    for (int s = 0; s < samples; ++s) sum += divergence_bar(tile, bar, s) * x.row(i)[samples + s];
    sums.mixed[i] += sum;
  });
}

// Back through all layers, from the products of one pass; leaves the cotangent of the state in the
// columns that are returned. Begins and ends with a barrier.
template <Precision kPrecision, typename T>
__device__ Columns<T> reverse_pass(const Tile<T>& tile, const Pass& pass, int k,
                                   const RatesBar<T>& bar, T* context_bar,
                                   const GradientSums<T>& sums) {
  const auto& layout = tile.layout;
  const auto x = tile.columns(layout.x[0]);
  auto u = tile.columns(layout.u[0]), v = tile.columns(layout.u[1]);
  barrier();
  reverse_last(tile, pass, k, bar, u);
  for (int l = tile.last(); l >= 0; --l) {
    if (l > 0) {
      activate_layer(tile, l - 1, pass, tile.columns(layout.product[l - 1]), x);
    } else {
      load_inputs(tile, pass, k, x);
    }
    barrier();
    reverse_product<kPrecision>(tile, l, pass, bar, x, u, v, sums);
    if (l == 0 && context_bar != nullptr && pass.values) {
      for_each_place(tile.samples(), tile.out(0), [&](int s, int o) {
        if (tile.counts(s)) context_bar[tile.sample(s) * tile.out(0) + o] += u.row(o)[s];
      });
    }
    barrier();
    if (l == 0) break;
    reverse_activation(tile, l - 1, pass, v);
    const auto swap = u;
    u = v;
    v = swap;
  }
  barrier();
  return v;
}

// From the sums over samples, or what each sample has, to the gradients of what the layers do to
// time, and to their biases.
template <typename T>
__device__ void add_time_gradients(const Tile<T>& tile, const GradientSums<T>& sums) {
  const auto& layout = tile.layout;
  const auto& field = tile.solve.field;
  const int features = int(field.time_features);
  for (int l = 0; l < field.layers; ++l) {
    const auto& layer = field.layer[l];
    const int out = tile.out(l);
    for_each_place(1, out, [&](int, int o) {
      const T b = layer.bias != nullptr ? layer.bias[o] : T(0);
      const auto shift_bar = [&](int s) { return tile.timed(layout.shift_sum[l], o, s); };
      const auto gate_bar = [&](int s) {
        const T gate = tile.timed(layout.gate[l], o, s);
        return (tile.timed(layout.product_sum[l], o, s) + b * shift_bar(s)) *
               (gate * (T(1) - gate));
      };
      // The sums may be far away.
      T of_bias = T(0), of_gate = T(0);
      for (int s = 0; s < layout.timed; ++s) {
        of_bias += tile.timed(layout.gate[l], o, s) * shift_bar(s);
        of_gate += gate_bar(s);
      }
      sums.numbers[sums.places.bias[l] + o] += of_bias;
      if (layer.gate_weight != nullptr) sums.numbers[sums.places.gate_bias[l] + o] += of_gate;
      for (int f = 0; f < features; ++f) {
        T of_gate_weight = T(0), of_shift_weight = T(0);
        for (int s = 0; s < layout.timed; ++s) {
          const T tau = tile.timed(layout.tau, f, s);
          of_gate_weight += gate_bar(s) * tau;
          of_shift_weight += shift_bar(s) * tau;
        }
        if (layer.gate_weight != nullptr) {
          sums.numbers[sums.places.gate_weight[l] + f * out + o] += of_gate_weight;
        }
        if (layer.shift_weight != nullptr) {
          sums.numbers[sums.places.shift_weight[l] + f * out + o] += of_shift_weight;
        }
      }
    });
  }
}

// From the sums of M's cotangent, which are used up, to the gradients of all weights and of the last
// gate at the time that is set; see cpu/mlp_trace.h. Begins and ends with a barrier.
template <typename T>
__device__ void unmix(const MlpSolve<T>& solve, const TileLayout& layout, T* shared,
                      const GradientSums<T>& sums) {
  const auto& field = solve.field;
  const int last = field.layers - 1, features = int(field.features);
  const int width = int(field.layer[0].out);
  const int first_stride = layout.weight_stride[0], last_stride = layout.weight_stride[last];
  const int stride = layout.weight_stride[1], rows = last == 1 ? 1 : int(field.layer[1].out);
  const T* const first = shared + layout.weight[0];      // [D, first_stride]
  const T* const behind = shared + layout.weight[last];  // [in, last_stride]
  const T* const gate = shared + layout.gate[last];
  T* const first_bar = sums.numbers + sums.places.weight[0];
  T* const behind_bar = sums.numbers + sums.places.weight[last];
  barrier();
  if (last == 2) {
    // M = W₂∘N: first W₂'s part, then what is left is N's cotangent.
    for_each_place(width, rows, [&](int j, int i) {
      const int place = j * stride + i;
      const T bar = sums.mixed[place];
      sums.numbers[sums.places.weight[1] + place] += bar * shared[layout.unmixed + place];
      sums.mixed[place] = bar * shared[layout.weight[1] + place];
    });
    barrier();
  }
  // N_ij = Σ_d W₁_jd s_d W₃_di; with one hidden layer its diagonal.
  const auto trace_bar = [&](int j, int i) {
    return last == 1 ? sums.mixed[j] : sums.mixed[j * stride + i];
  };
  // A warp has a feature, for which the last gate's cotangent is a sum over all.
  const auto& layer = field.layer[last];
  const bool gated = layer.gate_weight != nullptr;  // and so all samples have the same time
  const int lane = int(threadIdx.x) % kWarp;
  for (int d = int(threadIdx.x) / kWarp; d < features; d += int(blockDim.x) / kWarp) {
    const T s = gate[d * layout.timed];
    T gate_bar = T(0);
    for (int j = lane; j < width; j += kWarp) {
      T sum = T(0);
      for (int i = last == 1 ? j : 0; i < (last == 1 ? j + 1 : rows); ++i) {
        sum += trace_bar(j, i) * behind[i * last_stride + d];
      }
      first_bar[d * first_stride + j] += sum * s;
      gate_bar += sum * first[d * first_stride + j];
    }
    if (!gated) continue;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      gate_bar += shuffle_down(gate_bar, offset);
    }
    if (lane > 0) continue;
    gate_bar *= s * (T(1) - s);
    sums.numbers[sums.places.gate_bias[last] + d] += gate_bar;
    for (int f = 0; f < field.time_features; ++f) {
      sums.numbers[sums.places.gate_weight[last] + f * features + d] +=
          gate_bar * shared[layout.tau + f];
    }
  }
  for_each_place(last == 1 ? width : rows, features, [&](int i, int d) {
    T sum = T(0);
    for (int j = last == 1 ? i : 0; j < (last == 1 ? i + 1 : width); ++j) {
      sum += trace_bar(j, i) * first[d * first_stride + j];
    }
    behind_bar[i * last_stride + d] += sum * gate[d * layout.timed];
  });
  barrier();
  for_each_place(1, last == 1 ? width : width * stride, [&](int, int i) { sums.mixed[i] = T(0); });
  barrier();
}
