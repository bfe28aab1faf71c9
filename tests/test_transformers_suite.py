"""In small, what transformers' `ConfigTester` and `ModelTesterMixin`, which no wheel holds, ask of every model."""

import re

import pytest
import torch
from conftest import assert_same_outputs, randomize, tiny_config
from transformers import PreTrainedConfig, PreTrainedModel, SamModel, SamVisionModel

from checkpoint_tools.checkout import split_class


@pytest.fixture(params=[SamModel, SamVisionModel])
def stock_class(request) -> type[PreTrainedModel]:
    return request.param


@pytest.fixture
def model_class(stock_class) -> type[PreTrainedModel]:
    return split_class(stock_class.__name__.replace("Sam", "SamSplit"))


@pytest.fixture
def config(stock_class, model_class) -> PreTrainedConfig:
    return model_class.config_class.from_sam(tiny_config() if stock_class is SamModel else tiny_config().vision_config)


@pytest.fixture
def pair(stock_class, model_class, config) -> tuple[PreTrainedModel, PreTrainedModel]:
    """One of our models and stock's, with the same weights."""
    stock = randomize(stock_class._from_config(config.to_sam(), attn_implementation="eager"))
    ours = model_class._from_config(config, attn_implementation="eager")
    ours.load_state_dict(stock.state_dict())
    return ours.eval(), stock.eval()


@pytest.fixture
def inputs(stock_class, inputs) -> dict[str, torch.Tensor]:
    return inputs if stock_class is SamModel else {"pixel_values": inputs["pixel_values"]}


def test_configuration_round_trips(config, tmp_path):
    config.save_pretrained(tmp_path / "folder")
    config.to_json_file(tmp_path / "file.json")
    for reloaded in (
        type(config).from_json_file(tmp_path / "file.json"),
        type(config).from_pretrained(tmp_path / "folder"),
        type(config).from_pretrained(tmp_path, subfolder="folder"),
    ):
        assert reloaded.to_dict() == config.to_dict()
    with pytest.raises(OSError, match="elsewhere"):
        type(config).from_pretrained(tmp_path / "elsewhere")


def test_parts_of_a_configuration_load_from_the_whole(tmp_path):
    whole = split_class().config_class.from_sam(tiny_config())
    assert whole.sub_configs["vision_config"] is split_class("SamSplitVisionModel").config_class
    whole.save_pretrained(tmp_path / "whole")
    for part, part_class in whole.sub_configs.items():
        assert type(getattr(whole, part)) is part_class
        loaded = part_class.from_pretrained(tmp_path / "whole")
        assert loaded.to_diff_dict() == getattr(whole, part).to_diff_dict()
        loaded.save_pretrained(tmp_path / part)
        assert part_class.from_pretrained(tmp_path / part).to_dict() == loaded.to_dict()


def test_configuration_takes_what_every_configuration_takes(config, logged):
    general = {"output_hidden_states": True, "output_attentions": True, "return_dict": False, "num_labels": 5}
    given = type(config)(**general, dtype="float16", architectures=["Model"], problem_type="regression")
    assert {key: getattr(given, key) for key in general} == general
    assert (given.dtype, given.architectures, given.problem_type) == (torch.float16, ["Model"], "regression")
    type(config)()
    assert logged == []


def test_weights_are_initialized_as_in_stock(model_class, stock_class, config):
    first, second = (torch.manual_seed(0) and model_class(config).state_dict() for _ in range(2))
    stock = stock_class(config.to_sam()).state_dict()
    for key, weight in first.items():
        assert torch.equal(weight, second[key]), key
        expected = stock[re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", key)]
        deviation, expected = (tensor.std(correction=0) for tensor in (weight, expected))
        assert torch.isclose(deviation, expected, rtol=0.5, atol=0.0), key  # small tensors scatter
    model_class.from_pretrained(None, config=config, state_dict=first)


def test_a_saved_model_is_the_same(pair, model_class, inputs, tmp_path):
    model, stock = pair
    model.save_pretrained(tmp_path)
    reloaded = model_class.from_pretrained(tmp_path, attn_implementation="eager")
    reloaded.save_pretrained(tmp_path)
    assert model_class.from_pretrained(tmp_path).config.to_dict() == reloaded.config.to_dict()
    assert reloaded.all_tied_weights_keys == stock.all_tied_weights_keys
    for tied in reloaded.all_tied_weights_keys.items():
        assert len({reloaded.state_dict()[key].data_ptr() for key in tied}) == 1, tied
    with torch.no_grad():
        assert_same_outputs(reloaded(**inputs), model(**inputs), tolerance=0)


def test_parts_of_the_model_share_its_configuration(pair):
    ours, stock = pair
    parts = {name: part for name, part in ours.named_modules() if isinstance(part, PreTrainedModel)}
    assert list(parts) == [name for name, part in stock.named_modules() if isinstance(part, PreTrainedModel)]
    assert parts["vision_encoder"].config is getattr(ours.config, "vision_config", ours.config)
    for attribute in ("base_model_prefix", "main_input_name", "input_modalities"):
        assert getattr(ours, attribute) == getattr(stock, attribute), attribute
    assert type(ours.get_input_embeddings()) is type(stock.get_input_embeddings())
    assert ours.get_output_embeddings() is stock.get_output_embeddings() is None


def test_hidden_states_and_attentions(pair, inputs):
    ours, stock = pair
    options = {"output_hidden_states": True, "output_attentions": True}
    outputs = ours(**inputs, **options)
    assert_same_outputs(outputs, stock(**inputs, **options))
    assert len(ours(**inputs, **options, return_dict=False)) == len(outputs.to_tuple())
    recorded = [tensors[1] for name, tensors in outputs.items() if re.match("(vision_)?(hidden|attentions)", name)]
    for tensor in recorded:
        tensor.retain_grad()
    outputs[0].sum().backward()
    assert [tensor.grad is not None for tensor in recorded] == [True, True]
    for config in (ours.config, *(getattr(ours.config, part) for part in ours.config.sub_configs)):
        config.output_attentions = config.output_hidden_states = True
    assert_same_outputs(ours(**inputs), outputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_implementations_and_batches_agree(dtype, tolerance, pair, inputs):
    model = pair[0].to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs)
        for implementation in ("sdpa", "eager", {"": "sdpa", "vision_config": "sdpa"}):
            model.set_attn_implementation(implementation)
            used = "eager" if implementation == "eager" else "sdpa"
            assert model.config._attn_implementation == model.vision_encoder.config._attn_implementation == used
            assert_same_outputs(model(**inputs), expected, tolerance)
            first = model(**{name: tensor[:1] for name, tensor in inputs.items()})
            assert_same_outputs({0: first[0]}, {0: expected[0][:1]}, tolerance)


def test_meta_device(model_class, config, tmp_path):
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in model_class(config).state_dict().values())
    model_class(config).save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        model_class.from_pretrained(tmp_path)
