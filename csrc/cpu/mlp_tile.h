// A multilayer perceptron over one tile: value and divergence, and their reverse pass. To be
// included within the namespace of an instruction set only.
//
// Columns of a tile: `vectors` vectors of samples, then the same again for each of `tangents`
// tangents. What an evaluation leaves for the reverse pass are the products W a and W ȧ of every
// layer, before gate and shift; the rest is cheap to compute again.
//
// The closed form of the divergence is one tangent that starts as all ones behind the first layer,
// so that what leaves the first activation is d₁; it meets M instead of W₂, and the last layer
// does not see it: what leaves the last activation is added up (weighted by m for one hidden layer).

// How many of what. Without tangents there is no divergence.
struct TileShape {
  int64_t vectors;
  int64_t tangents;
  int64_t columns() const { return vectors * (1 + tangents); }
};

// Products W a of all layers, [out, columns] each; but the first layer's tangents are constants of
// a solve and stand elsewhere, so it has [out, vectors].
template <typename T>
struct Products {
  Vec<T>* layer[kMaxLayers];
};

// Where one layer's products of a feature are: values, and tangents.
template <typename T>
struct ProductRows {
  const Vec<T>* value;
  const Vec<T>* tangent;
  int64_t value_stride;
  int64_t tangent_stride;
};

// What stays the same over a solve for the samples of a tile.
template <typename T>
struct TileConstants {
  const Vec<T>* probe;    // ε [D, tangents * vectors]
  const Vec<T>* first;    // W₁ε [out, tangents * vectors]; ones in the closed form
  const Vec<T>* context;  // added to the first layer's product [out, vectors], or null
};

template <typename T>
PYCNF_HD int64_t product_vectors(const Mlp<T>& field, const TileShape& shape) {
  int64_t count = field.layer[0].out * shape.vectors;
  for (int l = 1; l < field.layers; ++l) count += field.layer[l].out * shape.columns();
  return count;
}

template <typename T>
PYCNF_HD Products<T> products_at(const Mlp<T>& field, const TileShape& shape, Vec<T>* memory) {
  Products<T> products = {};
  for (int l = 0; l < field.layers; ++l) {
    products.layer[l] = memory;
    memory += field.layer[l].out * (l == 0 ? shape.vectors : shape.columns());
  }
  return products;
}

template <typename T>
PYCNF_HD ProductRows<T> rows_of(const Products<T>& products, const TileConstants<T>& constants,
                                const TileShape& shape, int layer) {
  const Vec<T>* p = products.layer[layer];
  if (layer == 0) {
    return {p, constants.first, shape.vectors, shape.tangents * shape.vectors};
  }
  return {p, p + shape.vectors, shape.columns(), shape.columns()};
}

// A number that a feature has at a time: the same for all samples, or one for each of the tile.
template <bool kOwn, typename T>
PYCNF_HD Vec<T> timed(const T* numbers, int64_t o, int64_t v, int64_t vectors) {
  if constexpr (kOwn) {
    return reinterpret_cast<const Vec<T>*>(numbers)[o * vectors + v];
  } else {
    return splat(numbers[o]);
  }
}

template <typename T>
PYCNF_HD Matrix<T> weight_of(const MlpLayer<T>& layer) {
  return {layer.weight, layer.weight_stride, 1};
}

template <typename T>
PYCNF_HD Matrix<T> transposed_weight(const MlpLayer<T>& layer) {
  if (layer.turned != nullptr) return {layer.turned, layer.out, 1};
  return {layer.weight, 1, layer.weight_stride};
}

// Asks for `count` vectors that will be read soon: what is kept of many stages comes from beyond the
// second cache.
template <typename T>
PYCNF_HD void prefetch(const Vec<T>* x, int64_t count) {
  constexpr int kStep = 64 / PYCNF_VECTOR_BYTES;
  for (int64_t i = 0; i < count; i += kStep) __builtin_prefetch(x + i, 0, 2);
}

