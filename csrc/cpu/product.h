// The three products of a layer over a tile of samples. To be included within the namespace of an
// instruction set only.
//
// A tile is feature-major: feature f of column c is the vector x[f * stride + c], one sample a lane.
// Columns are values and tangents side by side; to a product they are all the same.

// Outputs that are accumulated together, beside two columns: as many as the registers hold.
#if PYCNF_VECTOR_BYTES == 64
constexpr int kOutputs = 8;
#else
constexpr int kOutputs = 4;
#endif
constexpr int kColumns = 2;

// Element (o, i) of a weight, or of its transpose.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row;     // from o to o + 1
  int64_t column;  // from i to i + 1
};

// Inputs that are taken at a time: as many as keep their part of x in the first cache.
constexpr int64_t kInputs = 192;

template <typename T, int kOut, int kCol>
PYCNF_HD void product_block(const Matrix<T>& w, const Vec<T>* x, int64_t x_stride, int64_t in,
                            bool add, Vec<T>* y, int64_t y_stride) {
  Vec<T> sum[kOut][kCol] = {};
  for (int o = 0; add && o < kOut; ++o) {
    for (int c = 0; c < kCol; ++c) sum[o][c] = y[o * y_stride + c];
  }
  const T* row = w.data;
  for (int64_t i = 0; i < in; ++i) {
    Vec<T> a[kCol];
#pragma GCC unroll 4
    for (int c = 0; c < kCol; ++c) a[c] = x[i * x_stride + c];
#pragma GCC unroll 8
    for (int o = 0; o < kOut; ++o) {
      const Vec<T> weight = splat(row[o * w.row]);
#pragma GCC unroll 4
      for (int c = 0; c < kCol; ++c) sum[o][c] += weight * a[c];
    }
    row += w.column;
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOut; ++o) {
#pragma GCC unroll 4
    for (int c = 0; c < kCol; ++c) y[o * y_stride + c] = sum[o][c];
  }
}

template <typename T, int kOut>
PYCNF_HD void product_rows(const Matrix<T>& w, const Vec<T>* x, int64_t x_stride, int64_t in,
                           int64_t count, bool add, Vec<T>* y, int64_t y_stride) {
  int64_t c = 0;
  for (; c + kColumns <= count; c += kColumns) {
    product_block<T, kOut, kColumns>(w, x + c, x_stride, in, add, y + c, y_stride);
  }
  if (c < count) product_block<T, kOut, 1>(w, x + c, x_stride, in, add, y + c, y_stride);
}

template <typename T>
PYCNF_HD void product_of_inputs(const Matrix<T>& w, int64_t out, int64_t in, const Vec<T>* x,
                                int64_t x_stride, int64_t count, bool add, Vec<T>* y,
                                int64_t y_stride) {
  int64_t o = 0;
  for (; o + kOutputs <= out; o += kOutputs) {
    product_rows<T, kOutputs>({w.data + o * w.row, w.row, w.column}, x, x_stride, in, count, add,
                              y + o * y_stride, y_stride);
  }
  const Matrix<T> rest = {w.data + o * w.row, w.row, w.column};
  switch (out - o) {
    case 0:
      break;
    case 1:
      product_rows<T, 1>(rest, x, x_stride, in, count, add, y + o * y_stride, y_stride);
      break;
    case 2:
      product_rows<T, 2>(rest, x, x_stride, in, count, add, y + o * y_stride, y_stride);
      break;
    case 3:
      product_rows<T, 3>(rest, x, x_stride, in, count, add, y + o * y_stride, y_stride);
      break;
    case 4:
      product_rows<T, 4>(rest, x, x_stride, in, count, add, y + o * y_stride, y_stride);
      break;
    case 5:
      product_rows<T, 5>(rest, x, x_stride, in, count, add, y + o * y_stride, y_stride);
      break;
    case 6:
      product_rows<T, 6>(rest, x, x_stride, in, count, add, y + o * y_stride, y_stride);
      break;
    default:
      product_rows<T, 7>(rest, x, x_stride, in, count, add, y + o * y_stride, y_stride);
  }
}

// y[o] = Σ_i w(o, i) x[i] for `count` columns; rows of x and y are their strides apart.
template <typename T>
void product(const Matrix<T>& w, int64_t out, int64_t in, const Vec<T>* x, int64_t x_stride,
             int64_t count, Vec<T>* y, int64_t y_stride) {
  // A last block that is nearly empty would cost a pass over y.
  const int64_t blocks = in <= kInputs + kInputs / 2 ? 1 : (in + kInputs - 1) / kInputs;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * in / blocks, end = (b + 1) * in / blocks;
    product_of_inputs<T>({w.data + begin * w.column, w.row, w.column}, out, end - begin,
                         x + begin * x_stride, x_stride, count, b > 0, y, y_stride);
  }
}

