// Vectors of the instruction set at hand, in the compiler's own notation, and the elementary
// functions on them. To be included within the namespace of an instruction set only.
//
// Bounds of the error, tested through the activations made of them over the whole range, in units of
// the last place: tanh, softplus, expm1 and x sigmoid(x) 4 in f32, 8 in f64; exponentials below the
// smallest normal number are 0.

#if defined(__AVX512F__)
#define PYCNF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PYCNF_VECTOR_BYTES 32
#else
#define PYCNF_VECTOR_BYTES 16
#endif

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(PYCNF_VECTOR_BYTES), may_alias));
  typedef int32_t Bits __attribute__((vector_size(PYCNF_VECTOR_BYTES), may_alias));
  static constexpr int kMantissa = 23;
  static constexpr float kRounder = 12582912.f;  // 1.5 * 2^23
  static constexpr float kLog2High = 0.693145751953125f, kLog2Low = 1.42860682030941723212e-6f;
  static constexpr float kSmallest = -87.3365478515625f, kLargest = 88.7228317260742f;
  static constexpr int kExpTerms = 7;
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(PYCNF_VECTOR_BYTES), may_alias));
  typedef int64_t Bits __attribute__((vector_size(PYCNF_VECTOR_BYTES), may_alias));
  static constexpr int kMantissa = 52;
  static constexpr double kRounder = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double kLog2High = 0.69314718036912381649, kLog2Low = 1.9082149292705877e-10;
  static constexpr double kSmallest = -708.396418532264, kLargest = 709.782712893384;
  static constexpr int kExpTerms = 13, kAtanhTerms = 17;
};

template <typename T>
using Vec = typename Simd<T>::Vector;

template <typename T>
constexpr int kLanes = PYCNF_VECTOR_BYTES / int(sizeof(T));

