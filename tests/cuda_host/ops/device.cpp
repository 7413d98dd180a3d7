// A device for torch whose memory is the host's, under torch's key for devices it does not know.
// Tensors there are told from the CPU's, so what has to be on a GPU is checked as it is with one.
//
// Memory begins as NaN, so that a result which nobody wrote shows, and lies between guards, which
// are looked at by cuda_host_broken_guards(). What torch does with tensors besides allocating,
// viewing and copying is done on the CPU, with copies to it and back. There are no gradients.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <set>

namespace {

const at::Device kDevice(at::kPrivateUse1, 0);

// ---- memory -------------------------------------------------------------------------------------

constexpr size_t kGuard = 512;  // also the alignment, as of torch's allocator for GPUs
int64_t freed_with_broken_guards = 0;
std::set<void*> allocated;

unsigned char pattern(size_t i) { return static_cast<unsigned char>(41 * i + 7); }

// Before the first guard.
struct Header {
  size_t bytes;
};

// [header, padding] [guard] [memory] [guard]
bool is_broken(void* start) {
  auto* memory = static_cast<unsigned char*>(start) + 2 * kGuard;
  const size_t bytes = static_cast<Header*>(start)->bytes;
  for (size_t i = 0; i < kGuard; ++i) {
    if (memory[i - kGuard] != pattern(i) || memory[bytes + i] != pattern(i)) return true;
  }
  return false;
}

void free_memory(void* start) {
  freed_with_broken_guards += is_broken(start) ? 1 : 0;
  allocated.erase(start);
  std::free(start);
}

struct Memory final : c10::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &free_nothing, kDevice};
    void* start = nullptr;
    TORCH_CHECK(posix_memalign(&start, kGuard, bytes + 3 * kGuard) == 0, "out of memory");
    static_cast<Header*>(start)->bytes = bytes;
    auto* memory = static_cast<unsigned char*>(start) + 2 * kGuard;
    for (size_t i = 0; i < kGuard; ++i) memory[i - kGuard] = memory[bytes + i] = pattern(i);
    std::fill_n(memory, bytes, 0xff);  // as numbers of every width: NaN
    allocated.insert(start);
    return {memory, start, &free_memory, kDevice};
  }

  static void free_nothing(void*) {}
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::copy_n(static_cast<const char*>(from), bytes, static_cast<char*>(to));
  }
};

Memory memory;

// The same memory as a CPU's tensor.
at::Tensor as_cpu(const at::Tensor& x) {
  if (x.is_cpu()) return x;
  return at::from_blob(
      x.data_ptr(), x.sizes(), x.strides(), [x](void*) {},
      at::device(at::kCPU).dtype(x.scalar_type()));
}

// ---- torch's ops --------------------------------------------------------------------------------

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys,
                                           c10::dtype_or_default(dtype));
}

// Copies between host and device, and what is done on the CPU: there a host would wait for a GPU.
int64_t waits = 0;

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  waits += from.device() == to.device() ? 0 : 1;
  as_cpu(to).copy_(as_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) {
    const auto resized = at::empty(from.sizes(), to.options());
    to.unsafeGetTensorImpl()->set_storage_keep_dtype(resized.storage());
    to.unsafeGetTensorImpl()->set_sizes_contiguous(from.sizes());
  }
  return copy_from(from, to, false);
}

// Of halves, with sums in f32: an op that a CPU does not have.
at::Tensor& product_of_halves(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                              at::Tensor& out) {
  as_cpu(out).copy_(at::mm(as_cpu(a).to(dtype), as_cpu(b).to(dtype)));
  return out;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++waits;
  at::native::cpu_fallback(op, stack);
}

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::NoOpDeviceGuardImpl<at::kPrivateUse1>)

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("mm.dtype_out", product_of_halves);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

extern "C" {
int64_t cuda_host_broken_guards() {
  return freed_with_broken_guards + std::count_if(allocated.begin(), allocated.end(), is_broken);
}

int64_t cuda_host_waits() { return waits; }
}
