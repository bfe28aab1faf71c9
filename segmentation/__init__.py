"""Finds objects in images with SAM: by prompts, or all of them."""

import checkpoint_tools as checkpoint_tools  # imports nothing, and quietens what PEFT imports
