// Runs CUDA kernels on the host, for tests: every thread of a block is a fiber of one OS thread
// that switches at barriers and warp exchanges. run.cpp says what is checked.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace qirl::emulate {

struct Site {
  const char* file;
  int line;
};

// body() for every thread of every block; 0, or a cudaError_t whose text failure() holds.
int run_grid(dim3 grid, dim3 block, void (*call)(const void*), const void* body);

template <class Body>
int run(dim3 grid, dim3 block, const Body& body) {
  return run_grid(grid, block, [](const void* b) { (*(const Body*)b)(); }, &body);
}

const char* failure();
void seed(uint64_t value);  // of the order in which blocks and threads run

// Inside a kernel. barrier: how many threads passed a predicate other than 0.
int barrier(Site site, int predicate = 0);
enum class Exchange { kShuffle, kBallot };
uint64_t exchange(Site site, Exchange kind, unsigned mask, uint64_t value, int source_lane);
int lane();
void require_aligned(const void* p, int bytes);

template <class T>
T shuffle(Site site, unsigned mask, T value, int source_lane) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "as CUDA's shuffles");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(site, Exchange::kShuffle, mask, bits, source_lane);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Lanes outside the group of `width` give the lane's own value, as in CUDA.
template <class T>
T shuffle_xor(Site site, unsigned mask, T value, int lanes, int width = 32) {
  const int to = lane() ^ lanes;
  return shuffle(site, mask, value, to / width > lane() / width ? lane() : to);
}

template <class T>
T shuffle_down(Site site, unsigned mask, T value, unsigned lanes, int width = 32) {
  const int to = lane() + (int)lanes;
  return shuffle(site, mask, value, to / width != lane() / width ? lane() : to);
}

template <class T>
T shuffle_up(Site site, unsigned mask, T value, unsigned lanes, int width = 32) {
  const int to = lane() - (int)lanes;
  return shuffle(site, mask, value, to < lane() / width * width ? lane() : to);
}

template <class T>
T shuffle_from(Site site, unsigned mask, T value, int source, int width = 32) {
  return shuffle(site, mask, value, lane() / width * width + (source & (width - 1)));
}

}  // namespace qirl::emulate
