// What core/activation.h asks for, one number at a time. To be included within a namespace without a
// name, after cuda/device.cuh and core/elementary.h.

template <typename T>
using Vec = T;

template <typename T>
__device__ inline T splat(T x) {
  return x;
}

template <typename T>
__device__ inline T absolute(T x) {
  return x < T(0) ? -x : x;
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return ::exp(x); }
__device__ inline float exponential_less_one(float x) { return expm1f(x); }
__device__ inline double exponential_less_one(double x) { return ::expm1(x); }
__device__ inline float log_one_plus(float x) { return log1pf(x); }
__device__ inline double log_one_plus(double x) { return ::log1p(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return ::tanh(x); }

// For x <= 0.
template <typename T>
__device__ inline T exp_negative(T x) {
  return exponential(x);
}

// For x <= 0.
template <typename T>
__device__ inline T expm1_negative(T x) {
  return exponential_less_one(x);
}

// For 0 <= y <= 1.
template <typename T>
__device__ inline T log1p_unit(T y) {
  return log_one_plus(y);
}

template <typename T>
__device__ inline T tanh(T x) {
  return hyperbolic_tangent(x);
}

template <typename T>
__device__ inline T sigmoid(T x) {
  const T e = exp_negative<T>(-absolute<T>(x));
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}

template <typename T, typename Function>
__device__ inline T each_lane(T x, const Function& function) {
  return function(x);
}
