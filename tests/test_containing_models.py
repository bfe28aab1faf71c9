"""A model of one's own that contains this one, and its checkpoints as a whole."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_holds_weights_of
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, SamModel

from checkpoint_tools.checkout import split_class


pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.6"), reason="transformers looks up conversions of the whole only"
)


class ContainerConfig(PreTrainedConfig):
    model_type = "container"
    sub_configs = {"sam": AutoConfig}

    def __init__(self, sam=None, **kwargs):
        self.sam = split_class().config_class(**sam) if isinstance(sam, dict) else sam
        super().__init__(**kwargs)


class Container(PreTrainedModel):
    config_class = ContainerConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.sam = split_class()(config.sam)
        self.head = nn.Linear(2, 2)
        self.post_init()


@pytest.fixture
def fused_checkpoint(stock: SamModel, stock_dir: Path, tmp_path: Path) -> Path:
    """As it was saved when the container had a stock SAM."""
    path = tmp_path / "container"
    ContainerConfig(sam=split_class().config_class.from_pretrained(stock_dir)).save_pretrained(path)
    weights = {f"sam.{name}": tensor for name, tensor in load_file(stock_dir / "model.safetensors").items()}
    weights |= {"head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_fused_weights_are_split(fused_checkpoint, stock):
    model, info = Container.from_pretrained(fused_checkpoint, output_loading_info=True)
    assert not any(info.values())
    assert_holds_weights_of(model.sam, stock)


def test_it_is_saved_split_or_not_at_all(fused_checkpoint, stock, tmp_path):
    model = Container.from_pretrained(fused_checkpoint)
    with pytest.raises(NotImplementedError, match="save_original_format=False"):
        model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert_holds_weights_of(Container.from_pretrained(tmp_path / "saved").sam, stock)