// What `reverse` needs first.
template <typename T>
PYCNF_HD void prefetch_last(const Mlp<T>& field, const TileShape& shape,
                            const Products<T>& products) {
  const int first = field.layers > 1 ? field.layers - 2 : 0;
  for (int l = first; l < field.layers; ++l) {
    prefetch<T>(products.layer[l], field.layer[l].out * (l == 0 ? shape.vectors : shape.columns()));
  }
}

// ---- value and divergence -----------------------------------------------------------------------

// A tile of the shape that most have, one vector and one tangent, with its loops unrolled.
PYCNF_HD TileShape one_by_one() { return {1, 1}; }

PYCNF_HD bool is_one_by_one(const TileShape& shape) {
  return shape.vectors == 1 && shape.tangents == 1;
}

template <Activation kind, bool kOwn, typename T>
PYCNF_HD void activate_rows(const TimedLayer<T>& at, int64_t out, const TileShape& shape,
                            const ProductRows<T>& rows, Vec<T>* x, Vec<T>* slopes) {
  const int64_t vectors = shape.vectors, tangents = shape.tangents, columns = shape.columns();
  for (int64_t o = 0; o < out; ++o) {
    const Vec<T>* p = rows.value + o * rows.value_stride;
    const Vec<T>* q = rows.tangent + o * rows.tangent_stride;
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> s = timed<kOwn>(at.gate, o, v, vectors);
      const Vec<T> c = timed<kOwn>(at.shift, o, v, vectors);
      Vec<T> slope;
      x[o * columns + v] = activate<kind, T>(s * p[v] + c, slope);
      if (slopes != nullptr) slopes[o * vectors + v] = slope;
      const Vec<T> scale = s * slope;
      for (int64_t k = 0; k < tangents; ++k) {
        x[o * columns + (1 + k) * vectors + v] = scale * q[k * vectors + v];
      }
    }
  }
}

// From a layer's products to its outputs x [out, columns]; and φ' [out, vectors] if `slopes`.
template <Activation kind, bool kOwn, typename T>
void activate_layer(const TimedLayer<T>& at, int64_t out, const TileShape& shape,
                    const ProductRows<T>& rows, Vec<T>* x, Vec<T>* slopes) {
  if (is_one_by_one(shape)) {
    activate_rows<kind, kOwn>(at, out, one_by_one(), rows, x, slopes);
  } else {
    activate_rows<kind, kOwn>(at, out, shape, rows, x, slopes);
  }
}

template <typename T>
using ActivateLayer = void (*)(const TimedLayer<T>&, int64_t, const TileShape&,
                               const ProductRows<T>&, Vec<T>*, Vec<T>*);

// Where an evaluation's results go.
template <typename T>
struct Rates {
  Vec<T>* value;       // f [D, vectors]
  Vec<T>* divergence;  // [vectors], with tangents
  Vec<T>* jacobian;    // ‖∂f/∂z‖_F² or its estimate [vectors], or null
};