// ---- transposition ------------------------------------------------------------------------------

// A square of lanes: vector i of `square` gets lane i of every vector. One butterfly a bit of the
// lane's number.
template <typename T>
PYCNF_HD void transpose_square(Vec<T>* square) {
  constexpr int kSize = kLanes<T>;
  using Bits = typename Simd<T>::Bits;
#pragma GCC unroll 4
  for (int bit = 1; bit < kSize; bit *= 2) {
    Bits low = {}, high = {};
#pragma GCC unroll 16
    for (int lane = 0; lane < kSize; ++lane) {
      low[lane] = (lane & bit) ? kSize + (lane ^ bit) : lane;
      high[lane] = (lane & bit) ? kSize + lane : (lane ^ bit);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) {
      if ((i & bit) != 0) continue;
      const Vec<T> a = square[i], b = square[i + bit];
      square[i] = __builtin_shuffle(a, b, low);
      square[i + bit] = __builtin_shuffle(a, b, high);
    }
  }
}

// From feature-major to sample-major: y[sample * stride + f] = lane `sample` of x[f * columns] for
// `features` features, those up to the next whole vector 0.
template <typename T>
void transpose(const Vec<T>* x, int64_t features, int64_t columns, int64_t stride, T* y) {
  constexpr int kSize = kLanes<T>;
  for (int64_t f = 0; f < features; f += kSize) {
    Vec<T> square[kSize];
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) {
      square[i] = f + i < features ? x[(f + i) * columns] : splat(T(0));
    }
    transpose_square<T>(square);
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) *vectors(y + i * stride + f) = square[i];
  }
}

// The sums over the lanes of `count` <= kLanes vectors, one a lane; x is used up.
template <typename T>
PYCNF_HD Vec<T> sum_over_lanes(Vec<T>* x) {
  transpose_square<T>(x);
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

// ---- outer product ------------------------------------------------------------------------------

template <typename T, int kRow, int kVec>
PYCNF_HD void outer_block(const T* u, int64_t u_stride, const T* a, int64_t stride, int64_t samples,
                          T* sum, int64_t sum_stride) {
  // From zero, not from what is there: a sum of sums of tiles rounds less.
  Vec<T> total[kRow][kVec] = {};
  for (int64_t r = 0; r < samples; ++r) {
    Vec<T> row[kVec];
#pragma GCC unroll 4
    for (int q = 0; q < kVec; ++q) row[q] = reinterpret_cast<const Vec<T>*>(a + r * stride)[q];
#pragma GCC unroll 8
    for (int p = 0; p < kRow; ++p) {
      const Vec<T> scalar = splat(u[p * u_stride + r]);
#pragma GCC unroll 4
      for (int q = 0; q < kVec; ++q) total[p][q] += scalar * row[q];
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kRow; ++p) {
#pragma GCC unroll 4
    for (int q = 0; q < kVec; ++q) vectors(sum + p * sum_stride)[q] += total[p][q];
  }
}

template <typename T, int kRow>
PYCNF_HD void outer_rows(const T* u, int64_t u_stride, const T* a, int64_t stride, int64_t samples,
                         T* sum, int64_t sum_stride) {
  constexpr int kSize = kLanes<T>;
  int64_t q = 0;
  for (; q + 2 * kSize <= sum_stride; q += 2 * kSize) {
    outer_block<T, kRow, 2>(u, u_stride, a + q, stride, samples, sum + q, sum_stride);
  }
  if (q < sum_stride) {
    outer_block<T, kRow, 1>(u, u_stride, a + q, stride, samples, sum + q, sum_stride);
  }
}

// sum[p, q] += Σ_r u[p, r] a[r, q] over `samples` (columns and lanes), u feature-major with rows
// `u_stride` numbers apart and a sample-major; rows of `sum` are `sum_stride` long, whole vectors.
template <typename T>
void outer(const T* u, int64_t u_stride, int64_t rows, const T* a, int64_t stride, int64_t samples,
           T* sum, int64_t sum_stride) {
  int64_t p = 0;
  // A row alone would wait for its own sums.
  const auto take = [&](auto count) {
    for (; p + count <= rows; p += count) {
      outer_rows<T, count>(u + p * u_stride, u_stride, a, stride, samples, sum + p * sum_stride,
                           sum_stride);
    }
  };
  take(std::integral_constant<int, kOutputs>());
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
}
