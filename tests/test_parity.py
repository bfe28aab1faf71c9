"""Outputs and gradients are stock's, with either attention implementation."""

import pytest
import torch
from conftest import assert_same_outputs, stock_model, tiny_config
from torch import nn
from transformers import SamModel, SamVisionModel

from checkpoint_tools.checkout import split_class


VARIANTS = [{}, {"qkv_bias": False}, {"use_rel_pos": False}, {"window_size": 0}, {"window_size": 8}]


def pair(implementation: str, **vision) -> tuple[nn.Module, nn.Module]:
    """The stock model and ours with the same weights."""
    stock = stock_model(**vision)
    if implementation != stock.config._attn_implementation:
        weights = stock.state_dict()
        stock = type(stock)._from_config(stock.config, attn_implementation=implementation).eval()
        stock.load_state_dict(weights)
    split = split_class()(stock.config).eval()
    assert split.config._attn_implementation == split.vision_encoder.layers[0].attn.config._attn_implementation
    assert split.config._attn_implementation == implementation
    split.load_state_dict(stock.state_dict())
    return stock, split


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("vision", VARIANTS, ids=str)
def test_outputs(vision, implementation, inputs):
    stock, split = pair(implementation, **vision)
    with torch.no_grad():
        options = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
        assert_same_outputs(split(**inputs, **options), stock(**inputs, **options))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("vision", VARIANTS, ids=str)
def test_gradients_in_double_precision(vision, implementation, inputs):
    stock, split = (model.double() for model in pair(implementation, **vision))
    pixel_values = inputs["pixel_values"].double()
    gradients = []
    for model in (stock, split):
        leaf = pixel_values.clone().requires_grad_()
        model.vision_encoder(leaf).last_hidden_state.square().sum().backward()
        named = {name: parameter.grad for name, parameter in model.vision_encoder.named_parameters()}
        gradients.append({"pixel_values": leaf.grad, **named})
    of_stock, of_split = gradients
    for name, expected in of_stock.items():
        actual = of_split[name] if name in of_split else torch.cat([of_split[name.replace("qkv", p)] for p in "qkv"])
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-10 * expected.abs().max()), name


def test_prompts(inputs):
    stock, split = pair("sdpa")
    prompts = [
        {"input_boxes": torch.tensor([[[4.0, 8.0, 30.0, 40.0]], [[1.0, 1.0, 60.0, 20.0]]])},
        {"input_masks": torch.randn(2, 1, 32, 32)},
        {"input_points": inputs["input_points"], "multimask_output": False},
    ]
    with torch.no_grad():
        for prompt in prompts:
            assert_same_outputs(split(inputs["pixel_values"], **prompt), stock(inputs["pixel_values"], **prompt))
        embeddings = split.get_image_embeddings(inputs["pixel_values"])
        assert_same_outputs(
            {"embeddings": embeddings}, {"embeddings": stock.get_image_embeddings(inputs["pixel_values"])}
        )


def test_vision_model(inputs):
    stock = SamVisionModel(stock_model().config.vision_config).eval()
    split = split_class("SamSplitVisionModel")(stock.config).eval()
    split.load_state_dict(stock.state_dict())
    with torch.no_grad():
        assert_same_outputs(split(inputs["pixel_values"]), stock(inputs["pixel_values"]))


def test_switching_the_implementation(load, inputs):
    model = load()
    with torch.no_grad():
        expected = model(**inputs)
        model.set_attn_implementation("eager")
        assert_same_outputs(model(**inputs), expected)
        attentions = model(**inputs, output_attentions=True).vision_attentions
        assert [tuple(weights.shape) for weights in attentions] == [(36, 9, 9), (4, 64, 64), (36, 9, 9)]
        for weights in attentions:
            assert torch.allclose(weights.sum(-1), torch.ones(1), atol=1e-5)
        model.set_attn_implementation("sdpa")
        assert_same_outputs(model(**inputs), expected)


def test_eager_on_load(load, inputs):
    model = load(attn_implementation="eager")
    with torch.no_grad():
        assert model(**inputs, output_attentions=True).vision_attentions[0] is not None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_dropout_is_not_ignored(implementation, inputs):
    _, split = pair(implementation, attention_dropout=0.5)
    with torch.no_grad():
        first, second = (split.train()(**inputs).pred_masks for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (split.eval()(**inputs).pred_masks for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its successor is not in 5.0
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, inputs):
    _, split = pair("sdpa")
    split.train()

    def gradients() -> dict[str, torch.Tensor]:
        split.zero_grad()
        pixel_values = inputs["pixel_values"].clone().requires_grad_()
        split(pixel_values, input_points=inputs["input_points"]).pred_masks.sum().backward()
        return {name: parameter.grad for name, parameter in split.named_parameters() if parameter.grad is not None}

    expected = gradients()
    split.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    split.vision_encoder.layers[0].attn.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients()
    assert len(calls) == 2, "the layer was not recomputed"
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-4, atol=1e-6), name


def test_no_fused_parameter_stays():
    """Not even where the model is built from a configuration alone, and stock's layers stand for an instant."""
    model = split_class()(stock_model().config)
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    assert (28, 28) in shapes
    assert not shapes & {(84, 28), (84,)}
    assert not any("qkv" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("stock_class", [SamModel, SamVisionModel])
@pytest.mark.parametrize("part", ["", "vision_config"])
def test_gradient_checkpointing_by_configuration(part, stock_class):
    config = tiny_config() if stock_class is SamModel else tiny_config().vision_config
    getattr(config, part, config).gradient_checkpointing = True
    models = [split_class(stock_class.__name__.replace("Sam", "SamSplit"))(config), stock_class(config)]
    ours, expected = (
        [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
        for model in models
    )
    assert ours == expected != []
    assert '"gradient_checkpointing"' not in models[0].config.to_json_string()


def test_layers_are_kept_whole_on_one_device(load):
    model = load()
    names = set(model._no_split_modules)
    assert names == {type(layer).__name__ for layer in model.vision_encoder.layers}


@pytest.mark.parametrize("shape", [(1, 3, 48, 48), (1, 3, 64, 48), (1, 3, 72, 72), (1, 1, 64, 64)], ids=str)
def test_images_of_other_sizes_raise_as_in_stock(shape, stock, load):
    messages = []
    for model in (stock, load()):
        with pytest.raises(ValueError, match="match") as error:
            model(torch.randn(shape), input_points=torch.zeros(1, 1, 1, 2))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
