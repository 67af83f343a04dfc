#include "cpu/isa.h"

#include <string.h>

#include <atomic>

#include "cpu/threads.h"

namespace qirl {
namespace {

bool always() { return true; }

#if defined(QIRL_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

int best_isa() {
  int best = 0;
  for (int i = 0; i < kIsaCount; ++i) {
    if (kIsaTable[i].supported()) best = i;
  }
  return best;
}

std::atomic<int> forced{-1};
std::atomic<const char*> last{""};

struct Job {
  Kernel kernel;
  const void* args;
};

void run_job(const void* context, int64_t begin, int64_t end) {
  const Job& job = *static_cast<const Job*>(context);
  last.store(job.kernel(job.args, begin, end), std::memory_order_relaxed);
}

}  // namespace

const Isa kIsaTable[kIsaCount] = {
    {"base", always},
#if defined(QIRL_X86)
    {"avx2", has_avx2},
    {"avx512", has_avx512},
#endif
};

int active_isa() {
  static const int best = best_isa();
  const int chosen = forced.load(std::memory_order_relaxed);
  return chosen >= 0 ? chosen : best;
}

bool force_isa(const char* name) {
  if (name == nullptr) {
    forced.store(-1);
    return true;
  }
  for (int i = 0; i < kIsaCount; ++i) {
    if (strcmp(name, kIsaTable[i].name) == 0 && kIsaTable[i].supported()) {
      forced.store(i);
      return true;
    }
  }
  return false;
}

void run_kernel(const Kernel (&table)[kIsaCount], const void* args, int64_t tasks, int64_t grain,
                int threads) {
  const Job job{table[active_isa()], args};
  split_tasks(tasks, grain, threads, run_job, &job);
}

const char* last_isa() { return last.load(std::memory_order_relaxed); }

}  // namespace qirl
