"""The page of `app.py`: click on an object, see its mask."""

import checkpoint_tools as checkpoint_tools  # imports nothing, and quietens what PEFT imports

from .zero_gpu import on_gpu as on_gpu  # because `spaces` must be imported before torch
