"""Checks of the values of options, with errors that name the option."""

import dataclasses
from typing import Any


MOST = 1_000_000_000  # that any option may be; what it counts would not end, or not fit into memory
# Where less than that is as absurd.
MOST_IMAGE_SIDE = 16_384  # pixels; SAM's is 1024
LEAST_TILE_SIDE = 16  # pixels of a patch of SAM
MOST_GRID_POINTS = 1_000  # along a side; SAM's is 32


class SettingsError(ValueError):
    """Settings that are out of range or contradict each other."""


def require_at_least(least: float, settings: Any, *names: str, most: float = MOST) -> None:
    """Raises an error that names the first of the settings that is less, or more than `most`; None is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            limit = f"{most:,} or less" if value > most else f"{least} or more"
            raise SettingsError(f"{option(settings, name)} {value}: expected {limit}.")


def require_above_0(settings: Any, *names: str) -> None:
    """Raises an error that names the first of the settings that is not above 0, or is too large; None is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value <= MOST:
            limit = f"{MOST:,} or less" if value > MOST else "more than 0"
            raise SettingsError(f"{option(settings, name)} {value}: expected {limit}.")


def require_share(settings: Any, name: str, above_0: bool = False) -> None:
    """Raises an error if the setting is not a share from 0 to less than 1; None is allowed."""
    value = getattr(settings, name)
    if value is not None and not (0 <= value < 1 and (value > 0 or not above_0)):
        least = "more than 0" if above_0 else "0"
        raise SettingsError(f"{option(settings, name)} {value}: expected a share from {least} to less than 1.")


def default_of(settings: Any, name: str) -> Any:
    """Returns the value that the field `name` has if the option is not given."""
    field = settings.__dataclass_fields__[name]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def option(settings: Any, name: str) -> str:
    """Returns the option of the command line that sets the field `name`: the short one, if it has one."""
    aliases = settings.__dataclass_fields__[name].metadata.get("aliases")
    return aliases[0] if aliases else f"--{name.replace('_', '-')}"
