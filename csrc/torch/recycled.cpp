#include "torch/recycled.h"

#include <cstdlib>
#include <map>
#include <mutex>

namespace pycnf {
namespace {

constexpr size_t kMostBytes = size_t(256) << 20;
constexpr size_t kPage = 4096;

class Store {
 public:
  // Memory of at least `bytes`, and how much it is.
  std::pair<void*, size_t> take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.lower_bound(bytes);
      if (found != free_.end() && found->first <= 2 * bytes) {
        const std::pair<void*, size_t> taken = {found->second, found->first};
        bytes_ -= found->first;
        free_.erase(found);
        return taken;
      }
    }
    void* memory = std::aligned_alloc(kPage, bytes);
    TORCH_CHECK(memory != nullptr, "no memory for ", bytes, " bytes of kept stages");
    return {memory, bytes};
  }

  void give_back(void* memory, size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (bytes_ + bytes <= kMostBytes) {
        free_.emplace(bytes, memory);
        bytes_ += bytes;
        return;
      }
    }
    std::free(memory);
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  size_t bytes_ = 0;
};

Store& store() {
  static Store* const the = new Store;  // never destroyed: tensors may outlive everything
  return *the;
}

}  // namespace

at::Tensor recycled(int64_t count, at::TensorOptions options) {
  if (count == 0) return at::empty({0}, options);
  const size_t bytes = (size_t(count) * options.dtype().itemsize() + kPage - 1) / kPage * kPage;
  const auto [memory, size] = store().take(bytes);
  const auto release = [size = size](void* pointer) { store().give_back(pointer, size); };
  return at::from_blob(memory, {count}, release, options);
}

}  // namespace pycnf
