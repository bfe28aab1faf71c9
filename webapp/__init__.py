"""The page of `app.py`: click on an object, see its mask."""

from .zero_gpu import on_gpu as on_gpu  # first, because `spaces` must be imported before torch