// The field at z [D, vectors]. `scratch` holds the outputs of the widest layer.
template <bool kOwn, typename T>
void evaluate(const MlpSolve<T>& solve, ActivateLayer<T> activate_layer, const MlpAt<T>& at,
              const TileShape& shape, const TileConstants<T>& constants, const Vec<T>* z,
              const Products<T>& products, Vec<T>* scratch, const Rates<T>& rates) {
  const Mlp<T>& field = solve.field;
  const int64_t vectors = shape.vectors, columns = shape.columns();
  const int last = field.layers - 1;
  const bool closed_form = solve.closed_form && shape.tangents > 0;
  const auto& first = field.layer[0];
  product(weight_of(first), first.out, first.in, z, vectors, vectors, products.layer[0], vectors);
  if (constants.context != nullptr) {
    for (int64_t i = 0; i < first.out * vectors; ++i) products.layer[0][i] += constants.context[i];
  }
  for (int l = 1; l <= last; ++l) {
    const auto& layer = field.layer[l];
    Vec<T>* y = products.layer[l];
    activate_layer(at.layer[l - 1], layer.in, shape, rows_of(products, constants, shape, l - 1),
                   scratch, nullptr);
    product(weight_of(layer), layer.out, layer.in, scratch, columns,
            closed_form ? vectors : columns, y, columns);
    if (closed_form && l < last) {
      product(Matrix<T>{at.mixed, padded<T>(layer.in), 1}, layer.out, layer.in, scratch + vectors,
              columns, vectors, y + vectors, columns);
    }
  }
  const auto rows = rows_of(products, constants, shape, last);
  for (int64_t o = 0; o < field.features; ++o) {
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> s = timed<kOwn>(at.layer[last].gate, o, v, vectors);
      const Vec<T> c = timed<kOwn>(at.layer[last].shift, o, v, vectors);
      rates.value[o * vectors + v] = s * rows.value[o * rows.value_stride + v] + c;
    }
  }
  if (shape.tangents == 0) return;
  for (int64_t v = 0; v < vectors; ++v) {
    rates.divergence[v] = splat(T(0));
    if (rates.jacobian != nullptr) rates.jacobian[v] = splat(T(0));
  }
  if (closed_form) {
    const T* weights = last == 1 ? at.mixed : nullptr;
    for (int64_t o = 0; o < field.layer[last].in; ++o) {
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec<T> d = scratch[o * columns + vectors + v];
        rates.divergence[v] += weights != nullptr ? d * weights[o] : d;
      }
    }
    return;
  }
  for (int64_t o = 0; o < field.features; ++o) {
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> s = timed<kOwn>(at.layer[last].gate, o, v, vectors);
      Vec<T> sum = {}, squares = {};
      for (int64_t k = v; k < shape.tangents * vectors; k += vectors) {
        const Vec<T> image = s * rows.tangent[o * rows.tangent_stride + k];
        sum += constants.probe[o * shape.tangents * vectors + k] * image;
        squares += image * image;
      }
      rates.divergence[v] += sum * solve.probe_weight;
      if (rates.jacobian != nullptr) rates.jacobian[v] += squares * solve.probe_weight;
    }
  }
}

// ---- reverse ------------------------------------------------------------------------------------

// Cotangents of an evaluation's results, [vectors] each, null for none.
template <typename T>
struct Cotangents {
  const Vec<T>* value;  // of f [D, vectors]
  const Vec<T>* divergence;
  const Vec<T>* kinetic;   // of ‖f‖²
  const Vec<T>* jacobian;  // of ‖∂f/∂z‖_F²
};

// Where the reverse pass adds up what it finds.
template <typename T>
struct Sums {
  const LayerGradient<T>* layers;  // null where no parameter needs one; then nothing else does
  T* mixed_bar;                    // like MlpAt::mixed
  Vec<T>* first_bar;               // of W₁ε [out, tangents * vectors]
  Vec<T>* context_bar;             // [out, vectors], or null
  Vec<T>* time_bar;                // [vectors], or null
};

template <typename T>
struct ReverseScratch {
  Vec<T>* x;             // [widest, columns]
  Vec<T>* slopes;        // [widest, vectors]
  Vec<T>* u[2];          // [widest, columns]
  Vec<T>* shift_sums;    // [widest, vectors]
  Vec<T>* product_sums;  // [widest, vectors]
  T* rows;               // [columns * lanes, padded widest]
};

// Sums of u and of u∘(W a) + Σ ū∘(W ȧ), by output: over the vectors of a tile where they share a
// time, otherwise one for each.
template <bool kOwn, typename T>
PYCNF_HD void store_sums(const ReverseScratch<T>& scratch, int64_t o, int64_t v, int64_t vectors,
                         Vec<T> shift, Vec<T> products) {
  const int64_t i = kOwn ? o * vectors + v : o;
  if (kOwn || v == 0) {
    scratch.shift_sums[i] = shift;
    scratch.product_sums[i] = products;
  } else {
    scratch.shift_sums[i] += shift;
    scratch.product_sums[i] += products;
  }
}

