"""Benchmarks: every figure stands next to a reference taken in the same minute. Run with `make bench`."""
