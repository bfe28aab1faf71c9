"""What of the model is trained."""

import re

import numpy as np
import pytest

from checkpoint_tools.checkout import SAM_TINY
from checkpoint_tools.loading import processor_for
from finetune import parse_args
from finetuning.trainable_weights import make_trainable
from segmentation.adapted_model import ModelError, load_base


VISION_LORA = r"vision_encoder\.layers\.\d\.attn\.[qv]\.lora_[AB]\.default\.weight"
DECODER_LORA = r"mask_decoder\.transformer\.[\w.]+\.[qv]_proj\.lora_[AB]\.default\.weight"


@pytest.mark.parametrize(
    ("arguments", "adapters", "whole"),
    [
        ([], VISION_LORA, "mask_decoder"),
        (["--train-decoder", "none"], VISION_LORA, None),
        (["--target", "q", "v", "--rslora", "--train-decoder", "none"], VISION_LORA, None),
        (
            ["--target", "k", "lin1", "--train-decoder", "none"],
            r"vision_encoder\.layers\.\d\.(attn\.k|mlp\.lin1)\.lora_[AB]\.default\.weight",
            None,
        ),
        (["--dora"], VISION_LORA.replace(r"lora_[AB]\.default", r"lora_\w+\.default"), "mask_decoder"),
        (["--train-decoder", "lora"], f"{VISION_LORA}|{DECODER_LORA}", None),
        (["--method", "full", "--train-decoder", "none"], None, "vision_encoder"),
        (["--method", "full"], None, "vision_encoder|mask_decoder"),
        (["--method", "decoder"], None, "mask_decoder"),
    ],
    ids=str,
)
def test_trains_what_is_asked_for(arguments, adapters, whole, load):
    model = make_trainable(load(), parse_args(arguments).model)
    names = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    adapted = {name for name in names if "lora_" in name}
    assert bool(adapted) == bool(adapters)
    assert all(re.fullmatch(adapters, name) for name in adapted)
    own = {name for name, _ in load().named_parameters()}
    assert names - adapted == {name for name in own if whole and re.match(whole, name)}
    for alternative in (adapters or "").split("|mask"):  # each part of it is there
        assert not alternative or any(re.search(alternative.removeprefix("mask"), name) for name in adapted)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the name that 5.0 knows
@pytest.mark.parametrize("arguments", [[], ["--train-decoder", "lora"], ["--gradient-checkpointing"]], ids=str)
def test_last_layers_cost_no_backward_below(arguments, load, inputs):
    args = parse_args(["--last-layers", "1", *arguments])
    model = make_trainable(load(), args.model).train()
    if args.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.training.gradient_checkpointing_kwargs)
    needs_grad = []
    for layer in model.base_model.model.vision_encoder.layers:
        layer.register_forward_hook(lambda *hooked: needs_grad.append(hooked[2].requires_grad))
    outputs = model(**inputs)
    (outputs.pred_masks.mean() + outputs.iou_scores.mean()).backward()
    assert needs_grad[:3] == [False, False, True]
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    adapted = [name for name, p in model.named_parameters() if p.requires_grad and "vision_encoder" in name]
    assert len(adapted) == 4 and all(".layers.2.attn." in name for name in adapted)


def test_impossible_adapters_are_refused(load):
    for arguments, problem in (
        (["--last-layers", "4"], "--last-layers 4: expected 1 to 3"),
        (["--target", "qkv"], "--target qkv"),
    ):
        with pytest.raises(ModelError, match=problem):
            make_trainable(load(), parse_args(arguments).model)


def test_another_image_side_is_that_of_the_processor_too():
    model, processor = load_base(str(SAM_TINY), image_size=192)
    own, expected = processor.image_processor.to_dict(), processor_for(model.config).image_processor.to_dict()
    assert own == {**expected, "image_mean": own["image_mean"], "image_std": own["image_std"]}
    inputs = processor(np.zeros((30, 60, 3), np.uint8), input_points=[[[60, 30]]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 192, 192)
    assert inputs["input_points"].flatten().tolist() == [192, 96]
    with pytest.raises(ModelError, match="image_size"):
        load_base(str(SAM_TINY), image_size=100)
