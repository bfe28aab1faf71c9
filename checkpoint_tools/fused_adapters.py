"""Converts LoRA adapters between separate `q`, `k`, `v` and the fused `qkv`, exactly.

With s for alpha / rank, a Linear W becomes W + s B A. When fused, the A matrices are stacked and B is block-diagonal:

    [q]         [B_q  0 ]  [A_q]
    [k]  =  s * [ 0   0 ]  [A_v]     and back, each of q, k, v takes A and its third of B's rows.
    [v]         [ 0  B_v]
"""

import dataclasses
import json
import math
import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from .errors import well_formed
from .messages import listing
from .wrapped_checkpoints import check_finite


PROJECTIONS = ("q", "k", "v")
FUSED = ("qkv",)
PREFIX = "base_model.model."
ADVICE = "convert it with convert.py adapter-to-split, or load it on stock SamModel"
LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")

# Settings this converter handles. Any other must have PEFT's default value, because it could change the result.
UNDERSTOOD = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias", "modules_to_save"),
    *("init_lora_weights", "eva_config"),
}
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass
class Adapter:
    """A LoRA adapter as stored in its folder: `adapter_config.json` and the weights by name."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, source: str) -> "Adapter":
        """Reads a folder or a repo of the Hub.

        Raises:
            ValueError: If it is not a plain LoRA, fully described by its two matrices and its scaling.
        """
        require_adapter(source)
        folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns="adapter_*"))
        config = read_config(folder / "adapter_config.json")
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{source} is a {config.get('peft_type')} adapter: only LoRA can be converted.")
        if config.get("init_lora_weights", True) not in INITS_THAT_KEEP_THE_BASE:
            raise ValueError(
                f"{source} was initialised with {config['init_lora_weights']!r}, which modifies the base weights: "
                "save it with path_initial_model_for_weight_conversion first (PEFT's documentation has how)."
            )
        defaults = LoraConfig().to_dict()
        for setting in config.keys() - UNDERSTOOD:
            if config[setting] and config[setting] != defaults.get(setting):
                raise ValueError(
                    f"{source} sets {setting}={config[setting]!r}, which is not converted: merge the adapter with "
                    "merge_and_unload(), and convert the model."
                )
        weights = load_peft_weights(str(folder), device="cpu")
        check_finite(weights, source)
        return cls(config, weights)

    def save(self, folder: Path) -> None:
        """Writes it as PEFT does."""
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.weights.items()}
        save_file(apart, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def require(self, projections: tuple[str, ...]) -> None:
        """Checks that the adapter targets exactly these projections of the vision encoder.

        Raises:
            ValueError: If it adapts the other form, neither, or holds whole projections.
        """
        adapted = {match[1] for name in self.weights if (match := re.search(r"\.attn\.(qkv|[qkv])\.lora_", name))}
        if not adapted or not adapted <= {*projections}:
            raise ValueError(
                f"Expected an adapter of {', '.join(projections)}, got one of "
                f"{', '.join(sorted(adapted)) or 'no projection'}. Use the opposite command (adapter-to-fused / "
                "adapter-to-split). An adapter of proj, MLPs or the decoder alone needs no conversion."
            )
        if 0 in (self.config.get("lora_alpha"), *(self.config.get("alpha_pattern") or {}).values()):
            raise ValueError("lora_alpha is 0, with which LoRA does nothing: there is nothing to convert.")
        whole = [name for name in self.weights if re.search(r"\.attn\.(qkv|[qkv])\.(modules_to_save\.)?weight$", name)]
        if whole:
            raise ValueError(f"modules_to_save contains whole projections ({whole[0]}): merge the adapter instead.")

    def part_of(self, model: nn.Module) -> nn.Module:
        """Returns the part of `model` that was adapted: all of it, or the vision encoder as a model of its own."""
        own = any(name.startswith(f"{PREFIX}layers.") for name in self.weights)
        return model.vision_encoder if own else model  # type: ignore[return-value]

    def check_fits(self, model: nn.Module, base: str) -> None:
        """Checks that the factors have the widths of the modules of `model`, which is `base`.

        Raises:
            ValueError: If one has not.
        """
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for name, tensor in self.weights.items():
            path, _, factor = name.removeprefix(PREFIX).partition(".lora_")
            expected, shape = getattr(parameters.get(path), "shape", tensor.shape), tensor.shape
            if isinstance(module := modules.get(path), nn.Linear) and factor == "A.weight":
                expected, shape = torch.Size([module.in_features]), tensor.shape[1:]
            elif isinstance(module, nn.Linear) and factor == "B.weight":
                expected, shape = torch.Size([module.out_features]), tensor.shape[:1]
            if shape != expected:
                raise ValueError(
                    f"The adapter does not fit {base}: {path} has {tuple(expected)} channels there, and "
                    f"{tuple(shape)} in the adapter. Give the model that it was trained on with --base."
                )


def with_adapter(model: nn.Module, adapter: str | Path, revision: str | None = None) -> PeftModel:
    """Returns `model` with a PEFT adapter of any method, all weights of which are those of its file.

    `PeftModel.from_pretrained` only warns of weights that it lacks, which are then random, and is silent about those
    that the model has no place for.

    Args:
        model: The base. Its modules are adapted in place.
        adapter: A folder, or an id of the Hub.
        revision: Of the latter: a branch, tag or commit.

    Raises:
        ValueError: If the adapter is not that of such a model, or not complete.
    """
    source = str(adapter)
    require_adapter(source)
    with warnings.catch_warnings(), well_formed(source):
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        try:
            adapted = PeftModel.from_pretrained(model, source, revision=revision)
        except KeyError as error:
            raise ValueError(f"The file of the adapter {source} lacks {error.args[0]}.") from error
        except ValueError as error:
            if "qkv" in (message := str(error)):
                raise ValueError(f"{message} {source} is for the qkv of stock SAM: {ADVICE}.") from error
            raise
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    weights = load_peft_weights(source, device="cpu", revision=revision)
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{source} holds NaN or infinity in {listing(broken)}: diverged training leaves such weights."
        )
    stored = weights.keys()
    if missing := expected - stored:
        raise ValueError(f"The file of the adapter {source} lacks {listing(missing)}, which its configuration names.")
    if foreign := stored - expected:
        raise ValueError(
            f"The model has no module for {listing(foreign)} of the adapter {source}: expected the model that the "
            "adapter was trained on, and its own configuration."
        )
    return adapted


def require_adapter(source: str) -> None:
    """Checks that a folder holds an adapter, which PEFT would otherwise look for on the Hub.

    Raises:
        ValueError: If it does not.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    if not (folder / "adapter_config.json").is_file():
        others = [path.parent.name for path in sorted(folder.glob("*/adapter_config.json"))]
        advice = f": choose one of those in {', '.join(others)}" if others else ""
        raise ValueError(f"{source} has no adapter_config.json, as PEFT saves it with an adapter{advice}.")
    if not any((folder / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin")):
        raise ValueError(f"{source} has no adapter_model.safetensors: expected the weights of the adapter.")


def read_config(file: Path) -> dict[str, Any]:
    """Returns the settings in `file`.

    Raises:
        ValueError: If it is no JSON object.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds {config!r:.40}, expected the settings of an adapter by name.")
    return config


@dataclasses.dataclass
class Factors:
    """The two matrices of one layer's LoRA, what they are multiplied by, and PEFT's names for them."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    names: tuple[str, str] = LINEAR


def to_fused(adapter: Adapter, adapted: PeftModel, stock: nn.Module) -> Adapter:
    """Returns the equivalent adapter of `qkv`.

    Args:
        adapter: Of `q`, `k` or `v`.
        adapted: The split model with it.
        stock: The stock model that the result is for.

    Raises:
        ValueError: If a part has no exact equivalent.
    """
    weights, factors = take_factors(adapter, adapted)
    layers: dict[str, dict[str, Factors]] = defaultdict(dict)
    fused: dict[str, Factors] = {}
    for name, part in factors.items():
        attention, _, projection = name.rpartition(".")
        if attention.endswith(".attn") and projection in PROJECTIONS:
            layers[attention][projection] = part
        else:
            fused[name] = part
    for attention, parts in layers.items():
        fused[f"{attention}.qkv"] = fuse(parts)
    split = adapted.get_base_model()
    for attention, stored in take_biases(weights, PROJECTIONS).items():
        dtype = next(iter(stored.values())).dtype
        for projection in set(PROJECTIONS) - stored.keys():  # the base's own
            stored[projection] = exactly(split.get_submodule(f"{attention}.{projection}").bias.detach(), dtype)
        wrapper = ".base_layer" if f"{attention}.qkv" in fused else ""
        weights[f"{PREFIX}{attention}.qkv{wrapper}.bias"] = torch.cat([stored[name] for name in PROJECTIONS])
    return assemble(adapter, weights, fused, stock)


def to_split(adapter: Adapter, adapted: PeftModel, split: nn.Module) -> Adapter:
    """Returns the adapter of `q`, `k` and `v` that does what `adapter` does; the reverse of `to_fused`.

    Args:
        adapter: Of `qkv`.
        adapted: The stock model with it.
        split: The split model that the result is for.

    Raises:
        ValueError: If a part has no exact equivalent.
    """
    weights, factors = take_factors(adapter, adapted)
    parts: dict[str, Factors] = {}
    for name, part in factors.items():
        attention, _, projection = name.rpartition(".")
        if attention.endswith(".attn") and projection == "qkv":
            parts |= {f"{attention}.{projection}": third for projection, third in unfuse(part).items()}
        else:
            parts[name] = part
    for attention, stored in take_biases(weights, FUSED).items():
        dtype = factors[f"{attention}.qkv"].a.dtype if f"{attention}.qkv" in factors else stored["qkv"].dtype
        for projection, third in zip(PROJECTIONS, stored["qkv"].chunk(3), strict=True):
            own = split.get_parameter(f"{attention}.{projection}.bias")
            is_adapted = f"{attention}.{projection}" in parts
            if adapter.config.get("bias") == "lora_only" and not is_adapted and torch.equal(third, own.to(third)):
                continue
            wrapper = ".base_layer" if is_adapted else ""
            weights[f"{PREFIX}{attention}.{projection}{wrapper}.bias"] = exactly(third, dtype).clone()
    return assemble(adapter, weights, parts, split)


def fuse(parts: dict[str, Factors]) -> Factors:
    """Returns the factors of `qkv` from those of some of `q`, `k`, `v`; an A that they share is kept once."""
    scaling = next(iter(parts.values())).scaling
    distinct: list[torch.Tensor] = []
    for part in parts.values():
        if not any(torch.equal(part.a, a) for a in distinct):
            distinct.append(part.a)
    rows = len(next(iter(parts.values())).b)
    blocks = []
    for projection in PROJECTIONS:
        own = parts.get(projection)
        columns = [
            rescaled(own, scaling) if own and torch.equal(own.a, a) else a.new_zeros(rows, len(a)) for a in distinct
        ]
        blocks.append(torch.cat(columns, dim=1))
    return Factors(torch.cat(distinct), torch.cat(blocks), scaling)


def unfuse(fused: Factors) -> dict[str, Factors]:
    """Returns the factors of `q`, `k` and `v`, leaving out ranks whose B columns are zero."""
    parts = {}
    untrained = ~fused.b.any()  # B is all zeros before training
    for name, b in zip(PROJECTIONS, fused.b.chunk(3), strict=True):
        used = b.any(dim=0) | untrained
        if used.any():
            parts[name] = Factors(fused.a[used], b[:, used], fused.scaling)
    return parts


def rescaled(part: Factors, scaling: float) -> torch.Tensor:
    """Returns B rescaled so that scaling * B * A stays the same.

    Raises:
        ValueError: If half precision would round it.
    """
    exact = part.b.double() * (part.scaling / scaling)
    b = exact.to(part.b.dtype)
    if b.dtype.itemsize < 4 and not torch.equal(b.double(), exact):
        raise ValueError(
            f"One layer has the scalings {part.scaling:g} and {scaling:g}, which {b.dtype} cannot express without "
            "rounding: save the adapter in float32 first."
        )
    return b


def take_factors(adapter: Adapter, adapted: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, Factors]]:
    """Returns the adapter's other weights, and the factors of each layer, with the scaling that PEFT gives it."""
    weights, factors = dict(adapter.weights), {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            names = EMBEDDING if module.lora_embedding_A else LINEAR
            a, b = (weights.pop(f"{PREFIX}{name}.{factor}") for factor in names)
            factors[name] = Factors(a, b, module.scaling["default"], names)
    return weights, factors


def take_biases(weights: dict[str, torch.Tensor], projections: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """Removes the biases of `projections` from `weights` and returns them by attention module and projection."""
    biases: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name in list(weights):
        if match := re.fullmatch(rf"{PREFIX}(.*\.attn)\.({'|'.join(projections)})(\.base_layer)?\.bias", name):
            biases[match[1]][match[2]] = weights.pop(name)
    return biases


def exactly(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns `tensor` in `dtype` if that rounds nothing, otherwise as it is."""
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.double(), tensor.double()) else tensor


def assemble(
    adapter: Adapter, weights: dict[str, torch.Tensor], factors: dict[str, Factors], target: nn.Module
) -> Adapter:
    """Returns an adapter of `factors` and the other `weights`, configured for the model `target`."""
    power = 0.5 if adapter.config.get("use_rslora") else 1
    ranks = {name: min(part.a.shape[0], part.b.shape[1]) for name, part in factors.items()}
    alphas = {name: whole(part.scaling * ranks[name] ** power) for name, part in factors.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    notes = []
    if dropout := adapter.config.get("lora_dropout"):
        notes.append(
            f"lora_dropout={dropout} is kept, but only evaluation is the same: in further training, q, k and v draw "
            "from one dropout when fused, and from one each when split."
        )
    config = {
        **adapter.config,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": shortest_targets(target, {*factors}),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "eva_config": None,
        "auto_mapping": None,  # names the class of the other form
    }
    for name, part in factors.items():
        for factor, matrix in zip(part.names, (part.a, part.b), strict=True):
            weights[f"{PREFIX}{name}.{factor}"] = matrix
    return Adapter(config, weights, notes)


def shortest_targets(model: nn.Module, modules: set[str]) -> list[str]:
    """Returns the shortest `target_modules` for exactly `modules`: last names if unambiguous, otherwise full paths."""
    last_names = {name.rpartition(".")[2] for name in modules}
    with_these_names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last_names}
    return sorted(last_names if with_these_names == modules else modules)


def whole(number: float) -> float:
    """Rounds to an int if the difference is only floating-point error."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-14) else number
