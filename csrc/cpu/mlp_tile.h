// A multilayer perceptron over one tile: value and divergence, and their reverse pass. To be
// included within the namespace of an instruction set only.
//
// Columns of a tile: `vectors` vectors of samples, then the same again for each of `tangents`
// tangents. What an evaluation leaves for the reverse pass are the products W a and W ȧ of every
// layer, before gate and shift; the rest is cheap to compute again.

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
  const Vec<T>* first;    // W₁ε [out, tangents * vectors]
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

template <typename T>
PYCNF_HD Vec<T> gate_of(const TimedLayer<T>& at, int64_t o) {
  return splat(at.gate != nullptr ? at.gate[o] : T(1));
}

template <typename T>
PYCNF_HD Matrix<T> weight_of(const MlpLayer<T>& layer) {
  return {layer.weight, layer.weight_stride, 1};
}

template <typename T>
PYCNF_HD Matrix<T> transposed_weight_of(const MlpLayer<T>& layer) {
  return {layer.weight, 1, layer.weight_stride};
}

// W₁ε, the same at any time.
template <typename T>
void first_tangents(const Mlp<T>& field, const TileShape& shape, const Vec<T>* probe,
                    Vec<T>* first) {
  const auto& layer = field.layer[0];
  const int64_t columns = shape.tangents * shape.vectors;
  product(weight_of(layer), layer.out, layer.in, probe, columns, 0, columns, first);
}

// ---- value and divergence -----------------------------------------------------------------------

