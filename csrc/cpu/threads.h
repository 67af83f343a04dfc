// Static splitting of a task range over threads.
#pragma once

#include <stdint.h>

namespace qirl {

// Calls fn(context, begin, end) on disjoint ranges covering [0, tasks), on at most `threads`
// threads, each with at least `grain` tasks (fewer threads for small jobs; one: no thread at all).
void split_tasks(int64_t tasks, int64_t grain, int threads,
                 void (*fn)(const void* context, int64_t begin, int64_t end), const void* context);

}  // namespace qirl
