"""LoRA that SAMed and micro-sam build into Meta's SAM; the oracle is Meta's code with that LoRA by definition."""

import argparse
import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, stock_model, tiny_config
from peft import PeftModel
from torch import nn
from transformers import AutoModel, SamConfig

from checkpoint_tools import meta_adapters, meta_layout, meta_model
from checkpoint_tools.fused_adapters import assemble
from checkpoint_tools.loading import as_split
from checkpoint_tools.output_comparison import example_outputs, largest_relative_error


RANK = 3
HEADS = 2  # of the tiny decoder


class QkvLora(nn.Module):
    """By definition: B A x is added to q, k or v, also of the zeros that windows are padded with."""

    def __init__(self, qkv: nn.Linear, projections: str):
        super().__init__()
        self.qkv_proj, self.width = qkv, qkv.in_features
        self.a = nn.ModuleDict({name: nn.Linear(self.width, RANK, bias=False) for name in projections})
        self.b = nn.ModuleDict({name: nn.Linear(RANK, self.width, bias=False) for name in projections})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(x)
        for name in self.a:
            begin = "qkv".index(name) * self.width
            qkv[..., begin : begin + self.width] += self.b[name](self.a[name](x))
        return qkv


class Lora(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.a = nn.Linear(linear.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.b(self.a(x))


class Fact(nn.Module):
    """Of https://arxiv.org/abs/2212.03145 in its tensor-train form."""

    def __init__(self, qkv: nn.Linear):
        super().__init__()
        self.qkv_proj, self.width = qkv, qkv.in_features
        self.FacTu, self.FacTv = nn.Linear(self.width, RANK, bias=False), nn.Linear(RANK, self.width, bias=False)
        self.q_FacTs, self.v_FacTs = nn.Linear(RANK, RANK, bias=False), nn.Linear(RANK, RANK, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(x)
        qkv[..., : self.width] += self.FacTv(self.q_FacTs(self.FacTu(x)))
        qkv[..., -self.width :] += self.FacTv(self.v_FacTs(self.FacTu(x)))
        return qkv


@pytest.fixture(scope="module")
def base_config() -> SamConfig:
    config = tiny_config()
    config.mask_decoder_config.layer_norm_eps = meta_layout.DECODER_LAYER_NORM_EPS
    return config


@pytest.fixture(scope="module")
def base_weights(base_config: SamConfig) -> dict[str, torch.Tensor]:
    """In Meta's layout."""
    if meta_model.modeling() is None:
        pytest.skip("segment-anything-py is not installed")
    return meta_layout.meta_from_sam(stock_model())


@pytest.fixture(scope="module")
def converted(base_weights, tmp_path_factory) -> Path:
    """As a split model, of which the decoder is Meta's."""
    path = tmp_path_factory.mktemp("converted") / "base"
    as_split(meta_layout.sam_from_meta(base_weights, HEADS)).save_pretrained(path)
    return path


@pytest.fixture
def base(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "base")


@pytest.fixture
def meta(base_config, base_weights) -> nn.Module:
    return meta_model.build(base_config, base_weights)


def noise(module: nn.Module, seed: int = 3) -> None:
    """As training would leave it, in a module whose other parameters keep their values."""
    randomize(module, seed)


def assert_same(base: Path, adapter: Path, meta: nn.Module, config: SamConfig, plain: nn.Module) -> PeftModel:
    """To a thousandth of what the adapter does, from the image to the masks."""
    model = AutoModel.from_pretrained(base, trust_remote_code=True)
    adapted = PeftModel.from_pretrained(model, adapter)
    expected = meta_model.example_outputs(meta, config)
    effect = largest_relative_error(meta_model.example_outputs(plain, config), expected)
    assert effect > 1e-3
    assert largest_relative_error(example_outputs(adapted), expected) < min(1e-3 * effect, 1e-5)
    return adapted


def adapt_samed(meta: nn.Module, layers: list[int]) -> dict[str, torch.Tensor]:
    """Adapts blocks, and returns `w_a_000` and so on."""
    weights = {}
    for number, layer in enumerate(layers):
        attention = meta.image_encoder.blocks[layer].attn
        attention.qkv = lora = QkvLora(attention.qkv, "qv")
        noise(lora.a, layer)
        noise(lora.b, layer + 10)
        for offset, name in enumerate("qv"):
            weights[f"w_a_{2 * number + offset:03d}"] = lora.a[name].weight.detach()
            weights[f"w_b_{2 * number + offset:03d}"] = lora.b[name].weight.detach()
    return weights


def of_samed(meta: nn.Module) -> dict[str, torch.Tensor]:
    """What SAMed saves of the prompt encoder and the decoder."""
    return {name: tensor for name, tensor in meta.state_dict().items() if re.match("prompt_enc|mask_dec", name)}


def test_samed(meta, base, base_config, tmp_path, convert):
    """The decoder is trained as well; what equals the base's stays there."""
    plain = copy.deepcopy(meta)
    lora = adapt_samed(meta, [0, 1, 2])
    noise(meta.mask_decoder.iou_prediction_head)
    noise(meta.prompt_encoder.no_mask_embed)
    torch.save({**lora, **of_samed(meta)}, "epoch_159.pth")
    output = convert("from-samed epoch_159.pth adapter --base base")
    assert "image_mean=0 and image_std=1" in output
    adapted = assert_same(base, tmp_path / "adapter", meta, base_config, plain)
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules) == (RANK, RANK, {"q", "v"})
    assert {path.split(".")[1] for path in config.modules_to_save} == {"iou_prediction_head", "no_mask_embed"}
    assert config.base_model_name_or_path == "base"


@pytest.mark.slow
def test_samed_of_some_blocks(meta, base, base_config, tmp_path, convert, refused):
    plain = copy.deepcopy(meta)
    torch.save(adapt_samed(meta, [0, 2]), "lora.pt")
    assert "adapts 2 blocks, and not 3: give the numbers" in refused("from-samed lora.pt adapter --base base")
    assert "--layers 0 7: expected" in refused("from-samed lora.pt adapter --base base --layers 0 7")
    convert("from-samed lora.pt adapter --base base --layers 0 2")
    assert_same(base, tmp_path / "adapter", meta, base_config, plain)


@pytest.mark.slow
def test_samed_with_lora_of_the_decoder(meta, base, base_config, tmp_path, convert):
    """Of `sam_lora_image_encoder_mask_decoder.py`, which saves the decoder without its transformer."""
    plain = copy.deepcopy(meta)
    weights = adapt_samed(meta, [0, 1, 2])
    transformer = meta.mask_decoder.transformer
    for kind, path in (
        ("sa", "self_attn"),
        ("cti", "cross_attn_token_to_image"),
        ("cit", "cross_attn_image_to_token"),
    ):
        for index, layer in enumerate(transformer.layers):
            for offset, name in enumerate(("q_proj", "v_proj")):
                lora = Lora(getattr(getattr(layer, path), name))
                noise(lora.a, index)
                noise(lora.b, index + 20)
                setattr(getattr(layer, path), name, lora)
                weights[f"{kind}_a_{2 * index + offset:03d}"] = lora.a.weight.detach()
                weights[f"{kind}_b_{2 * index + offset:03d}"] = lora.b.weight.detach()
    for name in "qv":
        lora = Lora(getattr(transformer.final_attn_token_to_image, f"{name}_proj"))
        noise(lora.a)
        noise(lora.b)
        setattr(transformer.final_attn_token_to_image, f"{name}_proj", lora)
        weights |= {f"fati_{name}a": lora.a.weight.detach(), f"fati_{name}b": lora.b.weight.detach()}
    noise(meta.mask_decoder.mask_tokens)
    rest = {name: tensor for name, tensor in of_samed(meta).items() if ".transformer." not in name}
    torch.save({**weights, **rest}, "epoch.pth")
    convert("from-samed epoch.pth adapter --base base")
    assert_same(base, tmp_path / "adapter", meta, base_config, plain)


@pytest.mark.slow
def test_samed_of_more_classes_and_another_image_size(base, base_config, base_weights, tmp_path, convert, refused):
    """The base is resized as SAMed does, bilinearly, and gets the file's decoder of classes + 1 tokens."""
    side, grid, classes = 48, 6, 5
    config = copy.deepcopy(base_config)
    config.vision_config.image_size = config.prompt_encoder_config.image_size = side
    config.mask_decoder_config.num_multimask_outputs = classes
    resized = dict(base_weights)
    resized["image_encoder.pos_embed"] = F.interpolate(
        resized["image_encoder.pos_embed"].permute(0, 3, 1, 2), (grid, grid), mode="bilinear"
    ).permute(0, 2, 3, 1)
    for axis in "hw":
        table = resized[name := f"image_encoder.blocks.1.attn.rel_pos_{axis}"]
        resized[name] = F.interpolate(table.T[None], 2 * grid - 1, mode="linear")[0].T
    decoder = randomize(meta_model.build(base_config, base_weights).mask_decoder, 8)
    new_decoder = meta_model.modeling().MaskDecoder(
        transformer_dim=decoder.transformer_dim,
        transformer=decoder.transformer,
        num_multimask_outputs=classes,
        iou_head_depth=3,
        iou_head_hidden_dim=16,
    )
    randomize(new_decoder, 9)
    resized = {name: tensor for name, tensor in resized.items() if not name.startswith("mask_decoder.")}
    resized |= {f"mask_decoder.{name}": tensor for name, tensor in new_decoder.state_dict().items()}
    meta = meta_model.build(config, resized)
    plain = copy.deepcopy(meta)
    torch.save({**adapt_samed(meta, [0, 1, 2]), **of_samed(meta)}, "epoch.pth")

    message = refused("from-samed epoch.pth adapter --base base")
    assert re.search(r"mask_decoder\.\S+ is \(6,.*\) in the file, and \(4,.*\) in base. Give --base-output", message)
    assert "--base-output" in refused(f"from-samed epoch.pth adapter --base base --image-size {side}")
    for wrong in (50, 0, -48, 8 * 10**9):
        assert f"--image-size {wrong}: expected a multiple of the 8 pixels of a patch, up to 16,384." in refused(
            f"from-samed epoch.pth adapter --base base --base-output new --image-size {wrong}"
        )
    convert(f"from-samed epoch.pth adapter --base base --base-output new --image-size {side}")
    adapted = assert_same(tmp_path / "new", tmp_path / "adapter", meta, config, plain)
    assert adapted.peft_config["default"].base_model_name_or_path == "new"
    assert not adapted.peft_config["default"].modules_to_save


def lora_of_micro_sam(meta: nn.Module) -> dict[str, torch.Tensor]:
    """Adapts q, k and v of the first block, q and v of the last, and the MLP of the last; returns the state dict."""
    blocks = meta.image_encoder.blocks
    for block, projections in ((0, "qkv"), (2, "qv")):
        attention = blocks[block].attn
        attention.qkv = lora = QkvLora(attention.qkv, projections)
        noise(lora.a, block)
        noise(lora.b, block + 10)
    for name in ("lin1", "lin2"):
        lora = Lora(getattr(blocks[2].mlp, name))
        noise(lora.a)
        noise(lora.b)
        setattr(blocks[2].mlp, name, lora)
    renames = (
        (r"attn\.qkv\.([ab])\.([qkv])\.weight", r"attn.qkv.w_\1_linear_\2.weight"),
        (r"mlp\.lin([12])\.([ab])\.weight", r"mlp.w_\2_linear_\1.weight"),
        (r"blocks\.2\.mlp\.(lin[12])\.linear\.", r"blocks.2.mlp.mlp_layer.\1."),
    )
    state_dict = meta.state_dict()
    for pattern, replacement in renames:
        state_dict = {re.sub(pattern, replacement, name): tensor for name, tensor in state_dict.items()}
    return state_dict


def fact_of_micro_sam(meta: nn.Module) -> dict[str, torch.Tensor]:
    for block in meta.image_encoder.blocks:
        block.attn.qkv = fact = Fact(block.attn.qkv)
        for seed, matrix in enumerate((fact.FacTu, fact.FacTv, fact.q_FacTs, fact.v_FacTs)):
            noise(matrix, seed)
    return meta.state_dict()


SURGERIES: dict[str, Callable[[nn.Module], dict[str, torch.Tensor]]] = {
    "LoRA": lora_of_micro_sam,
    "FacT": fact_of_micro_sam,
}


@pytest.mark.parametrize("kind", SURGERIES)
def test_micro_sam(kind, meta, base_config, tmp_path, convert):
    """A `best.pt`, with its own base and a segmentation decoder beside it."""
    plain = copy.deepcopy(meta)
    state_dict = SURGERIES[kind](meta)
    torch.save(
        {
            "iteration": 3,
            "best_metric": np.float64(0.25),
            "model_state": {f"sam.{name}": tensor for name, tensor in state_dict.items()},
            "decoder_state": {"out_conv.weight": torch.zeros(3)},
            "init": {"train_dataset": argparse.Namespace(roi=slice(0, 3)), "loss": nn.Sequential(nn.ReLU())},
        },
        "best.pt",
    )
    output = convert(f"from-micro-sam best.pt out --decoder-heads {HEADS}")
    assert "Prefixes were removed from the names: 'sam.'." in output
    assert "it is no weight of SAM: iteration, best_metric, decoder_state, init" in output
    assert "Not read, because that could run code: objects of argparse.Namespace, builtins.slice, torch.nn" in output
    adapted = assert_same(tmp_path / "out" / "base", tmp_path / "out" / "adapter", meta, base_config, plain)
    assert adapted.peft_config["default"].base_model_name_or_path == "out/base"
    merged = adapted.merge_and_unload()
    assert largest_relative_error(example_outputs(merged), meta_model.example_outputs(meta, base_config)) < 1e-5


@pytest.mark.slow
def test_micro_sam_on_another_base(meta, base, base_config, tmp_path, convert, refused):
    """Which must be the frozen one; the decoder's changes go to the adapter."""
    plain = copy.deepcopy(meta)
    noise(meta.mask_decoder.output_upscaling[0])
    state_dict = lora_of_micro_sam(meta)
    torch.save({"model_state": state_dict}, "best.pt")
    convert("from-micro-sam best.pt out --base base")
    assert not (tmp_path / "out" / "base").exists()
    adapted = assert_same(base, tmp_path / "out" / "adapter", meta, base_config, plain)
    assert adapted.peft_config["default"].modules_to_save == ["mask_decoder.upscale_conv1"]
    state_dict["image_encoder.blocks.1.attn.proj.weight"] += 1
    torch.save({"model_state": state_dict}, "other.pt")
    message = refused("from-micro-sam other.pt other --base base")
    assert "other values for image_encoder.blocks.1.attn.proj.weight. Leave out --base" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("image_encoder.blocks.0.mlp.down_proj.weight", "AdaptFormer"),
        ("image_encoder.blocks.0.attn.proj.scale", "SSF"),
        ("image_encoder.blocks.0.attn.proj.weight.absmax", "4-bit weights of QLoRA"),
        ("image_encoder.blocks.0.attn.mlp.w_a_linear_1.weight", "version of micro-sam which wrote it does not use"),
        ("image_encoder.blocks.0.MLP_Adapter.D_fc1.weight", "adapter layers between SAM's own"),
        ("image_encoder.blocks.1.attn.qkv.w_a_linear_q.weight", "has one matrix of a LoRA"),
        ("image_encoder.blocks.1.attn.qkv.FacTu.weight", "lacks a matrix of FacT"),
        ("decoder.out_conv.weight", "ways that LoRA cannot express: decoder.out_conv.weight"),
    ],
)
def test_other_changes_are_refused(name, message, meta, convert, refused):
    torch.save({**lora_of_micro_sam(meta), name: torch.ones(1, 1)}, "sam.pth")
    assert message in refused(f"from-micro-sam sam.pth out --decoder-heads {HEADS}")


