"""Benchmarks: time, memory and error, each implementation in a process of its own."""
