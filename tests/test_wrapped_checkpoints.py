"""What trainers save of Meta's SAM is read, and it is said in plain words what is stripped, and what is refused."""

import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, stock_model
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import SamModel, SamProcessor

from checkpoint_tools import meta_layout, wrapped_checkpoints


HEADS = "--decoder-heads 2"
SAMED_PIXELS = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
META_PIXELS = {
    "pixel_mean": torch.tensor([123.675, 116.28, 103.53])[:, None, None],
    "pixel_std": torch.tensor([58.395, 57.12, 57.375])[:, None, None],
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return meta_layout.meta_from_sam(stock_model())


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


FILES = {
    "plain": (lambda weights: weights, []),
    "an ordered dict": (OrderedDict, []),
    "MedSAM": (
        lambda weights: {"model": weights, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 3},
        ["under 'model'", "optimizer, epoch"],
    ),
    "DataParallel": (lambda weights: {"model": prefixed(weights, "module.")}, ["'module.'"]),
    "Lightning": (
        lambda weights: {"state_dict": prefixed(weights, "model."), "pytorch-lightning_version": "2.5", "epoch": 1},
        ["under 'state_dict'", "'model.'", "pytorch-lightning_version"],
    ),
    "micro-sam": (
        lambda weights: {
            "model_state": prefixed(weights, "sam."),
            "decoder_state": {"out_conv.weight": torch.zeros(2)},
            "best_metric": np.float64(0.3),
            "epoch": np.int64(2),
            "losses": np.zeros(3, dtype=np.float32),
        },
        ["under 'model_state'", "'sam.'", "decoder_state"],
    ),
    "a loop": (lambda weights: {"model_state_dict": prefixed(weights, "net."), "loss": torch.zeros(())}, ["loss"]),
    "compiled in DistributedDataParallel": (lambda weights: prefixed(weights, "module._orig_mod."), ["_orig_mod"]),
    "DeepSpeed": (lambda weights: {"module": prefixed(weights, "sam_model."), "lr": np.float32(1)}, ["'sam_model.'"]),
    "wrapped twice": (
        lambda weights: {"model": {"state_dict": weights, "arch": "vit_b"}},
        ["'model.state_dict'", "arch"],
    ),
    "a configuration of the same name": (
        lambda weights: {"model": {"name": "vit_b"}, "state_dict": weights},
        ["under 'state_dict'", "model"],
    ),
    "with pixel statistics": (lambda weights: {**weights, **META_PIXELS}, []),
}


@pytest.mark.parametrize("case", FILES)
def test_what_trainers_save(case, weights, convert):
    """The weights are the same, bit for bit."""
    wrap, messages = FILES[case]
    torch.save(wrap(weights), "sam.pth")
    output = convert(f"from-meta sam.pth out --stock {HEADS}")
    for message in messages:
        assert message in output
    expected = stock_model().state_dict()
    for name, tensor in SamModel.from_pretrained("out").state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_safetensors_and_the_old_format(weights, convert):
    save_file(weights, "sam.safetensors")
    torch.save(weights, "old.pth", _use_new_zipfile_serialization=False)
    for file in ("sam.safetensors", "old.pth"):
        convert(f"from-meta {file} {Path(file).stem} --stock {HEADS}")
        assert torch.equal(
            SamModel.from_pretrained(Path(file).stem).vision_encoder.pos_embed, weights["image_encoder.pos_embed"]
        )


def test_several_dtypes(weights, convert):
    """The widest holds them all."""
    mixed = {name: tensor.half() if name.startswith("image_encoder.") else tensor for name, tensor in weights.items()}
    torch.save(mixed, "sam.pth")
    assert "several dtypes (float16, float32): all are written in float32" in convert(
        f"from-meta sam.pth out {HEADS} --stock"
    )
    model = SamModel.from_pretrained("out")
    assert model.dtype == torch.float32
    assert torch.equal(model.vision_encoder.pos_embed, mixed["image_encoder.pos_embed"].float())
    assert torch.equal(model.mask_decoder.iou_token.weight, mixed["mask_decoder.iou_token.weight"])


REFUSED = {
    "a whole module": (lambda weights: nn.Linear(2, 2), "torch.nn.modules.linear.Linear, which is code: save the"),
    "a module under a name": (lambda weights: {"model": nn.Linear(2, 2)}, "save the model's state_dict() instead"),
    "numbers as names": (lambda weights: {0: torch.zeros(2)}, "expected tensors by name"),
    "a list": (lambda weights: [weights], "holds a list: expected a state dict"),
    "nothing": (lambda weights: {}, "got nothing"),
    "no tensors": (lambda weights: {"epoch": 3, "lr": 0.1}, "got 'epoch', 'lr'"),
    "two models": (lambda weights: {"model": weights, "state_dict": weights}, "under 'model' and 'state_dict'"),
    "two models in one": (
        lambda weights: {**weights, **prefixed(weights, "module.")},
        "twice, with different prefixes",
    ),
    "integers": (lambda weights: {**weights, "scale": torch.ones(2, dtype=torch.int8)}, "got other dtypes in scale"),
    "NaN": (
        lambda weights: {**weights, "image_encoder.pos_embed": weights["image_encoder.pos_embed"] * torch.nan},
        "holds NaN or infinity in image_encoder.pos_embed",
    ),
    "transformers' layout": (lambda weights: stock_model().state_dict(), "give its folder to to-split"),
    "MobileSAM": (
        lambda weights: {**weights, "image_encoder.layers.0.blocks.0.conv.weight": torch.zeros(2)},
        "the TinyViT of MobileSAM",
    ),
    "more weights": (lambda weights: {**weights, "loss.weight": torch.zeros(2)}, "unknown: loss.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, weights, tmp_path, refused):
    wrap, message = REFUSED[case]
    torch.save(wrap(weights), "sam.pth")
    assert message in refused(f"from-meta sam.pth out {HEADS}")
    assert [path.name for path in tmp_path.iterdir()] == ["sam.pth"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sam.pth", b"not a checkpoint", "sam.pth is damaged, or was not written by torch.save"),
        ("sam.pth", b"", "sam.pth is damaged, or was not written by torch.save"),
        ("sam.safetensors", b"not a checkpoint", "sam.safetensors is damaged, or no safetensors file"),
    ],
)
def test_garbage(name, content, message, tmp_path, refused):
    (tmp_path / name).write_bytes(content)
    assert message in refused(f"from-meta {name} out")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript(refused):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(2)).save("sam.pt")
    assert "sam.pt is a TorchScript archive, which is code" in refused("from-meta sam.pt out")


def test_the_file_of_to_meta_has_a_name_that_fits(stock_dir, tmp_path, refused):
    assert "choose a name that ends in .pth" in refused(f"to-meta {stock_dir} sam.safetensors")


def test_damage_of_any_kind_is_one_error(tmp_path):
    """In both formats, cut off or with wrong bytes, whatever torch raises."""
    path, generator = tmp_path / "sam.pth", random.Random(0)
    content = {"model": {"weight": torch.zeros(9)}, "loss": np.float64(1)}
    for is_new in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=is_new)
        whole = path.read_bytes()
        for _ in range(40):
            cut, changed = whole[: generator.randrange(len(whole))], bytearray(whole)
            for _ in range(3):
                changed[generator.randrange(len(whole))] = generator.randrange(256)
            for damaged in (cut, bytes(changed)):
                path.write_bytes(damaged)
                try:
                    wrapped_checkpoints.read(path)
                except ValueError as error:
                    message = str(error)
                    assert message.startswith(str(path))
                    assert "is damaged" in message or damaged != cut or not is_new
                else:
                    assert damaged != cut


