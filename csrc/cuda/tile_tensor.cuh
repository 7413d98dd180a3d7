// The products of cuda/tile_product.cuh on tensor cores: operands are rounded as a Precision says,
// sums are in f32. Operands are f32 in shared memory, any sizes as there; a warp rounds them in
// registers.
//
// A warp makes a rectangle of the result, kRows times kColumns squares of 16 by 16, from blocks of
// its operands: 16 places (rows of one operand, columns of the other) by 8 terms of the sums. A lane
// holds places 2 g and 2 g + 1 and terms 2 t and 2 t + 1 of a block, g = lane / 4 and t = lane % 4.
// That is what the instructions want but for the numbers of places and terms, which are any as long
// as both operands have the same. So every load is a pair of neighbours, in whichever order a matrix
// lies, and as rows are odd multiples of 16 bytes apart, the 16 lanes that are served at a time
// reach for different banks.
//
// A block takes 2 loads of 8 bytes and serves as a 16 x 8 operand or as two of 8 x 8. With 2 x 2
// squares a step of 8 terms is 8 loads for 8 products in TF32 (for 24 with three each; for 4, of 16
// terms, in bf16), with 2 x 1 it is 6 for 4, with one 4 for 2.
#pragma once

#include "core/mlp_solve.h"
#include "cuda/tile_product.cuh"

namespace pycnf {

// One operand as it lies in memory.
struct Operand {
  const float* at;
  int stride;
  int places;
};

// Whether the terms of a sum are rows of the operand, or side by side in the rows of its places.
enum class Terms { kRows, kSideBySide };

// A lane's numbers of 16 places by 8 terms.
struct Block {
  float value[2][2];  // [place, term]
};

// Where a lane reads 16 places of an operand.
template <Terms kTerms>
struct BlockReader {
  const float* pair[2];
  int per_term;

  // The terms from `first` on; zeros behind the last, unless kWhole says that there are 8.
  template <bool kWhole>
  __device__ Block load(int first, int terms) const {
    const int mine = first + int(threadIdx.x) % 4 * 2;
    Block block;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int term = kTerms == Terms::kRows ? mine + i : mine;
      Group<float, 2> two = {};
      if (kWhole || term < terms) two = fetch<2>(pair[i] + first * per_term);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        (kTerms == Terms::kRows ? block.value[e][i] : block.value[i][e]) = two.value[e];
      }
    }
    return block;
  }
};

// Beyond the last place there is the last again: results that nobody keeps.
template <Terms kTerms>
__device__ BlockReader<kTerms> reader_of(const Operand& x, int first) {
  const int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  BlockReader<kTerms> reader;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kTerms == Terms::kRows) {
      reader.pair[i] = x.at + (2 * t + i) * x.stride + least(first + 2 * g, (x.places - 1) / 2 * 2);
    } else {
      reader.pair[i] = x.at + least(first + 2 * g + i, x.places - 1) * x.stride + 2 * t;
    }
  }
  reader.per_term = kTerms == Terms::kRows ? x.stride : 1;
  return reader;
}

// What a lane hands to an instruction: word[2 half + place], a half of the terms being one number or
// a word of two.
struct Words {
  uint32_t word[4];
};

// A lane's numbers of 16 places as a precision rounds them, over the terms of one step.
template <Precision kPrecision>
struct Rounded;

template <>
struct Rounded<Precision::kTf32> {
  static constexpr int kBlocks = 1;  // of a step
  Words x;

  __device__ void set(const Block (&block)[kBlocks]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x.word[i] = rounded_tf32(block[0].value[i % 2][i / 2]);
  }
};

// A number is large + small but for 22 bits behind the point.
template <>
struct Rounded<Precision::k3xTf32> {
  static constexpr int kBlocks = 1;
  Words large, small;

  __device__ void set(const Block (&block)[kBlocks]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = block[0].value[i % 2][i / 2];
      large.word[i] = rounded_tf32(x);
      small.word[i] = rounded_tf32(x - float_of(large.word[i]));
    }
  }
};

template <>
struct Rounded<Precision::kBf16> {
  static constexpr int kBlocks = 2;
  Words x;

  __device__ void set(const Block (&block)[kBlocks]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& pair = block[i / 2].value[i % 2];
      x.word[i] = rounded_pair<__nv_bfloat16>(pair[0], pair[1]);
    }
  }
};

// sum += a b over one step: 16 rows by twice 8 columns.
__device__ inline void multiply(const Words& a, const Words& b, float (&sum)[2][4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) multiply_add_tf32(sum[j], a.word, b.word[j], b.word[2 + j]);
}

__device__ inline void multiply(const Rounded<Precision::kTf32>& a,
                                const Rounded<Precision::kTf32>& b, float (&sum)[2][4]) {
  multiply(a.x, b.x, sum);
}

// Small times small is as small as what rounding leaves out.
__device__ inline void multiply(const Rounded<Precision::k3xTf32>& a,
                                const Rounded<Precision::k3xTf32>& b, float (&sum)[2][4]) {
  multiply(a.small, b.large, sum);
  multiply(a.large, b.small, sum);
  multiply(a.large, b.large, sum);
}

__device__ inline void multiply(const Rounded<Precision::kBf16>& a,
                                const Rounded<Precision::kBf16>& b, float (&sum)[2][4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) multiply_add_bf16(sum[j], a.x.word, b.x.word[j], b.x.word[2 + j]);
}

// put(row, column, sums of four columns) for all rows and groups of columns, columns being places
// of b.
template <Precision kPrecision, int kRows, int kColumns, Terms kTermsOfA, Terms kTermsOfB,
          typename Put>
