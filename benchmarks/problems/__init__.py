"""What the benchmarks solve."""
