// Products of matrices in shared memory by a block of threads. A thread makes a rectangle of the
// result in registers from groups of 16 bytes. Rows of a matrix are odd multiples of 16 bytes apart
// (cuda/mlp_layout.h).
//
// A weight is read as its transpose w [in, out], `w_stride` numbers from row to row, zeros behind the
// last output. Columns are a multiple of kFull.
#pragma once

#include "cuda/device.cuh"

namespace pycnf {

// One matrix of columns: rows `stride` apart.
template <typename T>
struct Columns {
  T* at;
  int stride;

  __device__ T* row(int i) const { return at + i * stride; }
  __device__ Columns from(int column) const { return {at + column, stride}; }
};

__device__ inline int ceil_div(int x, int y) { return (x + y - 1) / y; }

__device__ inline int least(int x, int y) { return x < y ? x : y; }

// A product with fewer results along the weight than this has its sums shared by so many neighbouring
// threads. Which terms a thread adds up depends on the weight alone, so that a column's result is the
// same whatever else is in the tile.
constexpr int kFewResults = 8, kSharers = 8;

// The sum over kParts neighbouring threads, for the first of them.
template <int kParts, typename T>
__device__ inline T shared_sum(T part) {
#pragma unroll
  for (int offset = kParts / 2; offset > 0; offset /= 2) part += shuffle_down(part, offset);
  return part;
}

// y [out, count] = wᵀ x. A thread's rectangle: kRows groups of kOut outputs times kGroups groups of
// kColumns columns; groups of one rectangle do not lie side by side, so that neighbouring threads
// read what does. kParts threads share it, each with every kParts-th term.
template <int kRows, int kGroups, int kOut, int kColumns, int kParts = 1, typename T>
__device__ void product_in(const T* w, int w_stride, int out, int in, Columns<T> x, int count,
                           Columns<T> y) {
  static_assert(kParts == 1 || (kRows == 1 && kGroups == 1));
  const int rows = ceil_div(out, kOut), groups = count / kColumns;
  const int row_tiles = ceil_div(rows, kRows), column_tiles = ceil_div(groups, kGroups);
  const int tiles = row_tiles * column_tiles, part = int(threadIdx.x) % kParts;
  for (int first = 0; first < tiles; first += int(blockDim.x) / kParts) {
    // Threads that share meet with their whole warp, also those without a rectangle.
    const int tile = first + int(threadIdx.x) / kParts;
    if (kParts == 1 && tile >= tiles) break;
    const int first_row = tile % row_tiles, first_group = tile / row_tiles;
    const T* from[kRows];
    const T* with[kGroups];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      from[r] = known_shared(w + least(first_row + r * row_tiles, rows - 1) * kOut);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      with[g] = known_shared(x.at + least(first_group + g * column_tiles, groups - 1) * kColumns);
    }
    T sum[kRows][kOut][kGroups][kColumns] = {};
#pragma unroll 4
    for (int i = part; i < in; i += kParts) {
      Group<T, kOut> a[kRows];
      Group<T, kColumns> b[kGroups];
#pragma unroll
      for (int r = 0; r < kRows; ++r) a[r] = fetch<kOut>(from[r] + i * w_stride);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) b[g] = fetch<kColumns>(with[g] + i * x.stride);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < kOut; ++e) {
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sum[r][e][g][c] += a[r].value[e] * b[g].value[c];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < kOut; ++e) {
        const int o = (first_row + r * row_tiles) * kOut + e;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const int group = first_group + g * column_tiles;
          Group<T, kColumns> result;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) result.value[c] = shared_sum<kParts>(sum[r][e][g][c]);
          if (part > 0 || o >= out || group >= groups) continue;
          store<kColumns>(known_shared(y.row(o) + group * kColumns), result);
        }
      }
    }
  }
}

// Larger rectangles read less for each product, as long as every thread has one.
template <typename T>
__device__ void product(const T* w, int w_stride, int out, int in, Columns<T> x, int count,
                        Columns<T> y) {
  constexpr int kWide = kFull<T>, kHalf = kWide / 2;
  const int groups = ceil_div(out, kWide) * (count / kWide), threads = int(blockDim.x);
  if (out <= kFewResults) {
    product_in<1, 1, kHalf, kWide, kSharers>(w, w_stride, out, in, x, count, y);
  } else if (groups >= 4 * threads) {
    product_in<2, 2, kWide, kWide>(w, w_stride, out, in, x, count, y);
  } else if (groups >= 2 * threads) {
    product_in<1, 2, kWide, kWide>(w, w_stride, out, in, x, count, y);
  } else if (groups >= threads) {
    product_in<1, 1, kWide, kWide>(w, w_stride, out, in, x, count, y);
  } else {
    product_in<1, 1, kWide, kHalf>(w, w_stride, out, in, x, count, y);
  }
}

