"""Changes the look of images, so that a model does not learn one microscope's or one camera's."""

import numpy as np
from scipy import ndimage


def changed_intensity(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns an image (H, W, 3) uint8 of other brightness, contrast (by up to 30 %) and gamma (0.7 to 1.4)."""
    gamma, contrast = np.exp(rng.uniform(np.log(0.7), np.log(1.4))), rng.uniform(0.7, 1.3)
    brightness = rng.uniform(-0.15, 0.15)
    values = (np.arange(256) / 255) ** gamma
    values = (values - 0.5) * contrast + 0.5 + brightness
    return (255 * values.clip(0, 1) + 0.5).astype(np.uint8)[image]


def blurred(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns every other image (H, W, 3) uint8 blurred by a Gaussian of 0.5 pixels plus up to 0.5 % of its side."""
    deviation = 0.5 + rng.uniform(0, 0.005) * max(image.shape)
    if rng.random() < 0.5:
        return image
    smooth = ndimage.gaussian_filter(image, (deviation, deviation, 0), output=np.float32)
    return (smooth + 0.5).astype(np.uint8)
