"""LoRA that other tools build into Meta's SAM, as PEFT adapters of the split model.

They add B A to a Linear's weight, without scaling, so `lora_alpha` is the rank.
"""

import dataclasses
import re
from collections.abc import Mapping

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, SamModel

from . import meta_layout
from .fused_adapters import PREFIX, PROJECTIONS, Adapter, Factors, assemble
from .messages import listing
from .meta_layout import hint


FROZEN = ("vision_encoder.", "shared_image_embedding.")  # in LoRA of the encoder


@dataclasses.dataclass
class MetaAdapter:
    """LoRA, and other weights, that a file adds to Meta's SAM.

    Args:
        factors: Of the low-rank updates, by module of the split model.
        weights: Weights of SAM itself that the file holds, in Meta's layout.
        advice: What to do if they do not fit a base.
    """

    factors: dict[str, Factors]
    weights: dict[str, torch.Tensor]
    advice: str

    def adapter(self, split: PreTrainedModel, base: str) -> Adapter:
        """Returns the adapter of `split`, which is the model `base`.

        Weights of the file that differ from those of `split` become `modules_to_save`.

        Raises:
            ValueError: If the file does not fit the model.
        """
        saved = self.changed_modules(split, base)
        config = LoraConfig(task_type="FEATURE_EXTRACTION", modules_to_save=sorted(saved) or None).to_dict()
        weights = {
            f"{PREFIX}{path}.{name}": tensor
            for path, state_dict in saved.items()
            for name, tensor in state_dict.items()
        }
        adapter = assemble(Adapter(config, {}), weights, self.factors, split)
        adapter.config["base_model_name_or_path"] = base
        adapter.check_fits(split, base)
        return adapter

    def changed_modules(self, split: PreTrainedModel, base: str) -> dict[str, dict[str, torch.Tensor]]:
        """Returns the parameters of each module of the prompt encoder and decoder that the file has other values for.

        Raises:
            ValueError: If weights are unknown or do not fit, or those that SAM shares or that LoRA freezes differ.
        """
        to_meta, expected = meta_layout.names(split.config.to_sam()), split.to_sam().state_dict()
        names = {meta: name for name, meta in to_meta.items()}
        for meta in sorted(self.weights.keys() & names.keys()):
            shape, own = (tuple(tensor.shape) for tensor in (self.weights[meta], expected[names[meta]]))
            if shape != own:
                raise ValueError(f"{meta} is {shape} in the file, and {own} in {base}. {self.advice}")
        if unknown := self.weights.keys() - names.keys():
            raise ValueError(f"{base} has no module for {listing(unknown)} of the file{hint(unknown)}. {self.advice}")
        changed = {
            meta
            for meta, tensor in self.weights.items()
            if not torch.equal(tensor.double(), expected[names[meta]].double())
        }
        if frozen := {meta for meta in changed if names[meta].startswith(FROZEN)}:
            raise ValueError(
                f"{base} is not the model that the file was trained on, which has other values for {listing(frozen)}. "
                f"{self.advice}"
            )
        return {
            path: {
                name: self.weights.get(to_meta[f"{path}.{name}"], tensor)
                for name, tensor in split.get_submodule(path).state_dict().items()
            }
            for path in {names[meta].rpartition(".")[0] for meta in changed}
        }

    def applied(self, split: PreTrainedModel) -> SamModel:
        """Returns stock SAM with the weights of the file, and B A added to its own, by definition, in fp64."""
        stock = split.to_sam().double()
        names = {meta: name for name, meta in meta_layout.names(stock.config).items()}
        state_dict = stock.state_dict()
        with torch.no_grad():
            for meta, tensor in self.weights.items():
                state_dict[names[meta]].copy_(tensor)
            for path, part in self.factors.items():
                module, _, projection = path.rpartition(".")
                delta = part.b.double() @ part.a.double()
                if projection in PROJECTIONS:
                    third = state_dict[f"{module}.qkv.weight"].chunk(3)[PROJECTIONS.index(projection)]
                    third += delta
                else:
                    state_dict[f"{path}.weight"] += delta
        return stock


def factors_of(a: torch.Tensor, b: torch.Tensor) -> Factors:
    """Returns the factors of an update that is not scaled."""
    return Factors(a, b, scaling=1.0)


def pairs(weights: dict[str, torch.Tensor], pattern: str) -> dict[tuple[str, ...], Factors]:
    """Removes the matrices whose names match `pattern` and returns them in pairs.

    Args:
        weights: Tensors by name.
        pattern: A regular expression. Its group `factor` is a or b; the other groups are the key of the result.

    Raises:
        ValueError: If one of a pair is missing.
    """
    by_layer: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for name in list(weights):
        if match := re.fullmatch(pattern, name):
            key = tuple(value for group, value in match.groupdict().items() if group != "factor")
            by_layer.setdefault(key, {})[match["factor"]] = weights.pop(name)
    for key, pair in by_layer.items():
        if len(pair) != 2:
            raise ValueError(f"The file has one matrix of a LoRA, and lacks the other one, for {' '.join(key)}.")
        if pair["a"].ndim != 2 or pair["b"].ndim != 2 or pair["a"].shape[0] != pair["b"].shape[1]:
            raise ValueError(
                f"The matrices of a LoRA do not fit each other, for {' '.join(key)}: {tuple(pair['a'].shape)} and "
                f"{tuple(pair['b'].shape)}."
            )
    return {key: factors_of(pair["a"], pair["b"]) for key, pair in by_layer.items()}


def require_sam(weights: Mapping[str, torch.Tensor]) -> None:
    """Checks that what is left of a file once the LoRA is taken out belongs to SAM.

    Raises:
        ValueError: If it does not.
    """
    parts = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
    foreign = [name for name in weights if not name.startswith(parts) or hint([name])]
    if foreign:
        raise ValueError(f"The file changes SAM in ways that LoRA cannot express: {listing(foreign)}{hint(foreign)}.")