// y [in, count] = w u. A thread's rectangle: kRows inputs times kGroups groups of columns; as above
// kParts threads share it.
template <int kRows, int kGroups, int kParts = 1, typename T>
__device__ void turned_product_in(const T* w, int w_stride, int out, int in, Columns<T> u,
                                  int count, Columns<T> y) {
  static_assert(kParts == 1 || kGroups == 1);
  constexpr int kWide = kFull<T>;
  const int groups = count / kWide;
  const int row_tiles = ceil_div(in, kRows), column_tiles = ceil_div(groups, kGroups);
  const int tiles = row_tiles * column_tiles, part = int(threadIdx.x) % kParts;
  for (int first = 0; first < tiles; first += int(blockDim.x) / kParts) {
    const int tile = first + int(threadIdx.x) / kParts;
    if (kParts == 1 && tile >= tiles) break;
    const int first_row = tile % row_tiles, first_group = tile / row_tiles;
    const T* from[kRows];
    const T* with[kGroups];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      from[r] = known_shared(w + least(first_row + r * row_tiles, in - 1) * w_stride);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      with[g] = known_shared(u.at + least(first_group + g * column_tiles, groups - 1) * kWide);
    }
    T sum[kRows][kGroups][kWide] = {};
    for (int o = part * kWide; o < out; o += kParts * kWide) {
      Group<T, kWide> a[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) a[r] = fetch<kWide>(from[r] + o);
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        // Behind the last output the weight has zeros; the last row again is as good as any.
        const int row = least(o + e, out - 1) * u.stride;
        Group<T, kWide> b[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) b[g] = fetch<kWide>(with[g] + row);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
#pragma unroll
            for (int c = 0; c < kWide; ++c) sum[r][g][c] += a[r].value[e] * b[g].value[c];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first_row + r * row_tiles;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int group = first_group + g * column_tiles;
        Group<T, kWide> result;
#pragma unroll
        for (int c = 0; c < kWide; ++c) result.value[c] = shared_sum<kParts>(sum[r][g][c]);
        if (part > 0 || i >= in || group >= groups) continue;
        store<kWide>(known_shared(y.row(i) + group * kWide), result);
      }
    }
  }
}

template <typename T>
__device__ void turned_product(const T* w, int w_stride, int out, int in, Columns<T> u, int count,
                               Columns<T> y) {
  const int groups = in * (count / kFull<T>), threads = int(blockDim.x);
  if (in <= kFewResults) {
    turned_product_in<1, 1, kSharers>(w, w_stride, out, in, u, count, y);
  } else if (groups >= 8 * threads) {
    turned_product_in<4, 2>(w, w_stride, out, in, u, count, y);
  } else if (groups >= 4 * threads) {
    turned_product_in<4, 1>(w, w_stride, out, in, u, count, y);
  } else if (groups >= 2 * threads) {
    turned_product_in<2, 1>(w, w_stride, out, in, u, count, y);
  } else {
    turned_product_in<1, 1>(w, w_stride, out, in, u, count, y);
  }
}

// sum [in, sum_stride] += x uᵀ over `count` columns; sum anywhere in memory. A thread's rectangle:
// kRows inputs times as many outputs.
template <int kRows, typename T>
__device__ void add_outer_in(int out, int in, Columns<T> u, Columns<T> x, int count, T* sum,
                             int sum_stride) {
  constexpr int kWide = kFull<T>;
  const int out_tiles = ceil_div(out, kRows), in_tiles = ceil_div(in, kRows);
  for (int tile = threadIdx.x; tile < out_tiles * in_tiles; tile += blockDim.x) {
    const int first_out = tile % out_tiles, first_in = tile / out_tiles;
    const T* from[kRows];
    const T* with[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      from[r] = known_shared(u.row(least(first_out + r * out_tiles, out - 1)));
      with[r] = known_shared(x.row(least(first_in + r * in_tiles, in - 1)));
    }
    T part[kRows][kRows] = {};
    for (int c = 0; c < count; c += kWide) {
      Group<T, kWide> a[kRows], b[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        a[r] = fetch<kWide>(from[r] + c);
        b[r] = fetch<kWide>(with[r] + c);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int o = 0; o < kRows; ++o) {
#pragma unroll
          for (int e = 0; e < kWide; ++e) part[i][o] += b[i].value[e] * a[o].value[e];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const int row = first_in + i * in_tiles, column = first_out + o * out_tiles;
        if (row < in && column < out) sum[int64_t(row) * sum_stride + column] += part[i][o];
      }
    }
  }
}

template <typename T>
__device__ void add_outer(int out, int in, Columns<T> u, Columns<T> x, int count, T* sum,
                          int sum_stride) {
  if (out * in >= 16 * int(blockDim.x)) {
    add_outer_in<4>(out, in, u, x, count, sum, sum_stride);
  } else {
    add_outer_in<2>(out, in, u, x, count, sum, sum_stride);
  }
}

}  // namespace pycnf