__device__ void tensor_product_in(const Operand& a, const Operand& b, int terms, const Put& put) {
  constexpr int kBlocks = Rounded<kPrecision>::kBlocks, kStep = 8 * kBlocks;
  const int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int row_tiles = ceil_div(a.places, 16 * kRows);
  const int tiles = row_tiles * ceil_div(b.places, 16 * kColumns);
  for (int tile = int(threadIdx.x) / kWarp; tile < tiles; tile += int(blockDim.x) / kWarp) {
    const int first_row = tile % row_tiles * (16 * kRows);
    const int first_column = tile / row_tiles * (16 * kColumns);
    BlockReader<kTermsOfA> of_a[kRows];
    BlockReader<kTermsOfB> of_b[kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r) of_a[r] = reader_of<kTermsOfA>(a, first_row + 16 * r);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) of_b[c] = reader_of<kTermsOfB>(b, first_column + 16 * c);
    float sum[kRows][kColumns][2][4] = {};
    const auto step = [&](auto whole, int term) {
      Rounded<kPrecision> x[kRows], y[kColumns];
      const auto load = [&](const auto& reader, Rounded<kPrecision>& rounded) {
        Block block[kBlocks];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          block[i] = reader.template load<decltype(whole)::value>(term + 8 * i, terms);
        }
        rounded.set(block);
      };
#pragma unroll
      for (int r = 0; r < kRows; ++r) load(of_a[r], x[r]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) load(of_b[c], y[c]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) multiply(x[r], y[c], sum[r][c]);
      }
    };
    // The instructions are a whole warp's.
    warp_barrier();
    int term = 0;
#pragma unroll 2
    for (; term + kStep <= terms; term += kStep) step(std::true_type(), term);
    if (term < terms) step(std::false_type(), term);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int row = first_row + 16 * r + 2 * g + p;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          // A lane has columns 2 t and 2 t + 1 as an instruction numbers them, of two each: the
          // places 4 t to 4 t + 3.
          const int column = first_column + 16 * c + 4 * t;
          if (row >= a.places || column >= b.places) continue;
          Group<float, 4> four;
#pragma unroll
          for (int e = 0; e < 4; ++e) four.value[e] = sum[r][c][e % 2][2 * p + e / 2];
          put(row, column, four);
        }
      }
    }
  }
}

// Larger rectangles read less for each product, as long as every warp has one.
template <Precision kPrecision, Terms kTermsOfA, Terms kTermsOfB, typename Put>
__device__ void tensor_product(const Operand& a, const Operand& b, int terms, const Put& put) {
  const int rows = ceil_div(a.places, 16), columns = ceil_div(b.places, 16);
  const int row_pairs = ceil_div(rows, 2), warps = int(blockDim.x) / kWarp;
  if (columns > 1 && row_pairs * ceil_div(columns, 2) >= warps) {
    tensor_product_in<kPrecision, 2, 2, kTermsOfA, kTermsOfB>(a, b, terms, put);
  } else if (rows > 1 && row_pairs * columns >= warps) {
    tensor_product_in<kPrecision, 2, 1, kTermsOfA, kTermsOfB>(a, b, terms, put);
  } else {
    tensor_product_in<kPrecision, 1, 1, kTermsOfA, kTermsOfB>(a, b, terms, put);
  }
}

// ---- the products of cuda/tile_product.cuh, in a precision --------------------------------------

// y [out, count] = wᵀ x.
template <Precision kPrecision, typename T>
__device__ void product(const T* w, int w_stride, int out, int in, Columns<T> x, int count,
                        Columns<T> y) {
  if constexpr (kPrecision == Precision::kFloat32) {
    product(w, w_stride, out, in, x, count, y);
  } else {
    tensor_product<kPrecision, Terms::kRows, Terms::kRows>(
        {known_shared(w), w_stride, out}, {known_shared(x.at), x.stride, count}, in,
        [&](int o, int c, const Group<float, 4>& four) {
          store<4>(known_shared(y.row(o) + c), four);
        });
  }
}

// y [in, count] = w u. Behind the last output the weight has zeros, and the loads of u are masked.
template <Precision kPrecision, typename T>
__device__ void turned_product(const T* w, int w_stride, int out, int in, Columns<T> u, int count,
                               Columns<T> y) {
  if constexpr (kPrecision == Precision::kFloat32) {
    turned_product(w, w_stride, out, in, u, count, y);
  } else {
    tensor_product<kPrecision, Terms::kSideBySide, Terms::kRows>(
        {known_shared(w), w_stride, in}, {known_shared(u.at), u.stride, count}, out,
        [&](int i, int c, const Group<float, 4>& four) {
          store<4>(known_shared(y.row(i) + c), four);
        });
  }
}

// sum [in, sum_stride] += x uᵀ over `count` columns. Rows of sum begin at multiples of 16 bytes.
template <Precision kPrecision, typename T>
__device__ void add_outer(int out, int in, Columns<T> u, Columns<T> x, int count, T* sum,
                          int sum_stride) {
  if constexpr (kPrecision == Precision::kFloat32) {
    add_outer(out, in, u, x, count, sum, sum_stride);
  } else {
    tensor_product<kPrecision, Terms::kSideBySide, Terms::kSideBySide>(
        {known_shared(x.at), x.stride, in}, {known_shared(u.at), u.stride, out}, count,
        [&](int i, int o, const Group<float, 4>& four) {
          T* const to = sum + int64_t(i) * sum_stride + o;
          auto total = fetch<4>(to);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (o + e < out) total.value[e] += four.value[e];
          }
          store<4>(to, total);
        });
  }
}

}  // namespace pycnf
