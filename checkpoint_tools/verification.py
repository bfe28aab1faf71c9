"""Loads a split model as a stranger would, and compares its weights and its outputs with those of its base."""

import ast
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor, PreTrainedModel, SamConfig, SamModel, SamProcessor

from .config_files import read_json, read_processor
from .errors import well_formed
from .fetching import fetch
from .output_comparison import compare, processed_outputs


TOLERANCE = 1e-4  # relative to the largest output: rounding differs. Weights must be equal.
TIED = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
TAGS = {"segment-anything", "peft", "lora", "custom_code"}


def verify(repo: str, base: Path, revision: str | None = None) -> dict[str, Any]:
    """Returns what was measured: parameter counts, and by how much outputs differ, relative to the largest.

    Raises:
        ValueError: If a check fails. Its message says which.
    """
    folder = fetch(repo, revision)
    check_settings(folder)
    check_code(folder)
    with well_formed(repo):
        model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True, dtype=torch.float32)
        # From the commit's folder, because transformers 5.0.0 looks for a processor on main, whatever the revision.
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(processor, SamProcessor):
        raise ValueError(f"its processor_config.json gives a {type(processor).__name__}, expected a SamProcessor.")
    figures = {
        "num_parameters": model.num_parameters(),
        "num_vision_parameters": model.vision_encoder.num_parameters(),
        "max_difference": compare(
            processed_outputs(model, processor),
            processed_outputs(stock_model(base), read_processor(base)),
            TOLERANCE,
        ),
    }
    compare_weights(folder, base)
    return figures


def stock_model(base: Path) -> PreTrainedModel:
    """Returns `base` as a stock `SamModel` in fp32, fusing q, k and v if it is split.

    Raises:
        ValueError: If weights are missing, which `SamModel` would initialise.
    """
    weights = Weights(base)
    settings = read_json(base / "config.json")
    if settings["model_type"] == "sam" and not any(".attn.q." in name for name in weights):
        model, report = SamModel.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
        require_complete(base, report["missing_keys"])
        return model
    vision = {**settings["vision_config"], "model_type": "sam_vision_model"}
    config = SamConfig.from_dict({**settings, "model_type": "sam", "vision_config": vision, "dtype": "float32"})
    with torch.device("meta"):
        model = SamModel(config)
    parts = {}
    for name in model.state_dict():
        if ".attn.qkv." in name and name not in weights:
            parts[name] = [name.replace(".attn.qkv.", f".attn.{part}.") for part in "qkv"]
        else:
            parts[name] = [place for place in TIED if place in weights][:1] if name in TIED else [name]
    require_complete(base, {part for name, own in parts.items() for part in own or [name]} - weights.keys())
    state_dict = {name: torch.cat([weights[part].float() for part in own]) for name, own in parts.items()}
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    return model


def require_complete(folder: Path, missing: Collection[str]) -> None:
    """Checks that `missing` is empty.

    Raises:
        ValueError: If it is not.
    """
    if missing:
        raise ValueError(f"{folder} is no complete SAM. Weights missing: {', '.join(sorted(missing))}.")


def compare_weights(folder: Path, base: Path) -> None:
    """Compares every weight on disk, one at a time, without the code that loads them.

    Raises:
        ValueError: If a weight is missing, unexpected or different.
    """
    actual, compared = Weights(folder), set()
    for name, expected in split_weights(Weights(base)):
        places = [place for place in (TIED if name in TIED else (name,)) if place in actual]
        if not places:
            raise ValueError(f"its weights lack {name}, which the base has.")
        for place in places:
            tensor = actual[place]
            if tensor.shape != expected.shape or not torch.equal(tensor.double(), expected.double()):
                raise ValueError(
                    f"weight {place} ({tensor.dtype}) differs from the base's ({expected.dtype}). If only the dtypes "
                    "differ, correct `dtype` in the base's config.json."
                )
        compared |= {*places}
    if added := sorted(actual.keys() - compared):
        raise ValueError(f"unexpected weights: {', '.join(added)}.")