def test_biases_that_no_file_holds_are_refused(meta, base, convert, refused):
    torch.save({**adapt_samed(meta, [0, 1, 2]), "fc_768in_256out": torch.zeros(1)}, "lora.pth")
    assert "whose LoRA also has biases that no file holds" in refused("from-samed lora.pth out --base base")


def test_the_right_command_is_named(meta, base, base_weights, refused):
    torch.save({**base_weights, **adapt_samed(copy.deepcopy(meta), [0])}, "samed.pth")
    assert "SAMed's LoRA: use from-samed" in refused(f"from-meta samed.pth out --decoder-heads {HEADS}")
    torch.save(lora_of_micro_sam(meta), "micro.pth")
    assert "micro-sam's LoRA: use from-micro-sam" in refused(f"from-meta micro.pth out --decoder-heads {HEADS}")
    assert "has no w_a_000" in refused("from-samed micro.pth out --base base")
    torch.save(base_weights, "plain.pth")
    assert "convert a plain SAM with from-meta" in refused("from-micro-sam plain.pth out")


def test_a_wrong_adapter_is_not_kept(meta, base, tmp_path, refused, monkeypatch):
    """One matrix too little is noticed, in the model that is defined by the file."""
    torch.save(adapt_samed(meta, [0, 1, 2]), "lora.pth")
    monkeypatch.setattr(meta_adapters, "assemble", without_the_last)
    assert "Nothing was written" in refused("from-samed lora.pth out --base base")
    assert not (tmp_path / "out").exists()


def without_the_last(adapter, weights, factors, split):
    return assemble(adapter, weights, dict(list(factors.items())[:-1]), split)
