"""The page of `app.py`: click on an object, see its mask."""

import finetuning as finetuning  # imports nothing, and quietens what PEFT imports

from .zero_gpu import on_gpu as on_gpu  # because `spaces` must be imported before torch
