#include "grid.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"

namespace cuda_host {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr unsigned kWarp = 32;
// An H100's.
constexpr int kMostThreads = 1024;             // of a block
constexpr int kMostShared = 48 << 10;          // of a block that has not asked for more
constexpr int kMostSharedOptin = 227 << 10;    // of one that has
constexpr int kSharedOfSystem = 1 << 10;       // of every block besides
constexpr int kThreadsOfProcessor = 2048;      // of all blocks of a multiprocessor
constexpr int kSharedOfProcessor = 228 << 10;  // of theirs
constexpr int kBlocksOfProcessor = 32;
// Threads of a cooperative launch. Each takes two of the 65530 mappings that Linux gives a process.
constexpr unsigned kMostTogether = 24 << 10;
// Naps in a row, with nothing else happening, after which nothing else will.
constexpr int64_t kMostNaps = 1'000'000;

// What a thread waits for.
enum Wait { kNothing, kNap, kBlock, kGrid, kExchange, kEnd, kWaits };
constexpr const char* kWaitNames[kWaits] = {
    "run",
    "nap",
    "wait at a barrier",
    "wait at the grid's barrier",
    "wait for lanes of their warp",
    "have returned",
};

// The dynamic shared memory of a block between two guards.
class Shared {
 public:
  explicit Shared(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kGuard) {
    for (size_t i = 0; i < kGuard; ++i) memory_[i] = memory_[kGuard + bytes + i] = pattern(i);
    std::fill_n(begin(), bytes, 0xff);  // as f32 and f64: NaN
  }

  unsigned char* begin() { return memory_.data() + kGuard; }

  bool guards_are_whole() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (memory_[i] != pattern(i) || memory_[kGuard + bytes_ + i] != pattern(i)) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 1024;
  static unsigned char pattern(size_t i) { return static_cast<unsigned char>(37 * i + 11); }

  size_t bytes_;
  std::vector<unsigned char> memory_;  // aligned by 16, as operator new's is
};

struct Block {
  unsigned index;
  Shared shared;
  std::vector<uint32_t> at_exchange;  // a bit for each lane of each warp
  unsigned at_barrier = 0;
};

struct Thread {
  Fiber fiber;
  Block* block;
  unsigned index;
  size_t group;
  Wait wait;
  uint32_t mask;  // of an exchange, as the rest
  int source;     // the lane to read from, or kVote
  uint64_t value;
  uint64_t result;
};

constexpr int kVote = -1;

// SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
class Random {
 public:
  using result_type = uint64_t;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t(0); }

  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t operator()() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
  }

  size_t below(size_t count) { return size_t(((*this)() >> 32) * count >> 32); }

 private:
  uint64_t state_;
};

Random random(0);
std::string error;

const std::function<void()>* kernel_now;
Thread* current;
bool failed;
bool cooperative;
int multiprocessors = 4;
std::map<const void*, int> shared_optin;   // bytes that a kernel has asked for, be it less
std::deque<std::unique_ptr<Thread>> pool;  // kept from launch to launch, for their stacks

void suspend(Wait wait) {
  current->wait = wait;
  current->fiber.suspend();
}

void thread_main() {
  (*kernel_now)();
  suspend(kEnd);
}