def split_weights(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields names and tensors in the split layout: each fused `qkv` is cut into three."""
    for name in weights:
        if ".attn.qkv." in name:
            for part, tensor in zip("qkv", weights[name].chunk(3), strict=True):
                yield name.replace(".attn.qkv.", f".attn.{part}."), tensor
        else:
            yield name, weights[name]


class Weights(Mapping[str, torch.Tensor]):
    """Lazy mapping from names to the weights in a folder: safetensors, else pickles loaded with `weights_only=True`.

    Raises:
        ValueError: If there are none.
    """

    def __init__(self, folder: Path):
        self.readers: dict[str, Callable[[str], torch.Tensor]] = {}
        for path in weight_files(folder):
            if path.suffix == ".safetensors":
                file = safe_open(path, framework="pt")
                self.readers |= dict.fromkeys(file.keys(), file.get_tensor)
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
                self.readers |= dict.fromkeys(tensors, tensors.__getitem__)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.readers[name](name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers reads weights from, in its order of preference.

    Raises:
        ValueError: If there are no weights, or their index is damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{index} has no weight_map of files by the names of weights.")
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise ValueError(f"{folder.name} holds no weights: expected model.safetensors or pytorch_model.bin.")


def check_settings(folder: Path) -> None:
    """Checks that no settings name code of another repo, or code at all but in `auto_map`, or quantize the model.

    Raises:
        ValueError: If they do.
    """
    for path in sorted(folder.glob("*.json")):
        for name, value in named_values(read_json(path)):
            if name == "quantization_config":
                raise ValueError(f"{path.name} has {name}: expected weights in full precision.")
            in_configuration = path.name == "config.json" and name == "auto_map"
            if name == "custom_pipelines" or (name == "auto_map" and not in_configuration):
                raise ValueError(f"{path.name} has {name}, which makes users run other code: {value!r:.200}.")
            if in_configuration and "--" in str(value):
                raise ValueError(f"auto_map in config.json names code of another repo: {value!r:.200}.")


def named_values(content: Any) -> Iterator[tuple[str, Any]]:
    """Yields the names and values of all objects in JSON content, at all levels."""
    if isinstance(content, dict):
        yield from content.items()
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from named_values(value)


def check_code(folder: Path) -> None:
    """Checks that the code imports only torch, transformers and its own files.

    Raises:
        ValueError: If a file imports something else, or a class of `auto_map` is not there.
    """
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    classes: dict[str, set[str]] = {}
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes[path.stem] = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.py" if node.level else str(node.module)]
            for name in names:
                if name.split(".")[0] not in allowed and not (folder / name).is_file():
                    raise ValueError(f"{path.name} imports {name}, which users may not have installed.")
    auto_map = read_json(folder / "config.json").get("auto_map", {})
    for auto_class in ("AutoConfig", "AutoModel", "AutoModelForMaskGeneration"):
        reference = auto_map.get(auto_class) if isinstance(auto_map, dict) else None
        module, _, name = str(reference).partition(".")
        if name not in classes.get(module, ()):
            raise ValueError(f"auto_map in config.json has no class of this repo for {auto_class}.")


def check_card(folder: Path) -> None:
    """Checks what the Hub reads from the model card.

    Raises:
        ValueError: If metadata that the Hub needs are missing.
    """
    data = ModelCard.load(folder / "README.md").data
    expected = {"library_name": "transformers", "pipeline_tag": "mask-generation"}
    for name, value in expected.items():
        if data.get(name) != value:
            raise ValueError(f"model card: expected {name}: {value}, got {data.get(name)}.")
    if not data.license:
        raise ValueError("its model card names no licence.")
    if missing := TAGS - set(data.tags or ()):
        raise ValueError(f"its model card lacks the tags {', '.join(sorted(missing))}.")
