"""PEFT's methods on q and v do what the tables in docs/peft-methods.md say."""

import pytest

from benchmarks import peft_family
from checkpoint_tools.checkout import ROOT


PAGE = (ROOT / "docs" / "peft-methods.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("family")
    peft_family.small_sam().save_pretrained(path)
    return str(path)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Unsupported layer type:UserWarning",  # LN tuning, of LayerNorm itself
    "ignore:Failed to load the CUDA extension:UserWarning",  # BOFT, on a CPU
    "ignore:Setting boft_n_butterfly_factor:UserWarning",
    "ignore:lora with eva initialization:UserWarning",
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",  # AdaLoRA, though they do
    "ignore:Merge lora module to 4-bit:UserWarning",
)
@pytest.mark.parametrize("name", peft_family.METHODS)
def test_method(name, base):
    result = peft_family.measure(peft_family.METHODS[name], base)
    row = peft_family.methods_table({name: result}).splitlines()[-1]
    assert row in PAGE.splitlines()
    if not result.error:
        assert result.trained
        assert result.reload <= peft_family.EQUAL
        assert result.effect > 10 * peft_family.EQUAL


def test_recipes():
    """With the counts that the page gives."""
    assert peft_family.recipes_table() in PAGE


def test_a_method_that_peft_lacks_is_told(base):
    result = peft_family.measure(peft_family.Method("ConfigOfTheFuture"), base)
    assert "has no ConfigOfTheFuture" in result.error


def test_an_adapter_that_leaves_out_layers_does_not_train(base):
    """So the "trains" column can be "no"."""
    method = peft_family.Method("LoraConfig", {"layers_to_transform": [0], "layers_pattern": "layers"})
    assert not peft_family.measure(method, base).trained
