"""The LoRA and FacT checkpoints of micro-sam, which hold the whole model.

https://github.com/computational-cell-analytics/micro-sam/blob/master/micro_sam/models/peft_sam.py

A LoRA of q, k or v is `attn.qkv.w_a_linear_q.weight` (r, C) and `attn.qkv.w_b_linear_q.weight` (C, r), beside the
frozen `attn.qkv.qkv_proj`; one of the MLP is `mlp.w_a_linear_1.weight` and so on, beside the frozen `mlp.mlp_layer`.
FacT shares `FacTu` (r, C) and `FacTv` (C, r) between q and v, with `q_FacTs` or `v_FacTs` (r, r) between them.
"""

import re

import torch

from .fused_adapters import Factors
from .meta_adapters import MetaAdapter, factors_of, pairs, require_sam


BLOCK = r"image_encoder\.blocks\.(?P<layer>\d+)"
FROZEN = ((r"\.attn\.qkv\.qkv_proj\.", ".attn.qkv."), (r"\.mlp\.mlp_layer\.", ".mlp."))


def read(weights: dict[str, torch.Tensor]) -> MetaAdapter:
    """Returns what a checkpoint of micro-sam adds to SAM, and SAM's own weights in it.

    Raises:
        ValueError: If it changes SAM in another way, or not at all.
    """
    weights = dict(weights)
    factors: dict[str, Factors] = {}
    attention = rf"{BLOCK}\.attn\.qkv\.w_(?P<factor>[ab])_linear_(?P<projection>[qkv])\.weight"
    for (layer, projection), part in pairs(weights, attention).items():
        factors[f"vision_encoder.layers.{layer}.attn.{projection}"] = part
    mlp = rf"{BLOCK}\.mlp\.w_(?P<factor>[ab])_linear_(?P<number>[12])\.weight"
    for (layer, number), part in pairs(weights, mlp).items():
        factors[f"vision_encoder.layers.{layer}.mlp.lin{number}"] = part
    factors |= fact(weights)
    if not factors:
        raise ValueError("The file has no LoRA or FacT of micro-sam: convert a plain SAM with from-meta.")
    for pattern, replacement in FROZEN:
        weights = {re.sub(pattern, replacement, name): tensor for name, tensor in weights.items()}
    require_sam(weights)
    return MetaAdapter(factors, weights, advice="Leave out --base to use the model in the file.")


def fact(weights: dict[str, torch.Tensor]) -> dict[str, Factors]:
    """Removes FacT from `weights` and returns it as LoRA: A = FacTs FacTu and B = FacTv.

    Raises:
        ValueError: If a matrix is missing.
    """
    factors = {}
    for name in [name for name in weights if name.endswith(".attn.qkv.FacTu.weight")]:
        prefix = name.removesuffix("FacTu.weight")
        names = [f"{prefix}{matrix}.weight" for matrix in ("FacTu", "FacTv", "q_FacTs", "v_FacTs")]
        if missing := [name for name in names if name not in weights]:
            raise ValueError(f"The file lacks a matrix of FacT: {', '.join(missing)}.")
        inner, outer, *middle = (weights.pop(name) for name in names)
        layer = prefix.split(".")[2]
        for projection, matrix in zip("qv", middle, strict=True):
            a = (matrix.double() @ inner.double()).to(inner.dtype)
            factors[f"vision_encoder.layers.{layer}.attn.{projection}"] = factors_of(a, outer)
    return factors
