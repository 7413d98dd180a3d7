// Activations φ with φ' and φ''. To be included within a namespace that has Vec<T> and the functions
// on it: that of an instruction set with cpu/simd.h, or the GPU's with cuda/scalar.cuh.

// φ(h), with φ'(h) in `slope`.
template <Activation kind, typename T>
PYCNF_HD Vec<T> activate(Vec<T> h, Vec<T>& slope) {
  const Vec<T> zero = splat(T(0)), one = splat(T(1));
  if constexpr (kind == Activation::kTanh) {
    const Vec<T> a = tanh<T>(h);
    slope = one - a * a;
    return a;
  } else if constexpr (kind == Activation::kSoftplus) {
    const Vec<T> e = exp_negative<T>(-absolute<T>(h));
    slope = (h < T(0) ? e : one) / (one + e);
    return (h < T(0) ? zero : h) + log1p_unit<T>(e);
  } else if constexpr (kind == Activation::kElu) {
    const Vec<T> below = expm1_negative<T>(h > T(0) ? zero : h);
    slope = h > T(0) ? one : below + one;
    return h > T(0) ? h : below;
  } else if constexpr (kind == Activation::kSilu) {
    const Vec<T> s = sigmoid<T>(h);
    const Vec<T> a = h * s;
    slope = s + a * (one - s);
    return a;
  } else if constexpr (kind == Activation::kSelu) {
    const T alpha = T(1.6732632423543772848170429916717);
    const T scale = T(1.0507009873554804934193349852946);
    const Vec<T> below = expm1_negative<T>(h > T(0) ? zero : h) * (scale * alpha);
    slope = h > T(0) ? splat(scale) : below + scale * alpha;
    return h > T(0) ? h * scale : below;
  } else if constexpr (kind == Activation::kRelu) {
    slope = h > T(0) ? one : zero;
    return h < T(0) ? zero : h;
  } else if constexpr (kind == Activation::kGelu) {
    const T root_half = T(0.70710678118654752440);
    const Vec<T> half = each_lane<T>(h * root_half, [](T x) { return normal_share(x); });
    const Vec<T> density = exp_negative<T>(h * h * T(-0.5)) * T(0.39894228040143267794);
    slope = half + h * density;
    return h * half;
  } else if constexpr (kind == Activation::kSin) {
    slope = each_lane<T>(h, [](T x) { return cosine(x); });
    return each_lane<T>(h, [](T x) { return sine(x); });
  } else if constexpr (kind == Activation::kSquare) {
    slope = h * T(2);
    return h * h;
  } else {
    static_assert(kind == Activation::kIdentity);
    slope = one;
    return h;
  }
}

// φ''(h), given a = φ(h) and φ'(h).
template <Activation kind, typename T>
PYCNF_HD Vec<T> curvature(Vec<T> h, Vec<T> a, Vec<T> slope) {
  const Vec<T> zero = splat(T(0)), one = splat(T(1));
  if constexpr (kind == Activation::kTanh) {
    return a * slope * T(-2);
  } else if constexpr (kind == Activation::kSoftplus) {
    return slope * (one - slope);
  } else if constexpr (kind == Activation::kElu || kind == Activation::kSelu) {
    return h > T(0) ? zero : slope;
  } else if constexpr (kind == Activation::kSilu) {
    const Vec<T> s = sigmoid<T>(h);
    return (one - s) * (s + slope - a * s);
  } else if constexpr (kind == Activation::kGelu) {
    return (T(2) - h * h) * exp_negative<T>(h * h * T(-0.5)) * T(0.39894228040143267794);
  } else if constexpr (kind == Activation::kSin) {
    return -a;
  } else if constexpr (kind == Activation::kSquare) {
    return splat(T(2));
  } else {
    return zero;
  }
}