// From the sums of a layer's outputs to the gradient of what it does to time, and of time itself
// (whose lanes are outputs where the time is shared, and have to be added up).
template <typename T>
void add_shared_time_gradients(const MlpLayer<T>& layer, const TimedLayer<T>& at, const T* tau,
                               int64_t time_features, const ReverseScratch<T>& scratch,
                               const LayerGradient<T>& gradient, Vec<T>* time_bar) {
  const int64_t stride = padded<T>(layer.out);
  for (int64_t o = 0; o < layer.out; o += kLanes<T>) {
    for (int64_t i = layer.out; i < o + kLanes<T>; ++i) {
      scratch.shift_sums[i] = scratch.product_sums[i] = splat(T(0));
    }
    const Vec<T> shift_bar = sum_over_lanes<T>(scratch.shift_sums + o);
    const Vec<T> product_bar = sum_over_lanes<T>(scratch.product_sums + o);
    const Vec<T> s = load(at.gate, o);
    *vectors_at(gradient.bias, o) += s * shift_bar;
    if (layer.gate_weight != nullptr) {
      const Vec<T> b = layer.bias != nullptr ? load(layer.bias, o) : splat(T(0));
      const Vec<T> bar = (product_bar + b * shift_bar) * (s * (T(1) - s));
      *vectors_at(gradient.gate_bias, o) += bar;
      for (int64_t f = 0; f < time_features; ++f) {
        *vectors_at(gradient.gate_weight, f * stride + o) += bar * tau[f];
      }
      if (time_bar != nullptr) time_bar[0] += bar * load(at.gate_rate, o);
    }
    if (layer.shift_weight != nullptr) {
      for (int64_t f = 0; f < time_features; ++f) {
        *vectors_at(gradient.shift_weight, f * stride + o) += shift_bar * tau[f];
      }
      if (time_bar != nullptr) time_bar[0] += shift_bar * load(at.shift_rate, o);
    }
  }
}

template <typename T>
void add_own_time_gradients(const MlpLayer<T>& layer, const TimedLayer<T>& at, const T* tau,
                            int64_t time_features, int64_t vectors,
                            const ReverseScratch<T>& scratch, const LayerGradient<T>& gradient,
                            Vec<T>* time_bar) {
  const int64_t stride = padded<T>(layer.out);
  // Adds up `term(i, v)` over samples for the outputs from o on, and that to `sum`.
  const auto add = [&](int64_t o, T* sum, const auto& term) {
    Vec<T> terms[kLanes<T>] = {};
    for (int64_t i = o; i < o + kLanes<T> && i < layer.out; ++i) {
      for (int64_t v = 0; v < vectors; ++v) terms[i - o] += term(i, v);
    }
    *vectors_at(sum, o) += sum_over_lanes<T>(terms);
  };
  const auto gate = [&](int64_t o, int64_t v) { return timed<true>(at.gate, o, v, vectors); };
  const auto shift_bar = [&](int64_t o, int64_t v) { return scratch.shift_sums[o * vectors + v]; };
  const auto gate_bar = [&](int64_t o, int64_t v) {
    const Vec<T> s = gate(o, v);
    const T b = layer.bias != nullptr ? layer.bias[o] : T(0);
    return (scratch.product_sums[o * vectors + v] + b * shift_bar(o, v)) * (s * (T(1) - s));
  };
  for (int64_t o = 0; o < layer.out; o += kLanes<T>) {
    add(o, gradient.bias, [&](int64_t i, int64_t v) { return gate(i, v) * shift_bar(i, v); });
    if (layer.gate_weight != nullptr) add(o, gradient.gate_bias, gate_bar);
    for (int64_t f = 0; f < time_features; ++f) {
      const auto times = [&](const auto& bar) {
        return [&, f](int64_t i, int64_t v) { return bar(i, v) * timed<true>(tau, f, v, vectors); };
      };
      if (layer.gate_weight != nullptr) {
        add(o, gradient.gate_weight + f * stride, times(gate_bar));
      }
      if (layer.shift_weight != nullptr) {
        add(o, gradient.shift_weight + f * stride, times(shift_bar));
      }
    }
  }
  for (int64_t o = 0; time_bar != nullptr && o < layer.out; ++o) {
    for (int64_t v = 0; v < vectors; ++v) {
      if (layer.gate_weight != nullptr) {
        time_bar[v] += gate_bar(o, v) * timed<true>(at.gate_rate, o, v, vectors);
      }
      if (layer.shift_weight != nullptr) {
        time_bar[v] += shift_bar(o, v) * timed<true>(at.shift_rate, o, v, vectors);
      }
    }
  }
}

