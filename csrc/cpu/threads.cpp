#include "cpu/threads.h"

#include <algorithm>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace qirl {

void split_tasks(int64_t tasks, int64_t grain, int threads,
                 void (*fn)(const void* context, int64_t begin, int64_t end), const void* context) {
  if (tasks <= 0) return;
  const int64_t useful = std::max<int64_t>(1, tasks / std::max<int64_t>(1, grain));
  const int team = static_cast<int>(std::min<int64_t>(std::max(threads, 1), useful));
  auto part = [&](int member, int members) {
    fn(context, tasks * member / members, tasks * (member + 1) / members);
  };
  if (team == 1) {
    part(0, 1);
    return;
  }
#if defined(_OPENMP)
  // The runtime may grant fewer threads than asked for: split over those that came.
#pragma omp parallel num_threads(team)
  part(omp_get_thread_num(), omp_get_num_threads());
#else
  std::vector<std::thread> helpers;
  helpers.reserve(team - 1);
  for (int member = 1; member < team; ++member) helpers.emplace_back(part, member, team);
  part(0, team);
  for (std::thread& helper : helpers) helper.join();
#endif
}

}  // namespace qirl
