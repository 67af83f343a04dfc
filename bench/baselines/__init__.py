"""What the benchmarks of whole steps compare with."""