template <Activation kind, bool kOwn, typename T>
PYCNF_HD void reverse_rows(const TimedLayer<T>& at, int64_t out, const TileShape& shape,
                           const ProductRows<T>& rows, const ReverseScratch<T>& scratch,
                           const Vec<T>* bar, Vec<T>* value_bar, int64_t value_stride,
                           Vec<T>* tangent_bar, int64_t tangent_stride, bool add) {
  const int64_t vectors = shape.vectors, tangents = shape.tangents, columns = shape.columns();
  for (int64_t o = 0; o < out; ++o) {
    const Vec<T>* p = rows.value + o * rows.value_stride;
    const Vec<T>* q = rows.tangent + o * rows.tangent_stride;
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> s = timed<kOwn>(at.gate, o, v, vectors);
      const Vec<T> c = timed<kOwn>(at.shift, o, v, vectors);
      const Vec<T> slope = scratch.slopes[o * vectors + v];
      const Vec<T> h = s * p[v] + c;
      Vec<T> inner = {};
      for (int64_t k = 0; k < tangents; ++k) {
        const Vec<T> cotangent = bar[o * columns + (1 + k) * vectors + v];
        inner += q[k * vectors + v] * cotangent;
        const Vec<T> scaled = s * slope * cotangent;
        Vec<T>* target = tangent_bar + o * tangent_stride + k * vectors + v;
        *target = add ? *target + scaled : scaled;
      }
      Vec<T> u = slope * bar[o * columns + v];
      Vec<T> products = {};
      if (tangents > 0) {
        u += curvature<kind, T>(h, scratch.x[o * columns + v], slope) * (s * inner);
        products = slope * inner;
      }
      store_sums<kOwn>(scratch, o, v, vectors, u, products + u * p[v]);
      value_bar[o * value_stride + v] = s * u;
    }
  }
}

// Cotangents of a layer's outputs [out, columns], through activation and gate: u [out, vectors]
// scaled by s for values; those of tangents scaled likewise to `tangent_bar`, added to what is
// there if `add`.
template <Activation kind, bool kOwn, typename T>
void reverse_activation(const TimedLayer<T>& at, int64_t out, const TileShape& shape,
                        const ProductRows<T>& rows, const ReverseScratch<T>& scratch,
                        const Vec<T>* bar, Vec<T>* value_bar, int64_t value_stride,
                        Vec<T>* tangent_bar, int64_t tangent_stride, bool add) {
  if (is_one_by_one(shape) && !add) {
    reverse_rows<kind, kOwn>(at, out, one_by_one(), rows, scratch, bar, value_bar, value_stride,
                             tangent_bar, tangent_stride, false);
  } else {
    reverse_rows<kind, kOwn>(at, out, shape, rows, scratch, bar, value_bar, value_stride,
                             tangent_bar, tangent_stride, add);
  }
}

template <typename T>
using ReverseActivation = void (*)(const TimedLayer<T>&, int64_t, const TileShape&,
                                   const ProductRows<T>&, const ReverseScratch<T>&, const Vec<T>*,
                                   Vec<T>*, int64_t, Vec<T>*, int64_t, bool);

