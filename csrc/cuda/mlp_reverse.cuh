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

// Adds up two terms of every place over a row's samples: body(o, s, first, second) for o < rows,
// sums to first_sum[o] and second_sum[o]; or adds them to [o, s] where `timed` is not 1. Neighbouring
// lanes of a warp have a row's samples.
template <typename T, typename Body>
__device__ void sum_over_samples(int rows, int samples, int timed, T* first_sum, T* second_sum,
                                 const Body& body) {
  const int lanes = least(samples, kWarp), at_once = int(blockDim.x) / lanes;
  const int lane = int(threadIdx.x) % lanes;
  for (int row = 0; row < rows; row += at_once) {
    const int o = row + int(threadIdx.x) / lanes;
    T first = T(0), second = T(0);
    for (int s = lane; o < rows && s < samples; s += lanes) {
      body(o, s, first, second);
      if (timed == 1) continue;
      first_sum[o * timed + s] += first;
      second_sum[o * timed + s] += second;
      first = second = T(0);
    }
    if (timed > 1) continue;
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      first += shuffle_down(first, offset);
      second += shuffle_down(second, offset);
    }
    if (o >= rows || lane > 0) continue;
    first_sum[o] += first;
    second_sum[o] += second;
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
  const auto each = [&](int o, int s, T& shift_bar, T& product_bar) {
    const T gate = tile.timed(layout.gate[l], o, s), shift = tile.timed(layout.shift[l], o, s);
    if (pass.values) {
      const T value = p.row(o)[s];
      T f_bar = bar.value[o * samples + s];
      if (tile.solve.kinetic) {
        f_bar += kinetic_bar(tile, bar, s) * T(2) * (gate * value + shift);
      }
      shift_bar += f_bar;
      product_bar += f_bar * value;
      u.row(o)[s] = gate * f_bar;
    }
    if (!tangents) return;
    const T q = p.row(o)[samples + s];
    T image_bar = divergence_bar(tile, bar, s) * probe_at(tile, k, o, s);
    if (tile.solve.jacobian) image_bar += jacobian_bar(tile, bar, s) * T(2) * gate * q;
    image_bar *= tile.solve.probe_weight;
    product_bar += image_bar * q;
    u.row(o)[samples + s] = gate * image_bar;
  };
  sum_over_samples(tile.out(l), samples, layout.timed, tile.at(layout.shift_sum[l]),
                   tile.at(layout.product_sum[l]), each);
}

// From the cotangents of a hidden layer's outputs to those of its products, in their place.
template <typename T>
__device__ void reverse_activation(const Tile<T>& tile, int l, const Pass& pass, Columns<T> u) {
  const auto& layout = tile.layout;
  const int samples = tile.samples();
  const auto p = tile.columns(layout.product[l]);
  T* const curved = layout.curved[l] >= 0 ? tile.at(layout.curved[l]) : nullptr;
  with_activation(tile.solve.field.activation, [&](auto kind) {
    constexpr Activation activation = decltype(kind)::value;
    sum_over_samples(tile.out(l), samples, layout.timed, tile.at(layout.shift_sum[l]),
                     tile.at(layout.product_sum[l]),
                     [&](int o, int s, T& shift_bar, T& product_bar) {
                       const T gate = tile.timed(layout.gate[l], o, s);
                       const T h = gate * p.row(o)[s] + tile.timed(layout.shift[l], o, s);
                       T slope;
                       const T a = activate<activation, T>(h, slope);
                       T by_tangent = T(0);
                       if (pass.tangents) {
                         const T q = tangent_product(tile, l, p, o, s), bar = u.row(o)[samples + s];
                         by_tangent = curvature<activation, T>(h, a, slope) * (gate * q) * bar;
                         product_bar += slope * bar * q;
                         u.row(o)[samples + s] = gate * slope * bar;
                       }
                       if (!pass.values) {
                         curved[o * samples + s] += by_tangent;
                         return;
                       }
                       if (curved != nullptr) by_tangent += curved[o * samples + s];
                       const T h_bar = slope * u.row(o)[s] + by_tangent;
                       shift_bar += h_bar;
                       product_bar += h_bar * p.row(o)[s];
                       u.row(o)[s] = gate * h_bar;
                     });
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
__device__ Columns<T> reverse_pass(const Tile<T>& tile, const Pass& pass, int k, const T* z,
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
      load_inputs(tile, pass, z, k, x);
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
      for (int s = 0; s < layout.timed; ++s) {
        const T gate = tile.timed(layout.gate[l], o, s);
        const T shift_bar = tile.timed(layout.shift_sum[l], o, s);
        const T gate_bar =
            (tile.timed(layout.product_sum[l], o, s) + b * shift_bar) * (gate * (T(1) - gate));
        sums.numbers[sums.places.bias[l] + o] += gate * shift_bar;
        if (layer.gate_weight != nullptr) sums.numbers[sums.places.gate_bias[l] + o] += gate_bar;
        for (int f = 0; f < features; ++f) {
          const T tau = tile.timed(layout.tau, f, s);
          if (layer.gate_weight != nullptr) {
            sums.numbers[sums.places.gate_weight[l] + f * out + o] += gate_bar * tau;
          }
          if (layer.shift_weight != nullptr) {
            sums.numbers[sums.places.shift_weight[l] + f * out + o] += shift_bar * tau;
          }
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
  for_each_place(features, width, [&](int d, int j) {
    T sum = T(0);
    for (int i = last == 1 ? j : 0; i < (last == 1 ? j + 1 : rows); ++i) {
      sum += trace_bar(j, i) * behind[i * last_stride + d];
    }
    first_bar[d * first_stride + j] += sum * gate[d * layout.timed];
  });
  for_each_place(last == 1 ? width : rows, features, [&](int i, int d) {
    T sum = T(0);
    for (int j = last == 1 ? i : 0; j < (last == 1 ? i + 1 : width); ++j) {
      sum += trace_bar(j, i) * first[d * first_stride + j];
    }
    behind_bar[i * last_stride + d] += sum * gate[d * layout.timed];
  });
  const auto& layer = field.layer[last];
  if (layer.gate_weight != nullptr) {  // and so all samples have the same time
    for_each_place(1, features, [&](int, int d) {
      T gate_bar = T(0);
      for (int j = 0; j < width; ++j) {
        for (int i = last == 1 ? j : 0; i < (last == 1 ? j + 1 : rows); ++i) {
          gate_bar += trace_bar(j, i) * first[d * first_stride + j] * behind[i * last_stride + d];
        }
      }
      gate_bar *= gate[d] * (T(1) - gate[d]);
      sums.numbers[sums.places.gate_bias[last] + d] += gate_bar;
      for (int f = 0; f < field.time_features; ++f) {
        sums.numbers[sums.places.gate_weight[last] + f * features + d] +=
            gate_bar * shared[layout.tau + f];
      }
    });
  }
  barrier();
  for_each_place(1, last == 1 ? width : width * stride, [&](int, int i) { sums.mixed[i] = T(0); });
  barrier();
}
