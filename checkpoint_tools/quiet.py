"""Keeps libraries from telling those who run a command what they cannot change."""

import contextlib
import warnings
from collections.abc import Iterator

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets transformers and the Hub's library log errors only, as the Hub's logs every retry when offline."""
    loggers = (transformers_logging, hub_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that 5.23 deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        for logger in loggers:
            logger.set_verbosity_error()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.set_verbosity(level)
