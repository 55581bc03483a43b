"""Benchmarks that print tables, each with its peer in the same run."""
