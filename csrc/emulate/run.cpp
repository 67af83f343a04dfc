// The scheduler. What it makes visible, beyond wrong results:
//   - shared memory is NaN (all ones) when a block starts, so a read of what nobody wrote shows;
//   - blocks run in a shuffled order and threads of a block too, another one at each launch
//   (seeded:
//     a failure repeats), so a missing barrier or a dependence between blocks shows;
//   - threads that wait for ever, at a barrier that others left out or left behind by `return`, or
//     in a warp exchange whose mask names lanes that do not come, are an error that names the line;
//   - a misaligned vector access is an error.
#include "emulate/run.h"

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "emulate/fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace qirl::emulate {
namespace {

constexpr int kWarp = 32, kLaunchFailure = 719, kInvalidConfiguration = 9;

enum class State : uint8_t { kReady, kBarrier, kExchange, kDone };

struct Thread {
  State state = State::kReady;
  Fiber* fiber = nullptr;
  Site site{};
  Exchange kind{};
  unsigned mask = 0;
  int source = 0;
  uint64_t value = 0, result = 0;
};

struct Runner {
  std::vector<Thread> threads;
  std::vector<unsigned> order;
  std::vector<Fiber*> free_fibers;
  void (*call)(const void*) = nullptr;
  const void* body = nullptr;
  unsigned current = 0;
  uint64_t random = 1;
  std::string failure;
  bool failed = false;
};

Runner runner;
thread_local volatile char tls_marker;  // makes the TLS block of this library exist

uint64_t next_random() {  // splitmix64
  uint64_t z = (runner.random += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void shuffle_order(std::vector<unsigned>& order, unsigned count) {
  order.resize(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

struct SharedMemory {
  void* start = nullptr;
  size_t bytes = 0;
};

SharedMemory shared_memory() {
  tls_marker = 1;
  SharedMemory found;
  const auto look = [](dl_phdr_info* info, size_t, void* out) -> int {
    bool ours = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      const uintptr_t start = info->dlpi_addr + header.p_vaddr, here = (uintptr_t)&runner;
      if (header.p_type == PT_LOAD && here >= start && here < start + header.p_memsz) ours = true;
      if (header.p_type == PT_TLS) bytes = header.p_memsz;
    }
    if (!ours) return 0;
    *(SharedMemory*)out = {info->dlpi_tls_data, bytes};
    return 1;
  };
  dl_iterate_phdr(look, &found);
  if (found.start == nullptr) {
    std::fprintf(stderr, "CUDA emulator: no TLS block found\n");
    std::abort();
  }
  return found;
}

void fail(const std::string& what, Site site) {
  if (runner.failed) return;
  runner.failed = true;
  runner.failure = what;
  if (site.file != nullptr) {
    runner.failure += " at " + std::string(site.file) + ":" + std::to_string(site.line);
  }
  runner.failure += ", block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
                    ", " + std::to_string(blockIdx.z) + ")";
}

bool same(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

std::string name_of(unsigned thread) { return "thread " + std::to_string(thread); }

void enter_thread() {  // what a fiber runs, once for each thread it is given
  runner.call(runner.body);
  runner.threads[runner.current].state = State::kDone;
}

void resume(unsigned t) {
  Thread& thread = runner.threads[t];
  if (thread.fiber == nullptr) {
    if (runner.free_fibers.empty()) runner.free_fibers.push_back(new Fiber(enter_thread));
    thread.fiber = runner.free_fibers.back();
    runner.free_fibers.pop_back();
  }
  runner.current = t;
  const unsigned x = blockDim.x, y = blockDim.y;
  threadIdx = {t % x, t / x % y, t / x / y};
  thread.fiber->enter();
  if (thread.state == State::kDone) {
    runner.free_fibers.push_back(thread.fiber);
    thread.fiber = nullptr;
  }
}

// Delivers the exchange of one warp when all the lanes of its mask wait in it.
void deliver(unsigned first_thread) {
  std::vector<Thread>& all = runner.threads;
  for (int leader = 0; leader < kWarp; ++leader) {
    if (first_thread + leader >= all.size()) return;
    const Thread asked = all[first_thread + leader];
    if (asked.state != State::kExchange) continue;
    bool complete = true;
    for (int i = 0; i < kWarp; ++i) {
      if (!(asked.mask >> i & 1)) continue;
      if (first_thread + i >= all.size() || all[first_thread + i].state == State::kDone) {
        return fail("a warp exchange waits for lane " + std::to_string(i) +
                        ", which has left or does not exist,",
                    asked.site);
      }
      const Thread& other = all[first_thread + i];
      complete = complete && other.state == State::kExchange && same(other.site, asked.site) &&
                 other.mask == asked.mask;
    }
    if (!complete) continue;
    uint64_t ballot = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (asked.mask >> i & 1 && all[first_thread + i].value != 0) ballot |= 1ull << i;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (!(asked.mask >> i & 1)) continue;
      Thread& thread = all[first_thread + i];
      if (asked.kind == Exchange::kShuffle && !(asked.mask >> thread.source & 1)) {
        return fail("a shuffle reads lane " + std::to_string(thread.source) +
                        ", which its mask leaves out,",
                    asked.site);
      }
      thread.result =
          asked.kind == Exchange::kBallot ? ballot : all[first_thread + thread.source].value;
      thread.state = State::kReady;
    }
  }
}

void release_barrier() {
  std::vector<Thread>& all = runner.threads;
  uint64_t passed = 0;
  for (const Thread& thread : all) {
    if (thread.state != State::kBarrier) return;
    passed += thread.value != 0;
  }
  for (unsigned t = 1; t < all.size(); ++t) {
    if (same(all[t].site, all[0].site)) continue;
    return fail(name_of(0) + " and " + name_of(t) + " wait at different barriers, one",
                all[t].site);
  }
  for (Thread& thread : all) {
    thread.result = passed;
    thread.state = State::kReady;
  }
}

void report_stuck() {
  unsigned done = 0, waiting = 0;
  for (unsigned t = 0; t < runner.threads.size(); ++t) {
    if (runner.threads[t].state == State::kDone) ++done;
    if (runner.threads[t].state != State::kDone) waiting = t;
  }
  const Thread& thread = runner.threads[waiting];
  fail(name_of(waiting) +
           (thread.state == State::kBarrier ? " waits in __syncthreads"
                                            : " waits in a warp exchange") +
           " for ever (" + std::to_string(done) + " of " + std::to_string(runner.threads.size()) +
           " threads have left)",
       thread.site);
}

void run_block() {
  std::vector<Thread>& all = runner.threads;
  for (Thread& thread : all) thread.state = State::kReady;
  for (;;) {
    unsigned done = 0;
    bool ran = false;
    for (const unsigned t : runner.order) {
      if (all[t].state == State::kReady) {
        resume(t);
        ran = true;
        if (runner.failed) return;
      }
      done += all[t].state == State::kDone;
    }
    if (done == all.size()) return;
    if (!ran) return report_stuck();
    for (unsigned t = 0; t < all.size(); t += kWarp) deliver(t);
    release_barrier();
    if (runner.failed) return;
  }
}

uint64_t wait(State state, Site site) {
  Thread& thread = runner.threads[runner.current];
  thread.state = state;
  thread.site = site;
  thread.fiber->leave();
  return runner.threads[runner.current].result;
}

// From inside a kernel: the thread stops where it is.
void fail_here(const std::string& what, Site site) {
  fail(name_of(runner.current) + what, site);
  for (;;) wait(State::kBarrier, site);
}

}  // namespace

const char* failure() { return runner.failure.c_str(); }
void seed(uint64_t value) { runner.random = value; }
int lane() { return (int)(runner.current % kWarp); }

int barrier(Site site, int predicate) {
  runner.threads[runner.current].value = (uint64_t)predicate;
  return (int)wait(State::kBarrier, site);
}

uint64_t exchange(Site site, Exchange kind, unsigned mask, uint64_t value, int source_lane) {
  Thread& thread = runner.threads[runner.current];
  if (!(mask >> lane() & 1)) {
    fail_here(" is not in the mask of its warp exchange", site);
  }
  thread.kind = kind;
  thread.mask = mask;
  thread.value = value;
  thread.source = source_lane;
  return wait(State::kExchange, site);
}

void require_aligned(const void* p, int bytes) {
  if ((uintptr_t)p % (unsigned)bytes == 0) return;
  fail_here(" accesses " + std::to_string(bytes) + " bytes at a misaligned address", Site{});
}

int run_grid(dim3 grid, dim3 block, void (*call)(const void*), const void* body) {
  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > 1024 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || block.z > 64) {
    return kInvalidConfiguration;
  }
  static const SharedMemory shared = shared_memory();
  runner.failed = false;
  runner.call = call;
  runner.body = body;
  gridDim = grid;
  blockDim = block;
  runner.threads.assign(threads, Thread{});
  std::vector<unsigned> block_order;
  shuffle_order(block_order, (unsigned)blocks);
  shuffle_order(runner.order, (unsigned)threads);
  for (const unsigned b : block_order) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    memset(shared.start, 0xff, shared.bytes);
    run_block();
    if (!runner.failed) continue;
    for (Thread& thread : runner.threads) delete thread.fiber;  // stacks of abandoned threads
    return kLaunchFailure;
  }
  return 0;
}

}  // namespace qirl::emulate
