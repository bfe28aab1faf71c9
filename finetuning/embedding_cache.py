"""Keeps what a frozen vision encoder makes of images on disk, so that it runs once for each."""

import hashlib
import json
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, SamProcessor

from image_data.samples import Sample


NAME = "image_embeddings"


class EmbeddingCache:
    """A folder of embeddings, named by the image, the encoder's weights, and the preprocessing.

    Args:
        folder: Where they are; it is made if missing, and may serve several runs.
        model: Of which the vision encoder is frozen.
        processor: The model's.
        dtype: What the encoder computes in, as part of the name.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, processor: SamProcessor, dtype: str):
        self.folder = folder
        self.model = model
        self.processor = processor
        settings = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
        self.prefix = hashlib.sha256(f"{digest_of(model.vision_encoder)} {settings} {dtype}".encode())

    def path(self, image: np.ndarray) -> Path:
        """Returns the file of an image (H, W, 3) uint8."""
        key = self.prefix.copy()
        key.update(f"{image.shape}".encode())
        key.update(np.ascontiguousarray(image).data)
        return self.folder / f"{key.hexdigest()[:32]}.safetensors"

    def read(self, image: np.ndarray) -> torch.Tensor:
        """Returns the embedding (channels, h, w) of an image that `fill` has seen."""
        return load_file(self.path(image))[NAME]

    @torch.no_grad()
    def fill(self, samples: Iterable[Sample], show_progress: bool) -> None:
        """Encodes the samples whose embeddings are missing, damaged, or not what was written for them, one by one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for sample in tqdm(list(samples), desc="Encoding", unit="image", disable=not show_progress):
            image, _ = sample.read()
            path = self.path(image)
            if is_as_written(path):
                continue
            pixel_values = self.processor(images=[image], return_tensors="pt")["pixel_values"]
            embedding = self.model.get_image_embeddings(pixel_values.to(self.model.device))[0]
            partial = path.with_suffix(f".{uuid.uuid4().hex}")  # a killed run leaves no half file under the real name
            embedding = embedding.contiguous().cpu()
            save_file({NAME: embedding}, partial, metadata=proof_of(path, embedding))
            partial.replace(path)


def is_as_written(path: Path) -> bool:
    """Whether a file holds what `fill` wrote under this name."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == proof_of(path, file.get_tensor(NAME))
    except (FileNotFoundError, SafetensorError):  # also if it holds other tensors
        return False


def proof_of(path: Path, embedding: torch.Tensor) -> dict[str, str]:
    """Returns the metadata of a file: a hash of its name and of the embedding."""
    digest = hashlib.sha256(f"{path.name} {embedding.dtype} {tuple(embedding.shape)}".encode())
    digest.update(bytes_of(embedding))
    return {"sha256": digest.hexdigest()}


def digest_of(module: torch.nn.Module) -> str:
    """Returns a hash of the module's weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a tensor."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
