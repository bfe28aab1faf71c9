"""Scales intensities of any type to 8 bits."""

import numpy as np


class IntensityError(ValueError):
    """A scale that is not known, or that does not fit the values."""


def parse_intensity(intensity: str) -> tuple[str, list[float]]:
    """Returns the name of a scale, and its numbers.

    Raises:
        IntensityError: If there is no such scale.
    """
    name, *numbers = intensity.split()
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = [-1.0]
    if name == "percentile" and len(values) == 2 and 0 <= values[0] < values[1] <= 100:
        return name, values
    if name in ("min-max", "dtype") and not values:
        return name, values
    raise IntensityError("expected min-max, dtype, or percentile with two numbers from 0 to 100, the lower first.")


def with_8_bits(values: np.ndarray, intensity: str, together: bool) -> np.ndarray:
    """Returns `values` (H, W, bands) as uint8; uint8 stays as it is, and what is no finite number becomes 0.

    Args:
        values: Of any type of real numbers.
        intensity: `percentile LOW HIGH`, `min-max` or `dtype`, as in `images.ImageReading`. Where both percentiles are
            the same number, because nearly all pixels are equal, the scale is from the least to the largest.
        together: Whether all bands have one scale, or each its own.

    Raises:
        IntensityError: If the values do not fit the scale.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf":
        raise IntensityError(f"expected integer or floating-point pixels, got {values.dtype}.")
    scaled = np.empty(values.shape, dtype=np.uint8)
    limits = limits_of(values, intensity) if together else None
    for band in range(values.shape[2]):
        scaled[..., band] = stretch(values[..., band], *(limits or limits_of(values[..., band], intensity)))
    return scaled


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns `values` (H, W) as uint8, so that `low` is 0 and `high` 255."""
    precise = np.float32 if values.dtype.itemsize <= 2 else np.float64  # which hold them exactly
    scaled = np.nan_to_num(values.astype(precise), copy=False, nan=low, posinf=high, neginf=low)
    scaled -= low
    scaled *= 255 / (high - low)
    return (np.clip(scaled, 0, 255, out=scaled) + 0.5).astype(np.uint8)


def limits_of(values: np.ndarray, intensity: str) -> tuple[float, float]:
    """Returns the intensities that become 0 and 255, which are not the same.

    Raises:
        IntensityError: If floating-point numbers are not from 0 to 1 with `dtype`.
    """
    name, percentiles = parse_intensity(intensity)
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    least, largest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low, high = least, largest
    if name == "dtype":
        if values.dtype.kind != "f":
            return float(np.iinfo(values.dtype).min), float(np.iinfo(values.dtype).max)
        if least < 0 or largest > 1:
            raise IntensityError(f"--intensity dtype: expected numbers from 0 to 1, got {least:g} to {largest:g}.")
        return 0.0, 1.0
    if name == "percentile" and finite.size:
        low, high = map(float, np.percentile(finite, percentiles))
    if low == high:
        low, high = least, largest
    return (low, high) if low < high else (low, low + 1)