// Σ over `count` columns and lanes of u [out, u_stride] times x [in, x_stride], added to a matrix
// [out, stride], or [in, stride] if `swapped`.
template <typename T>
void add_outer(int64_t out, int64_t in, const Vec<T>* u, int64_t u_stride, const Vec<T>* x,
               int64_t x_stride, int64_t count, T* rows, T* sum, int64_t stride, bool swapped) {
  const Vec<T>* across = swapped ? u : x;
  const int64_t across_stride = swapped ? u_stride : x_stride;
  for (int64_t c = 0; c < count; ++c) {
    transpose(across + c, swapped ? out : in, across_stride, stride, rows + c * kLanes<T> * stride);
  }
  const Vec<T>* along = swapped ? x : u;
  outer(reinterpret_cast<const T*>(along), (swapped ? x_stride : u_stride) * kLanes<T>,
        swapped ? in : out, rows, stride, count * kLanes<T>, sum, stride);
}

template <typename T>
void add_weight_gradient(const MlpLayer<T>& layer, const Vec<T>* u, int64_t u_stride,
                         const Vec<T>* x, int64_t x_stride, int64_t count, T* rows,
                         const LayerGradient<T>& gradient) {
  add_outer(layer.out, layer.in, u, u_stride, x, x_stride, count, rows, gradient.weight,
            gradient.stride, gradient.swapped);
}

// The last layer has no activation, and tangents whose cotangent is the probe's (and their own, for
// their squares). Leaves the cotangents of its products in u: [D, columns], or where there is no
// other layer [D, vectors].
template <bool kOwn, typename T>
void reverse_last(const MlpSolve<T>& solve, const MlpAt<T>& at, const TileShape& shape,
                  const TileConstants<T>& constants, const Products<T>& products,
                  const Cotangents<T>& bars, const ReverseScratch<T>& scratch,
                  const Sums<T>& totals, Vec<T>* u) {
  const int64_t vectors = shape.vectors, tangents = shape.tangents;
  const int last = solve.field.layers - 1;
  const auto& timed_last = at.layer[last];
  const auto rows = rows_of(products, constants, shape, last);
  const bool seen = tangents > 0 && !solve.closed_form;
  const int64_t stride = last == 0 ? vectors : shape.columns();
  for (int64_t o = 0; o < solve.field.features; ++o) {
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> s = timed<kOwn>(timed_last.gate, o, v, vectors);
      const Vec<T> p = rows.value[o * rows.value_stride + v];
      Vec<T> bar = bars.value[o * vectors + v];
      if (bars.kinetic != nullptr) {
        const Vec<T> f = s * p + timed<kOwn>(timed_last.shift, o, v, vectors);
        bar += bars.kinetic[v] * T(2) * f;
      }
      Vec<T> products_sum = bar * p;
      u[o * stride + v] = s * bar;
      for (int64_t k = v; seen && k < tangents * vectors; k += vectors) {
        const Vec<T> q = rows.tangent[o * rows.tangent_stride + k];
        Vec<T> tangent_bar = bars.divergence[v] * constants.probe[o * tangents * vectors + k];
        if (bars.jacobian != nullptr) tangent_bar += bars.jacobian[v] * T(2) * (s * q);
        tangent_bar *= solve.probe_weight;
        products_sum += tangent_bar * q;
        if (last == 0) {
          totals.first_bar[o * tangents * vectors + k] += s * tangent_bar;
        } else {
          u[o * stride + vectors + k] = s * tangent_bar;
        }
      }
      store_sums<kOwn>(scratch, o, v, vectors, bar, products_sum);
    }
  }
}

