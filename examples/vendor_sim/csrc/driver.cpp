#include "driver.h"

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <iterator>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>
#include <utility>

namespace sim {
namespace {

constexpr std::size_t kCapacity = std::size_t{16} << 30;  // bytes of device memory
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kQueueDepth = 4096;

char* reserve(int protection) {
  void* p =
      mmap(nullptr, kCapacity, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    throw std::runtime_error("sim: cannot reserve address space for device memory");
  return static_cast<char*>(p);
}

class Heap {
 public:
  Heap() { free_[0] = kCapacity; }

  void* allocate(std::size_t bytes) {
    const std::size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    std::lock_guard lock(mutex_);
    auto hole = free_.begin();
    while (hole != free_.end() && hole->second < size) ++hole;
    if (hole == free_.end() || memory_.allocated + size > memory_.limit) {
      std::ostringstream text;
      text << "sim: out of memory: " << bytes << " bytes wanted, " << memory_.allocated << " of "
           << memory_.limit << " allocated; use a smaller batch or model";
      throw OutOfMemory(text.str());
    }
    const auto [offset, room] = *hole;
    free_.erase(hole);
    if (room > size) free_[offset + size] = room - size;
    used_[offset] = size;
    memory_.allocated += size;
    memory_.peak = std::max(memory_.peak, memory_.allocated);
    return window_ + offset;
  }

  void release(void* address) {
    std::lock_guard lock(mutex_);
    auto block = used_.find(static_cast<char*>(address) - window_);
    auto [offset, size] = *block;
    used_.erase(block);
    memory_.allocated -= size;
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + size) {
      size += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == offset) {
      std::prev(next)->second += size;
    } else {
      free_[offset] = size;
    }
  }

  void* resolve(const void* address, std::size_t bytes) {
    std::lock_guard lock(mutex_);
    const auto offset =
        reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(window_);
    auto block = used_.upper_bound(offset);
    if (offset >= kCapacity || block == used_.begin() ||
        (--block, offset + bytes > block->first + block->second)) {
      std::ostringstream text;
      text << "sim: " << bytes << " bytes at " << address
           << " are not allocated device memory; host pointers and "
           << "freed memory are refused: copy to the device first";
      throw std::runtime_error(text.str());
    }
    return storage_ + offset;
  }

  Memory memory() {
    std::lock_guard lock(mutex_);
    return memory_;
  }
  void set_limit(std::size_t bytes) {
    std::lock_guard lock(mutex_);
    memory_.limit = std::min(bytes, kCapacity);
  }
  void reset_peak() {
    std::lock_guard lock(mutex_);
    memory_.peak = memory_.allocated;
  }

 private:
  char* window_ = reserve(PROT_NONE);                // the addresses the host sees
  char* storage_ = reserve(PROT_READ | PROT_WRITE);  // the memory behind them
  std::map<std::size_t, std::size_t> free_, used_;   // offset -> bytes
  Memory memory_{0, 0, kCapacity};
  std::mutex mutex_;
};

struct Launch {
  std::string name;
  std::function<void()> kernel;
};

class Queue {
 public:
  Queue() { std::thread(&Queue::work, this).detach(); }

  void enqueue(Launch launch) {
    if (getpid() != owner_)
      throw std::runtime_error("sim: a forked process has no device; start it by spawn");
    std::unique_lock lock(mutex_);
    wait(lock, [&] { return queue_.size() < kQueueDepth; });
    queue_.push_back(std::move(launch));
    changed_.notify_all();
  }

  void synchronize() {
    std::unique_lock lock(mutex_);
    wait(lock, [&] { return queue_.empty(); });
    if (!error_) return;
    auto error = std::exchange(error_, nullptr);
    std::rethrow_exception(error);
  }

  void set_timeout(double seconds) {
    std::lock_guard lock(mutex_);
    timeout_ = std::chrono::duration<double>(seconds);
  }
  std::size_t pending() {
    std::lock_guard lock(mutex_);
    return queue_.size();
  }

  std::uint64_t resets() {
    std::lock_guard lock(mutex_);
    return resets_;
  }
  void block_until_reset(std::uint64_t since) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return resets_ != since; });
    if (!lost_.empty()) throw Lost(lost_);
  }

  void reset() {
    std::unique_lock lock(mutex_);
    ++resets_;
    changed_.notify_all();
    if (lost_.empty()) return;
    if (!queue_.empty()) queue_.erase(queue_.begin() + 1, queue_.end());
    changed_.wait(lock, [&] { return queue_.empty(); });
    lost_.clear();
    error_ = nullptr;
  }

 private:
  template <class Condition>
  void wait(std::unique_lock<std::mutex>& lock, Condition condition) {
    const bool met =
        changed_.wait_for(lock, timeout_, [&] { return !lost_.empty() || condition(); });
    if (!met) {
      std::ostringstream text;
      text << "sim: " << queue_.front().name << " did not finish within " << timeout_.count()
           << " s, the device counts as lost; reset it";
      lost_ = text.str();
    }
    if (!lost_.empty()) throw Lost(lost_);
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return !queue_.empty(); });
      auto kernel = lost_.empty() ? std::move(queue_.front().kernel) : [] {};
      lock.unlock();
      std::exception_ptr error;
      std::string lost;
      try {
        kernel();
      } catch (const Lost& e) {
        lost = e.what();
      } catch (...) {
        error = std::current_exception();
      }
      kernel = nullptr;  // frees its captures before it counts as done
      lock.lock();
      if (lost_.empty()) lost_ = lost;
      if (!error_) error_ = error;
      queue_.pop_front();
      changed_.notify_all();
    }
  }

  std::deque<Launch> queue_;  // the running one in front
  std::exception_ptr error_;
  std::string lost_;  // why; empty while the device works
  std::uint64_t resets_ = 0;
  std::chrono::duration<double> timeout_{30.0};
  const pid_t owner_ = getpid();
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Never destroyed: kernels and tensors may outlive static destructors.
Heap& heap() {
  static auto* instance = new Heap;
  return *instance;
}
Queue& queue() {
  static auto* instance = new Queue;
  return *instance;
}

}  // namespace

void* allocate(std::size_t bytes) { return heap().allocate(bytes); }
void release(void* address) noexcept { heap().release(address); }
void* resolve(const void* address, std::size_t bytes) { return heap().resolve(address, bytes); }
Memory memory() { return heap().memory(); }
void set_memory_limit(std::size_t bytes) { heap().set_limit(bytes); }
void reset_peak() { heap().reset_peak(); }
void enqueue(std::string name, std::function<void()> kernel) {
  queue().enqueue({std::move(name), std::move(kernel)});
}
void synchronize() { queue().synchronize(); }
void set_timeout(double seconds) { queue().set_timeout(seconds); }
std::size_t pending() { return queue().pending(); }
std::uint64_t resets() { return queue().resets(); }
void block_until_reset(std::uint64_t since) { queue().block_until_reset(since); }
void reset() { queue().reset(); }

}  // namespace sim