// From a layer's products to its outputs x [out, columns]; and φ' [out, vectors] if `slopes`.
template <Activation kind, typename T>
void activate_layer(const TimedLayer<T>& at, int64_t out, const TileShape& shape,
                    const ProductRows<T>& rows, Vec<T>* x, Vec<T>* slopes) {
  const int64_t vectors = shape.vectors, tangents = shape.tangents, columns = shape.columns();
  for (int64_t o = 0; o < out; ++o) {
    const Vec<T> s = gate_of(at, o), c = splat(at.shift[o]);
    const Vec<T>* p = rows.value + o * rows.value_stride;
    const Vec<T>* q = rows.tangent + o * rows.tangent_stride;
    for (int64_t v = 0; v < vectors; ++v) {
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

template <typename T>
using ActivateLayer = void (*)(const TimedLayer<T>&, int64_t, const TileShape&,
                               const ProductRows<T>&, Vec<T>*, Vec<T>*);

// f [D, vectors] and, with tangents, the divergence [vectors] at z [D, vectors]. `scratch` holds
// the outputs of the widest layer.
template <typename T>
void evaluate(const Mlp<T>& field, ActivateLayer<T> activate_layer, const TimedLayer<T>* timed,
              const TileShape& shape, const TileConstants<T>& constants, T probe_weight,
              const Vec<T>* z, const Products<T>& products, Vec<T>* scratch, Vec<T>* f,
              Vec<T>* divergence) {
  const int64_t vectors = shape.vectors, columns = shape.columns();
  const auto& first = field.layer[0];
  product(weight_of(first), first.out, first.in, z, vectors, 0, vectors, products.layer[0]);
  if (constants.context != nullptr) {
    for (int64_t i = 0; i < first.out * vectors; ++i) products.layer[0][i] += constants.context[i];
  }
  for (int l = 1; l < field.layers; ++l) {
    const auto& layer = field.layer[l];
    activate_layer(timed[l - 1], layer.in, shape, rows_of(products, constants, shape, l - 1),
                   scratch, nullptr);
    product(weight_of(layer), layer.out, layer.in, scratch, columns, 0, columns, products.layer[l]);
  }
  const int last = field.layers - 1;
  const auto rows = rows_of(products, constants, shape, last);
  for (int64_t v = 0; v < vectors && shape.tangents > 0; ++v) divergence[v] = splat(T(0));
  for (int64_t o = 0; o < field.features; ++o) {
    const Vec<T> s = gate_of(timed[last], o), c = splat(timed[last].shift[o]);
    for (int64_t v = 0; v < vectors; ++v) {
      f[o * vectors + v] = s * rows.value[o * rows.value_stride + v] + c;
      Vec<T> sum = {};
      for (int64_t k = v; k < shape.tangents * vectors; k += vectors) {
        sum += constants.probe[o * shape.tangents * vectors + k] *
               rows.tangent[o * rows.tangent_stride + k];
      }
      if (shape.tangents > 0) divergence[v] += s * sum * probe_weight;
    }
  }
}

// ---- reverse ------------------------------------------------------------------------------------

// Sums over the samples of a tile, of kLanes outputs at a time, into the gradient of what the layer
// does to time.
template <typename T>
void add_time_gradient(const MlpLayer<T>& layer, const TimedLayer<T>& at, int64_t o,
                       Vec<T> shift_bar, Vec<T> product_bar, const T* tau, int64_t time_features,
                       const LayerGradient<T>& gradient) {
  const int64_t stride = padded<T>(layer.out);
  const int64_t count = layer.out - o < kLanes<T> ? layer.out - o : kLanes<T>;
  Vec<T> s = {}, b = {};
  for (int64_t i = 0; i < count; ++i) {
    s[i] = at.gate != nullptr ? at.gate[o + i] : T(1);
    b[i] = layer.bias != nullptr ? layer.bias[o + i] : T(0);
  }
  *vectors(gradient.bias + o) += s * shift_bar;
  if (layer.gate_weight != nullptr) {
    const Vec<T> bar = (product_bar + b * shift_bar) * (s * (T(1) - s));
    *vectors(gradient.gate_bias + o) += bar;
    for (int64_t f = 0; f < time_features; ++f) {
      *vectors(gradient.gate_weight + f * stride + o) += bar * tau[f];
    }
  }
  if (layer.shift_weight != nullptr) {
    for (int64_t f = 0; f < time_features; ++f) {
      *vectors(gradient.shift_weight + f * stride + o) += shift_bar * tau[f];
    }
  }
}

// Cotangents of a layer's outputs [out, columns], through activation and gate: u [out, vectors]
// scaled by s for values; those of tangents scaled likewise to `tangent_bar`, added to what is
// there if `add`. Sums over samples of u and of u∘(W a) + Σ ū∘(W ȧ) go to `sums`, two vectors of
// lanes for each output.
template <Activation kind, typename T>
void reverse_activation(const TimedLayer<T>& at, int64_t out, const TileShape& shape,
                        const ProductRows<T>& rows, const Vec<T>* x, const Vec<T>* slopes,
                        const Vec<T>* bar, Vec<T>* value_bar, int64_t value_stride,
                        Vec<T>* tangent_bar, int64_t tangent_stride, bool add, Vec<T>* shift_sums,
                        Vec<T>* product_sums) {
  const int64_t vectors = shape.vectors, tangents = shape.tangents, columns = shape.columns();
  for (int64_t o = 0; o < out; ++o) {
    const Vec<T> s = gate_of(at, o), c = splat(at.shift[o]);
    const Vec<T>* p = rows.value + o * rows.value_stride;
    const Vec<T>* q = rows.tangent + o * rows.tangent_stride;
    Vec<T> shift_sum = {}, product_sum = {};
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> slope = slopes[o * vectors + v];
      const Vec<T> h = s * p[v] + c;
      Vec<T> inner = {};
      for (int64_t k = 0; k < tangents; ++k) {
        const Vec<T> cotangent = bar[o * columns + (1 + k) * vectors + v];
        const Vec<T> w = q[k * vectors + v];
        inner += w * cotangent;
        const Vec<T> scaled = s * slope * cotangent;
        Vec<T>* target = tangent_bar + o * tangent_stride + k * vectors + v;
        *target = add ? *target + scaled : scaled;
      }
      Vec<T> u = slope * bar[o * columns + v];
      if (tangents > 0) {
        u += curvature<kind, T>(h, x[o * columns + v], slope) * (s * inner);
        product_sum += slope * inner;
      }
      shift_sum += u;
      product_sum += u * p[v];
      value_bar[o * value_stride + v] = s * u;
    }
    shift_sums[o] = shift_sum;
    product_sums[o] = product_sum;
  }
}

template <typename T>
using ReverseActivation = void (*)(const TimedLayer<T>&, int64_t, const TileShape&,
                                   const ProductRows<T>&, const Vec<T>*, const Vec<T>*,
                                   const Vec<T>*, Vec<T>*, int64_t, Vec<T>*, int64_t, bool, Vec<T>*,
                                   Vec<T>*);

// The gradient of a weight: Σ over columns and lanes of u [out, columns] times x [in, columns].
template <typename T>
void add_weight_gradient(const MlpLayer<T>& layer, const Vec<T>* u, const Vec<T>* x,
                         int64_t columns, T* rows, const LayerGradient<T>& gradient) {
  const int64_t stride = gradient.stride;
  const Vec<T>* across = gradient.swapped ? u : x;
  const int64_t features = gradient.swapped ? layer.out : layer.in;
  for (int64_t c = 0; c < columns; ++c) {
    transpose(across + c, features, columns, stride, rows + c * kLanes<T> * stride);
  }
  outer(gradient.swapped ? x : u, gradient.swapped ? layer.in : layer.out, rows, stride,
        columns * kLanes<T>, gradient.weight, stride);
}

template <typename T>
struct ReverseScratch {
  Vec<T>* x;             // [widest, columns]
  Vec<T>* slopes;        // [widest, vectors]
  Vec<T>* u[2];          // [widest, columns]
  Vec<T>* shift_sums;    // [widest + lanes]
  Vec<T>* product_sums;  // [widest + lanes]
  T* rows;               // [columns * lanes, padded widest]
};

template <typename T>
void add_time_gradients(const MlpLayer<T>& layer, const TimedLayer<T>& at, const T* tau,
                        int64_t time_features, const ReverseScratch<T>& scratch,
                        const LayerGradient<T>& gradient) {
  for (int64_t o = 0; o < layer.out; o += kLanes<T>) {
    for (int64_t i = layer.out; i < o + kLanes<T>; ++i) {
      scratch.shift_sums[i] = scratch.product_sums[i] = splat(T(0));
    }
    const Vec<T> shift_bar = sum_over_lanes<T>(scratch.shift_sums + o);
    const Vec<T> product_bar = sum_over_lanes<T>(scratch.product_sums + o);
    add_time_gradient(layer, at, o, shift_bar, product_bar, tau, time_features, gradient);
  }
}

// The reverse of `evaluate`: from cotangents of f [D, vectors] and of the divergence [vectors] to
// the cotangent of z [D, vectors]; parameters are added to `gradients`, the first layer's tangent
// part to `first_bar` [out, tangents * vectors], the context's to `context_bar` [out, vectors]
// unless it is null.
template <typename T>
void reverse(const Mlp<T>& field, ActivateLayer<T> activate_layer,
             ReverseActivation<T> reverse_activation, const TimedLayer<T>* timed, const T* tau,
             const TileShape& shape, const TileConstants<T>& constants, T probe_weight,
             const Vec<T>* z, const Products<T>& products, const Vec<T>* f_bar,
             const Vec<T>* divergence_bar, const ReverseScratch<T>& scratch,
             const LayerGradient<T>* gradients, Vec<T>* first_bar, Vec<T>* context_bar,
             Vec<T>* z_bar) {
  const int64_t vectors = shape.vectors, tangents = shape.tangents, columns = shape.columns();
  const int last = field.layers - 1;
  Vec<T>* u = scratch.u[0];
  Vec<T>* other = scratch.u[1];

  // The last layer has no activation, and tangents whose cotangent is the probe's.
  {
    const auto rows = rows_of(products, constants, shape, last);
    const int64_t u_columns = last == 0 ? vectors : columns;
    for (int64_t o = 0; o < field.features; ++o) {
      const Vec<T> s = gate_of(timed[last], o);
      Vec<T> shift_sum = {}, product_sum = {};
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec<T> bar = f_bar[o * vectors + v];
        shift_sum += bar;
        product_sum += bar * rows.value[o * rows.value_stride + v];
        u[o * u_columns + v] = s * bar;
        for (int64_t k = v; k < tangents * vectors; k += vectors) {
          const Vec<T> tangent_bar =
              divergence_bar[v] * probe_weight * constants.probe[o * tangents * vectors + k];
          product_sum += tangent_bar * rows.tangent[o * rows.tangent_stride + k];
          if (last == 0) {
            first_bar[o * tangents * vectors + k] += s * tangent_bar;
          } else {
            u[o * columns + vectors + k] = s * tangent_bar;
          }
        }
      }
      scratch.shift_sums[o] = shift_sum;
      scratch.product_sums[o] = product_sum;
    }
  }
  add_time_gradients(field.layer[last], timed[last], tau, field.time_features, scratch,
                     gradients[last]);

  for (int l = last; l > 0; --l) {
    const auto& layer = field.layer[l];
    const auto rows = rows_of(products, constants, shape, l - 1);
    activate_layer(timed[l - 1], layer.in, shape, rows, scratch.x, scratch.slopes);
    add_weight_gradient(layer, u, scratch.x, columns, scratch.rows, gradients[l]);
    product(transposed_weight_of(layer), layer.in, layer.out, u, columns, 0, columns, other);
    const bool first = l == 1;
    reverse_activation(timed[l - 1], layer.in, shape, rows, scratch.x, scratch.slopes, other,
                       first ? u : other, first ? vectors : columns,
                       first ? first_bar : other + vectors, first ? tangents * vectors : columns,
                       first, scratch.shift_sums, scratch.product_sums);
    add_time_gradients(field.layer[l - 1], timed[l - 1], tau, field.time_features, scratch,
                       gradients[l - 1]);
    if (!first) {
      Vec<T>* swap = u;
      u = other;
      other = swap;
    }
  }

  const auto& layer = field.layer[0];
  if (context_bar != nullptr) {
    for (int64_t i = 0; i < layer.out * vectors; ++i) context_bar[i] += u[i];
  }
  add_weight_gradient(layer, u, z, vectors, scratch.rows, gradients[0]);
  product(transposed_weight_of(layer), layer.in, layer.out, u, vectors, 0, vectors, z_bar);
}
