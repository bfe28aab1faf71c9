"""The model behind the page: one for all users, with and without its adapter."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, SamProcessor

from checkpoint_tools.checkout import SAM_TINY
from segmentation.adapted_model import DEVICE, load_adapted, load_base
from segmentation.automatic import Candidates, choose, find_candidates, scaled_up, stability_scores
from segmentation.joining_tiles import joined
from segmentation.predictor import EncodedImage, ObjectPrompts, Predictor
from segmentation.segments import Segment, segment_of
from segmentation.settings import SegmentationSettings

from .zero_gpu import on_gpu


MAX_PIXELS = 50_000_000  # of an image, as all users share the memory


@dataclass(frozen=True)
class ModelSource:
    """Where the model is from.

    Args:
        base: Folder or Hub id of the base; None for that of the adapter, or sam-tiny.
        revision: Of the base, on the Hub.
        adapter: Folder or Hub id of an adapter.
        adapter_revision: Of the adapter, on the Hub.
        changes: Settings to use instead of those that came with the model.
    """

    base: str | None = None
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)


class SharedModel:
    """A model that answers one request at a time, with its adapter or without.

    Encoded images are kept on the CPU: those of all users would not fit on a GPU.

    Args:
        model: A `PeftModel`, or a model without an adapter.
        processor: The model's.
        settings: How to use it.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, processor: SamProcessor, settings: SegmentationSettings
    ) -> None:
        self.model = model
        self.predictor = Predictor(model, processor)
        self.settings = settings
        self.lock = threading.Lock()
        self._encode = on_gpu(self.run_encoder)
        self._decode = on_gpu(self.run_decoder)
        self._find = on_gpu(self.run_grid)

    @property
    def has_adapter(self) -> bool:
        """Whether there is a before and an after."""
        return isinstance(self.model, PeftModel)

    @contextmanager
    def adapter(self, enabled: bool) -> Iterator[None]:
        """Switches the adapter off for a block, unless it is `enabled`."""
        with nullcontext() if enabled or not self.has_adapter else self.model.disable_adapter():
            yield

    def encode(self, image: np.ndarray, adapted: bool = True) -> EncodedImage:
        """Runs the vision encoder on an image (H, W, 3) uint8, with the adapter or without."""
        with self.lock:
            return self._encode(image, adapted)

    def decode(self, encoded: EncodedImage, prompts: ObjectPrompts, adapted: bool = True) -> list[Segment]:
        """Returns the masks of one object: the three of SAM's multimask output, and the single one."""
        with self.lock:
            return self._decode(encoded, prompts, adapted)

    def find(self, encoded: EncodedImage, settings: SegmentationSettings, adapted: bool = True) -> Candidates:
        """Returns the masks of a grid of points that are above the thresholds."""
        with self.lock:
            return self._find(encoded, settings, adapted)

    def choose(
        self,
        groups: Sequence[tuple[tuple[slice, slice], Candidates]],
        size: tuple[int, int],
        settings: SegmentationSettings,
    ) -> list[Segment]:
        """Returns the candidates of all tiles that are above the thresholds, each object once, best rated first.

        Args:
            groups: Each tile's window, and the candidates in it.
            size: Height and width of the image.
            settings: With the thresholds.
        """
        parts = []
        for window, candidates in groups:
            segments = scaled_up(self.predictor, candidates, choose(candidates, settings))
            parts.append((window, [segment.moved(window[0].start, window[1].start) for segment in segments]))
        return joined(parts, size, settings.max_overlap)

    def run_encoder(self, image: np.ndarray, adapted: bool) -> EncodedImage:
        """`encode`, on the GPU if there is one."""
        with self.adapter(adapted):
            return on_device(self.predictor.encode(image), "cpu")

    def run_decoder(self, encoded: EncodedImage, prompts: ObjectPrompts, adapted: bool) -> list[Segment]:
        """`decode`, on the GPU if there is one."""
        here = on_device(encoded, self.predictor.model.device)
        with self.adapter(adapted):
            answers = [self.predictor.decode(here, prompts, multimask) for multimask in (True, False)]
        ratings, logits = (torch.cat([part[0] for part in parts]) for parts in zip(*answers, strict=True))
        stabilities = stability_scores(self.predictor.without_padding(here, logits))
        return [  # one at a time: a mask of a large image takes much memory until it is cropped
            segment_of(self.predictor.full_size(here, logit[None])[0], rating, stability)
            for logit, rating, stability in zip(logits, ratings.tolist(), stabilities.tolist(), strict=True)
        ]

    def run_grid(self, encoded: EncodedImage, settings: SegmentationSettings, adapted: bool) -> Candidates:
        """`find`, on the GPU if there is one."""
        here = on_device(encoded, self.predictor.model.device)
        with self.adapter(adapted):
            candidates = find_candidates(self.predictor, here, settings.grid, settings.min_iou, settings.min_stability)
        return replace(candidates, encoded=encoded)

    def default_choice(self, masks: Sequence[Segment], prompts: ObjectPrompts) -> int:
        """Returns the index of the mask that the settings choose among those of `decode`."""
        among_three = {"always": True, "never": False, "single-point": prompts.is_single_point}
        if not among_three[self.settings.multimask]:
            return len(masks) - 1
        return int(np.argmax([mask.rating for mask in masks[:-1]]))


def on_device(encoded: EncodedImage, device: str | torch.device) -> EncodedImage:
    """Returns an encoded image whose embedding is on `device`."""
    return replace(encoded, embedding=encoded.embedding.to(device))


def load_shared(source: ModelSource) -> SharedModel:
    """Loads model, processor and settings.

    Raises:
        ValueError: If they cannot be loaded.
    """
    base = source.base or str(SAM_TINY)
    settings = SegmentationSettings.load(
        source.adapter or base, source.adapter_revision if source.adapter else source.revision
    )
    limit = min(settings.reading.max_pixels, MAX_PIXELS)
    settings = settings.but(max_pixels=limit).but(**source.changes)
    if source.adapter:
        model, processor = load_adapted(
            source.adapter, source.base, source.revision, settings.image_size, source.adapter_revision
        )
    else:
        model, processor = load_base(base, source.revision, image_size=settings.image_size)
    return SharedModel(model.eval().to(DEVICE), processor, settings)
