"""What tools/benchmark_throughput.py measures and compares."""