@pytest.mark.parametrize("heads", ["0", "-1", "3"])
def test_heads_that_do_not_divide_the_decoder(heads, weights, refused):
    torch.save(weights, "sam.pth")
    assert f"--decoder-heads {heads}: expected a divisor" in refused(f"from-meta sam.pth out --decoder-heads {heads}")


# Options, what the file records, the pixels that the model gets of values 0 to 255, and what is said.
NORMALIZATIONS = {
    "Meta's": ("", {}, lambda x: (x / 255 - 0.485) / 0.229, "that is a guess: see --image-mean"),
    "recorded": ("", META_PIXELS, lambda x: (x - 123.675) / 58.395, None),
    "recorded as none": ("", SAMED_PIXELS, lambda x: x / 255, "images are only divided by 255"),
    "given": ("--image-mean 0.5 0.5 0.5 --image-std 0.25 0.25 0.25", {}, lambda x: (x / 255 - 0.5) / 0.25, None),
    "given, not as recorded": ("--image-mean 0.5 0.5 0.5", META_PIXELS, lambda x: x / 255 - 0.5, None),
    "MedSAM's": ("--rescale min-max", {}, lambda x: x / 255, "expects each image stretched"),
}


@pytest.mark.parametrize("case", NORMALIZATIONS)
def test_normalization(case, weights, convert):
    options, recorded, expected, message = NORMALIZATIONS[case]
    torch.save({**weights, **recorded}, "sam.pth")
    output = convert(f"from-meta sam.pth out {HEADS} {options}")
    assert (message in output) if message else "guess" not in output
    red = np.zeros((64, 64, 3), dtype=np.uint8)
    red[..., 0] = np.arange(64) * 4
    pixels = SamProcessor.from_pretrained("out")(Image.fromarray(red), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0, 0, 5].double(), expected(torch.arange(64) * 4.0).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "expected"),
    [("mean 123 116 103", "expected numbers from 0 to 1, as images have values of 0 to 1: divide those of 0 to 255"),
     ("mean nan 0 0", "expected numbers from 0 to 1"), ("mean -0.1 0 0", "expected numbers from 0 to 1"),
     ("std 0 1 1", "expected numbers above 0 and up to 1"), ("std 1 inf 1", "expected numbers above 0 and up to 1"),
     ("std 58.4 57.1 57.4", "expected numbers above 0 and up to 1")],
)  # fmt: skip
def test_normalization_that_no_images_of_0_to_1_have(option, expected, weights, refused):
    torch.save(weights, "sam.pth")
    assert f"--image-{option}: {expected}" in refused(f"from-meta sam.pth out {HEADS} --image-{option}")


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_normalization_in_a_file_that_would_give_no_numbers(value, weights, refused):
    torch.save({**weights, **META_PIXELS, "pixel_std": torch.tensor([58.4, value, 57.4]).view(3, 1, 1)}, "sam.pth")
    assert "pixel_std is [58." in (message := refused(f"from-meta sam.pth out {HEADS}"))
    assert "expected numbers above 0." in message


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("vision_config", "hidden_act", "relu"), ("mask_decoder_config", "hidden_act", "gelu"),
     ("vision_config", "layer_norm_eps", 1e-5), ("prompt_encoder_config", "hidden_act", "relu")],
)  # fmt: skip
def test_settings_that_metas_code_does_not_have(part, name, value, tmp_path, refused):
    config = stock_model().config
    setattr(getattr(config, part), name, value)
    randomize(SamModel(config)).save_pretrained(tmp_path / "sam")
    assert f"Meta's layout cannot express {name}={value!r} of {part}" in refused("to-meta sam out.pth")
