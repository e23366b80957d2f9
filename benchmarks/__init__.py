"""Benchmarks: luxtorch, and what a user would pick instead, on the same problems. `make bench` runs them all."""
