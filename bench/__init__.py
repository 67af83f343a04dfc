"""Benchmarks: medians of interleaved runs, beside the copy bandwidth of the same process."""