std::vector<size_t> shuffled(size_t count) {
  std::vector<size_t> indices(count);
  for (size_t i = 0; i < count; ++i) indices[i] = i;
  std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

// Threads that can run. They are drawn at random from the first group that has any: where all are
// one group, they come forward evenly, and where every warp is a group, one of them gets as far
// ahead of the others as barriers let it.
class Ready {
 public:
  void set_groups(size_t count) {
    groups_.resize(count);
    first_ = count;
  }

  void put(Thread* thread) {
    groups_[thread->group].push_back(thread);
    first_ = std::min(first_, thread->group);
  }

  // Null if there is none.
  Thread* draw() {
    while (first_ < groups_.size() && groups_[first_].empty()) ++first_;
    if (first_ == groups_.size()) return nullptr;
    auto& group = groups_[first_];
    std::swap(group[random.below(group.size())], group.back());
    Thread* thread = group.back();
    group.pop_back();
    return thread;
  }

 private:
  std::vector<std::vector<Thread*>> groups_;
  size_t first_ = 0;  // those before have none
};

// The threads of blocks that run together.
class Crowd {
 public:
  Crowd(const std::vector<size_t>& indices, unsigned threads, size_t shared_bytes)
      : threads_(threads) {
    const size_t warps = (threads + kWarp - 1) / kWarp;
    for (const size_t index : indices) {
      blocks_.push_back({unsigned(index), Shared(shared_bytes), std::vector<uint32_t>(warps)});
    }
    // A group is a warp, which shows most, a block or all.
    const size_t groups_of_block = random.below(3) > 0 ? warps : 1;
    const bool together = groups_of_block == 1 && random.below(2) == 0;
    const auto place = shuffled(together ? 1 : indices.size() * groups_of_block);
    ready_.set_groups(place.size());
    const size_t all = indices.size() * threads;
    while (pool.size() < all) pool.push_back(std::make_unique<Thread>());
    for (size_t i = 0; i < all; ++i) {
      Thread* thread = pool[i].get();
      const size_t block = i / threads;
      thread->block = &blocks_[block];
      thread->index = unsigned(i % threads);
      const size_t of_block = groups_of_block == 1 ? 0 : thread->index / kWarp;
      thread->group = place[together ? 0 : block * groups_of_block + of_block];
      thread->fiber.restart(thread_main);
      all_.push_back(thread);
      release(*thread);
    }
  }

  // Whether all threads came to their end.
  bool run() {
    failed = false;
    int64_t naps = 0;
    while (Thread* thread = draw()) {
      resume(*thread);
      if (failed) return false;
      naps = thread->wait == kNap ? naps + 1 : 0;
      if (naps > kMostNaps) {
        error = "threads wait in a loop for what nobody will write: " + census();
        return false;
      }
      settle(*thread);
    }
    if (finished_ < all_.size()) {
      error = "threads wait for others that do not come: " + census();
      return false;
    }
    for (const Block& block : blocks_) {
      if (block.shared.guards_are_whole()) continue;
      error = "block " + std::to_string(block.index) + " has written outside of its shared memory";
      return false;
    }
    return true;
  }

 private:
  // Wakes those who nap when nobody else can run.
  Thread* draw() {
    if (Thread* thread = ready_.draw()) return thread;
    for (Thread* thread : napping_) release(*thread);
    napping_.clear();
    return ready_.draw();
  }

  void resume(Thread& thread) {
    current = &thread;
    thread.wait = kNothing;
    thread_index = {thread.index, 0, 0};
    block_index = {thread.block->index, 0, 0};
    thread.fiber.resume();
  }

  // Lets go whoever waited for this thread.
  void settle(Thread& thread) {
    switch (thread.wait) {
      case kBlock:
        if (++thread.block->at_barrier < threads_) return;
        thread.block->at_barrier = 0;
        release(first_of(*thread.block), threads_);
        return;
      case kGrid:
        if (++at_grid_barrier_ < all_.size()) return;
        at_grid_barrier_ = 0;
        release(0, all_.size());
        return;
      case kExchange:
        settle_exchange(thread);
        return;
      case kNap:
        napping_.push_back(&thread);
        return;
      default:
        ++finished_;
    }
  }

  void settle_exchange(const Thread& thread) {
    const uint32_t mask = thread.mask;
    const unsigned first = thread.index / kWarp * kWarp;
    const unsigned lanes = std::min(kWarp, threads_ - first);
    Thread* const* warp = &all_[first_of(*thread.block) + first];
    uint32_t& there = thread.block->at_exchange[first / kWarp];
    there |= 1u << (thread.index - first);
    if ((there & mask) != mask) return;
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      if (warp[lane]->mask != mask) return;
      votes |= (warp[lane]->value & 1u) << lane;
    }
    there &= ~mask;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      Thread& other = *warp[lane];
      other.result = other.source == kVote ? votes : warp[other.source]->value;
      release(other);
    }
  }

  void release(size_t first, size_t count) {
    for (size_t i = first; i < first + count; ++i) release(*all_[i]);
  }

  void release(Thread& thread) {
    thread.wait = kNothing;
    ready_.put(&thread);
  }

  size_t first_of(const Block& block) const { return size_t(&block - blocks_.data()) * threads_; }

  std::string census() const {
    size_t counts[kWaits] = {};
    for (const Thread* thread : all_) ++counts[thread->wait];
    std::string text;
    for (int wait = 0; wait < kWaits; ++wait) {
      if (counts[wait] == 0) continue;
      text += (text.empty() ? "" : ", ") + std::to_string(counts[wait]) + " " + kWaitNames[wait];
    }
    return text + (blocks_.size() == 1 ? " in block " + std::to_string(blocks_[0].index) : "");
  }

  unsigned threads_;
  std::vector<Block> blocks_;
  std::vector<Thread*> all_;  // block by block
  Ready ready_;
  std::vector<Thread*> napping_;
  size_t finished_ = 0;
  size_t at_grid_barrier_ = 0;
};

