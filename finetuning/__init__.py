"""Trains a split SAM, or adapters of it, on images with labelled objects."""

import checkpoint_tools as checkpoint_tools  # imports nothing, and quietens what PEFT imports