// The reverse of `evaluate`, with the products that it left: from cotangents of its results to that
// of z [D, vectors].
template <bool kOwn, typename T>
void reverse(const MlpSolve<T>& solve, ActivateLayer<T> activate_layer,
             ReverseActivation<T> reverse_activation, const MlpAt<T>& at, const TileShape& shape,
             const TileConstants<T>& constants, const Vec<T>* z, const Products<T>& products,
             const Cotangents<T>& bars, const ReverseScratch<T>& scratch, const Sums<T>& totals,
             Vec<T>* z_bar) {
  const Mlp<T>& field = solve.field;
  const int64_t vectors = shape.vectors, tangents = shape.tangents, columns = shape.columns();
  const int last = field.layers - 1;
  const bool closed_form = solve.closed_form && tangents > 0;
  const auto add_time = [&](int l) {
    if (totals.layers == nullptr) return;
    if constexpr (kOwn) {
      add_own_time_gradients(field.layer[l], at.layer[l], at.tau, field.time_features, vectors,
                             scratch, totals.layers[l], totals.time_bar);
    } else {
      add_shared_time_gradients(field.layer[l], at.layer[l], at.tau, field.time_features, scratch,
                                totals.layers[l], totals.time_bar);
    }
  };
  Vec<T>* u = scratch.u[0];
  Vec<T>* other = scratch.u[1];
  reverse_last<kOwn>(solve, at, shape, constants, products, bars, scratch, totals, u);
  add_time(last);

  for (int l = last; l > 0; --l) {
    const auto& layer = field.layer[l];
    const auto rows = rows_of(products, constants, shape, l - 1);
    const int64_t count = closed_form ? vectors : columns;
    if (l > 1) {
      prefetch<T>(products.layer[l - 2], field.layer[l - 2].out * (l > 2 ? columns : vectors));
    }
    activate_layer(at.layer[l - 1], layer.in, shape, rows, scratch.x, scratch.slopes);
    if (totals.layers != nullptr) {
      add_weight_gradient(layer, u, columns, scratch.x, columns, count, scratch.rows,
                          totals.layers[l]);
    }
    product(transposed_weight(layer), layer.in, layer.out, u, columns, count, other, columns);
    if (closed_form && l < last) {
      const int64_t stride = padded<T>(layer.in);
      if (totals.layers != nullptr) {
        add_outer(layer.out, layer.in, u + vectors, columns, scratch.x + vectors, columns, vectors,
                  scratch.rows, totals.mixed_bar, stride, false);
      }
      product(Matrix<T>{at.mixed, 1, stride}, layer.in, layer.out, u + vectors, columns, vectors,
              other + vectors, columns);
    } else if (closed_form) {
      // The slopes were added up, weighted by m where there is one hidden layer only.
      for (int64_t o = 0; o < layer.in; ++o) {
        for (int64_t v = 0; v < vectors; ++v) {
          const Vec<T> bar = bars.divergence[v];
          other[o * columns + vectors + v] = last == 1 ? bar * at.mixed[o] : bar;
          if (last == 1 && totals.layers != nullptr) {
            const Vec<T> d = bar * scratch.x[o * columns + vectors + v];
            for (int lane = 0; lane < kLanes<T>; ++lane) totals.mixed_bar[o] += d[lane];
          }
        }
      }
    }
    const bool first = l == 1;
    reverse_activation(at.layer[l - 1], layer.in, shape, rows, scratch, other, first ? u : other,
                       first ? vectors : columns, first ? totals.first_bar : other + vectors,
                       first ? tangents * vectors : columns, first);
    add_time(l - 1);
    if (!first) {
      Vec<T>* swap = u;
      u = other;
      other = swap;
    }
  }

  const auto& layer = field.layer[0];
  if (totals.context_bar != nullptr) {
    for (int64_t i = 0; i < layer.out * vectors; ++i) totals.context_bar[i] += u[i];
  }
  if (totals.layers != nullptr) {
    add_weight_gradient(layer, u, vectors, z, vectors, vectors, scratch.rows, totals.layers[0]);
  }
  product(transposed_weight(layer), layer.in, layer.out, u, vectors, vectors, z_bar, vectors);
}
