// Memory pages under large outputs.
#pragma once

#include <stdint.h>

namespace qirl {

// Asks for huge pages under an output of `bytes`, 8 MiB or more, that is about to be written. The C
// library takes arrays of 32 MiB and more afresh from the system, and gives them back, each time,
// and smaller ones whenever its heap has no room; in small pages the faults of the first write cost
// more than the kernel that writes (14 ms against 3.7 ms for 53 MB). Systems without huge pages are
// left alone.
void want_huge_pages(const void* out, int64_t bytes);

}  // namespace qirl
