"""Measurements against stock SAM; each module is a command, `python -m benchmarks.bench` the first to run."""
