// Memory for large outputs, kept for the next one when it is given back.
#pragma once

#include <stddef.h>

namespace qirl {

// The C library takes large arrays afresh from the system and gives them back, each time; in small
// pages the faults of the first write then cost more than the kernel that writes (14 ms against
// 3.7 ms for 53 MB). Blocks from here stay mapped, in huge pages from 4 MiB on, and go to the next
// output of their size, the last one given back first. At most kKeptBytes wait; the oldest of more
// go back to the system, all of them when it has no memory left. Safe to call from any thread.
constexpr size_t kKeptBytes = size_t(1) << 30;

// At least `bytes` bytes, aligned to 64; null where there is no memory.
void* take_block(size_t bytes);

// Gives back what take_block(bytes) returned.
void give_back_block(void* block, size_t bytes);

// Bytes that wait for a next output.
size_t kept_bytes();

}  // namespace qirl
