"""Measurements against stock SAM; each module is a command, `python -m benchmarks.bench` the first to run."""

import checkpoint_tools as checkpoint_tools  # imports nothing, and quietens what PEFT imports
