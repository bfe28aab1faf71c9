"""Errors of commands in one line: what is wrong, and what to do."""

import contextlib
import errno
import json
import os
import pickle
import re
import sys
from collections.abc import Iterator

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from .messages import one_line
from .packages import remedy


# What the user or the machine lacks.
EXPECTED: tuple[type[Exception], ...] = (OSError, ImportError, HTTPError, SafetensorError, pickle.UnpicklingError)
REMEDIES = {
    errno.ENOSPC: "choose another with the output's name, TMPDIR or HF_HOME, and run again",
    errno.EDQUOT: "free some space, or choose another disk, and run again",
    errno.EACCES: "change its permissions, or choose another output",
    errno.EPERM: "change its permissions, or choose another output",
    errno.EROFS: "choose another output",
    errno.EFBIG: "choose an output on another file system, which allows larger files",
    errno.EBUSY: "close what uses it, or choose another output",
}
NO_SPACE = "No space left on the disk"
LONGEST = 1000  # characters of a line
# What libraries raise for settings, or for a list of weights, of a wrong shape; to us they would be mistakes.
MALFORMED = (
    *(AssertionError, AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError),
    json.JSONDecodeError,
)
NO_MEMORY = r"out of memory\b|can't allocate memory"  # as torch says of GPUs, and of CPUs
LESS_MEMORY = "Ask for less: smaller batches (--batch-size, --preset), images (--image-size, --tile) or a --grid."
TORCH_COULD_NOT_WRITE = r"unexpected pos \d+ vs \d+|file write failed"


@contextlib.contextmanager
def one_line_errors(*expected: type[Exception], prefix: str = "", interrupted: str = "Interrupted.") -> Iterator[None]:
    """Ends the process with one line if the block raises what the user or the machine is the cause of.

    Args:
        expected: Errors beside those of files, of the Hub and of packages.
        prefix: What the line begins with.
        interrupted: The line for Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(interrupted)
    except (*EXPECTED, *expected) as error:
        sys.exit(prefix + explained(error))
    except (MemoryError, RuntimeError) as error:
        if error_number(error) is None and not is_out_of_memory(error):
            raise
        sys.exit(prefix + explained(error))


@contextlib.contextmanager
def well_formed(source: object) -> Iterator[None]:
    """Names the checkpoint whose files a library cannot make sense of.

    Raises:
        ValueError: If it cannot.
    """
    try:
        yield
    except MALFORMED as error:
        cause = f"{type(error).__name__}: {one_line(error):.200}"
        raise ValueError(f"{source}: config.json or another JSON file there has a wrong value ({cause}).") from error


def explained(error: BaseException) -> str:
    """Returns the message of an error, in one line or, if it has `lines`, in these; for the disk, with what to do."""
    number = error_number(error)
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a copy, where it goes to
    if number in REMEDIES:
        reason = NO_SPACE if number == errno.ENOSPC else os.strerror(number)
        return f"{f'{file}: ' if file else ''}{reason}: {REMEDIES[number]}."
    if isinstance(error, OSError) and error.strerror and file:
        return f"{file}: {error.strerror}."
    if isinstance(error, ImportError) and error.name:
        return f"This {remedy(error)}"
    if isinstance(error, pickle.UnpicklingError):  # torch advises to run the code
        return "The file of weights is damaged, or holds objects, which are code: save it anew as safetensors."
    line = one_line(error) or type(error).__name__
    if is_out_of_memory(error):
        amount = re.search(r"allocate ([\d.]+ \w+)", line)
        return f"Out of memory{f' for {amount[1]} more' if amount else ''}. {LESS_MEMORY}"
    if len(line) > LONGEST:
        line = f"{line[: LONGEST - 300]} [...] {line[-300:]}"
    return "\n".join(getattr(error, "lines", ())) or line


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, that of the machine or of a GPU."""
    return isinstance(error, MemoryError) or bool(re.search(NO_MEMORY, str(error)))


def error_number(error: BaseException) -> int | None:
    """Returns the operating system's number of an error, which safetensors and torch give in their messages."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    message = str(error)
    if match := re.search(r"\(os error (\d+)\)", message):
        return int(match[1])
    if re.search(TORCH_COULD_NOT_WRITE, message) or os.strerror(errno.ENOSPC) in message:
        return errno.ENOSPC
    return error_number(error.__cause__) if error.__cause__ else None