bool is_cooperative(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) return true;
  }
  return false;
}

int most_shared(const void* kernel) {
  const auto found = shared_optin.find(kernel);
  return found == shared_optin.end() ? kMostShared : found->second;
}

// How many blocks a multiprocessor holds at once, as far as threads and shared memory matter.
int blocks_of_processor(const void* kernel, unsigned threads, size_t shared_bytes) {
  if (threads == 0 || threads > unsigned(kMostThreads)) return 0;
  if (shared_bytes > size_t(most_shared(kernel))) return 0;
  const int by_threads = kThreadsOfProcessor / int((threads + kWarp - 1) / kWarp * kWarp);
  const int by_shared = kSharedOfProcessor / (int(shared_bytes) + kSharedOfSystem);
  return std::min({by_threads, by_shared, kBlocksOfProcessor});
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const void* address,
                const std::function<void()>& kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!flat || grid.x == 0 || grid.x > 0x7fffffffu || block.x == 0 ||
      block.x > unsigned(kMostThreads)) {
    error = "not a grid of blocks that can be launched";
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > size_t(most_shared(address))) {
    error = "more shared memory than the kernel has asked for";
    return cudaErrorInvalidValue;
  }
  cooperative = is_cooperative(config);
  const int held = blocks_of_processor(address, block.x, config.dynamicSmemBytes);
  if (cooperative && grid.x > unsigned(held * multiprocessors)) {
    error = "more blocks than run together";
    return cudaErrorCooperativeLaunchTooLarge;
  }
  if (cooperative && grid.x > kMostTogether / block.x) {
    error = "more threads than the stand-in can run together";
    return cudaErrorCooperativeLaunchTooLarge;
  }
  kernel_now = &kernel;
  grid_size = grid;
  block_size = block;
  const auto blocks = shuffled(grid.x);
  if (cooperative) {
    const bool done = Crowd(blocks, block.x, config.dynamicSmemBytes).run();
    return done ? cudaSuccess : cudaErrorLaunchFailure;
  }
  for (const size_t index : blocks) {
    if (!Crowd({index}, block.x, config.dynamicSmemBytes).run()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

void wait_for_block() { suspend(kBlock); }

void wait_for_grid() {
  if (!cooperative) fail("a grid barrier, but the launch is not cooperative");
  suspend(kGrid);
}

void nap() { suspend(kNap); }

uint64_t exchange(uint32_t mask, uint64_t value, int source) {
  const auto takes_part = [&](int lane) { return (mask >> lane & 1u) != 0; };
  if (!takes_part(int(current->index % kWarp))) fail("a lane is not in its own mask");
  if (source != kVote && !takes_part(source)) fail("a lane reads from a lane that takes no part");
  current->mask = mask;
  current->source = source;
  current->value = value;
  suspend(kExchange);
  return current->result;
}

uint32_t vote(uint32_t mask, bool value) { return uint32_t(exchange(mask, value, kVote)); }

void fail(const char* why) {
  error = why;
  failed = true;
  for (;;) suspend(kEnd);
}

unsigned char* shared_memory() { return current->block->shared.begin(); }

}  // namespace cuda_host

// What -fsanitize=alignment calls. A GPU stops there; a CPU need not care.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, uintptr_t) {
  cuda_host::fail("an access to memory that is not aligned for it");
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = cuda_host::kMostThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = cuda_host::kMostShared;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = cuda_host::kWarp;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_host::multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = cuda_host::kThreadsOfProcessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = cuda_host::kSharedOfProcessor;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_host::kMostSharedOptin;
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = cuda_host::kBlocksOfProcessor;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = cuda_host::kSharedOfSystem;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;  // a hint
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > cuda_host::kMostSharedOptin) {
    return cudaErrorInvalidValue;
  }
  cuda_host::shared_optin[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared_bytes) {
  if (threads <= 0) return cudaErrorInvalidValue;
  *blocks = cuda_host::blocks_of_processor(kernel, unsigned(threads), shared_bytes);
  return cudaSuccess;
}

void cuda_host_multiprocessors(int count) { cuda_host::multiprocessors = std::max(1, count); }

void cuda_host_seed(uint64_t seed) { cuda_host::random = cuda_host::Random(seed); }

const char* cuda_host_error() { return cuda_host::error.c_str(); }