// `count` numbers in whole vectors.
template <typename T>
PYCNF_HD int64_t padded(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
PYCNF_HD Vec<T> splat(T x) {
  return x - Vec<T>{};  // keeps the sign of a zero
}

template <typename T>
PYCNF_HD Vec<T>* vectors(T* x) {
  return reinterpret_cast<Vec<T>*>(x);
}

// The vector that begins at x[i]; of whole vectors only.
template <typename T>
PYCNF_HD Vec<T>* vectors_at(T* x, int64_t i) {
  return vectors(x + i);
}

template <typename T>
PYCNF_HD Vec<T> load(const T* x, int64_t i) {
  return *reinterpret_cast<const Vec<T>*>(x + i);
}

// e^r - 1 = r (1 + r/2! + r²/3! + …) on |r| <= log(2)/2.
template <typename T>
PYCNF_HD Vec<T> expm1_near_zero(Vec<T> r) {
  constexpr int kTerms = Simd<T>::kExpTerms;
  struct Factors {
    T value[kTerms];
  };
  constexpr Factors factors = [] {
    Factors made = {};
    double factorial = 1;
    for (int k = 0; k < kTerms; ++k) made.value[k] = T(1 / (factorial *= k + 1));
    return made;
  }();
  Vec<T> sum = splat(factors.value[kTerms - 1]);
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * r + factors.value[k];
  return sum * r;
}

// x = n log(2) + r: returns r, and 2^n in `scale`. |n| within the exponents of normal numbers.
template <typename T>
PYCNF_HD Vec<T> reduce(Vec<T> x, Vec<T>& scale) {
  using S = Simd<T>;
  const Vec<T> shifted = x * T(1.4426950408889634074) + S::kRounder;
  const Vec<T> n = shifted - S::kRounder;
  const auto one = (typename S::Bits)splat(T(1));
  scale = (Vec<T>)(one + (((typename S::Bits)shifted - (typename S::Bits)splat(S::kRounder))
                          << S::kMantissa));
  return (x - n * S::kLog2High) - n * S::kLog2Low;
}

// e^x for x <= 0 (NaN stays NaN).
template <typename T>
PYCNF_HD Vec<T> exp_negative(Vec<T> x) {
  const auto tiny = x < Simd<T>::kSmallest;
  Vec<T> scale;
  const Vec<T> r = reduce<T>(tiny ? splat(Simd<T>::kSmallest) : x, scale);
  const Vec<T> result = expm1_near_zero<T>(r) * scale + scale;
  return tiny ? splat(T(0)) : result;
}

// e^x - 1 for x <= 0 (NaN stays NaN).
template <typename T>
PYCNF_HD Vec<T> expm1_negative(Vec<T> x) {
  // Below, e^x - 1 is -1 to the last digit.
  const T least = sizeof(T) == 4 ? T(-18) : T(-40);
  Vec<T> scale;
  const Vec<T> r = reduce<T>(x < least ? splat(least) : x, scale);
  return expm1_near_zero<T>(r) * scale + (scale - T(1));
}

// The bit of the sign, of every lane.
template <typename T>
PYCNF_HD typename Simd<T>::Bits sign_bits() {
  return (typename Simd<T>::Bits)splat(T(-0.));
}

template <typename T>
PYCNF_HD Vec<T> absolute(Vec<T> x) {
  return (Vec<T>)((typename Simd<T>::Bits)x & ~sign_bits<T>());
}

// Σ factors[k] x^k.
template <typename T, int kTerms>
PYCNF_HD Vec<T> polynomial(Vec<T> x, const T (&factors)[kTerms]) {
  Vec<T> sum = splat(factors[kTerms - 1]);
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * x + factors[k];
  return sum;
}

// log(1 + y) for 0 <= y <= 1: in f32 y times the minimax polynomial of log(1 + y) / y, of relative
// error 3e-8; in f64 2 atanh(y / (2 + y)).
template <typename T>
PYCNF_HD Vec<T> log1p_unit(Vec<T> y) {
  if constexpr (sizeof(T) == 4) {
    constexpr T factors[] = {0.999999969705f,  -0.49999493176f,   0.33319114061f,
                             -0.248431816243f, 0.191069160286f,   -0.136653348925f,
                             0.078251655546f,  -0.0295214181533f, 0.00523679047388f};
    return y * polynomial<T>(y, factors);
  } else {
    const Vec<T> s = y / (y + T(2));
    const Vec<T> q = s * s;
    Vec<T> sum = splat(T(1. / (2 * Simd<T>::kAtanhTerms - 1)));
#pragma GCC unroll 16
    for (int k = Simd<T>::kAtanhTerms - 2; k >= 0; --k) sum = sum * q + T(1. / (2 * k + 1));
    return (sum * s) * T(2);
  }
}

// In f32 x P(x²) / Q(x²), of relative error 2e-8 (fitted here, as the polynomial above; all terms
// are positive, so none cancel), and beyond 8.1, where 1 - tanh is 2e-7, ±1; in f64
// tanh |x| = -m / (2 + m), m = e^(-2|x|) - 1.
template <typename T>
PYCNF_HD Vec<T> tanh(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    constexpr T above[] = {0.999999979194f, 0.133796862334f, 0.00349399534847f, 2.05827910346e-5f,
                           1.33180650661e-8f};
    constexpr T below[] = {1.f, 0.467130015546f, 0.0258709278865f, 0.000328302653406f,
                           7.76161634888e-7f};
    using Bits = typename Simd<T>::Bits;
    const Vec<T> u = x * x;
    const Vec<T> t = x * polynomial<T>(u, above) / polynomial<T>(u, below);
    const auto one = (Vec<T>)(((Bits)x & sign_bits<T>()) | (Bits)splat(T(1)));
    return u > T(8.1f * 8.1f) ? one : t;
  } else {
    const Vec<T> m = expm1_negative<T>(absolute<T>(x) * T(-2));
    const Vec<T> t = m / (m + T(2));
    return x < T(0) ? t : -t;
  }
}

template <typename T>
PYCNF_HD Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_negative<T>(-absolute<T>(x));
  const Vec<T> one = splat(T(1));
  return (x < T(0) ? e : one) / (one + e);
}

// A function of the C library, lane by lane.
template <typename T, typename Function>
PYCNF_HD Vec<T> each_lane(Vec<T> x, const Function& function) {
  Vec<T> y = {};
  for (int lane = 0; lane < kLanes<T>; ++lane) y[lane] = function(x[lane]);
  return y;
}
