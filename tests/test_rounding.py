"""The comparison after a conversion fails in every dtype, and what rounding takes of an adapter is said."""

import re
from pathlib import Path

import pytest
import torch
from conftest import configure, randomize, rewrite, stock_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from transformers import SamModel

from checkpoint_tools import conversions, fused_adapters
from checkpoint_tools.checkout import split_class
from checkpoint_tools.output_comparison import example_outputs, largest_relative_error


HALF = ["float16", "bfloat16"]


def base_in(dtype: str, folder: Path) -> Path:
    """The tiny stock model, rounded."""
    stock_model().to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, size: float) -> float:
    """Writes a LoRA of q and v and returns its effect; B is noise of a `size`, or zero as before training."""
    model = split_class().from_pretrained(base, dtype=torch.float64)
    plain = example_outputs(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q", "v"], r=2, task_type="FEATURE_EXTRACTION"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            randomize(torch.nn.ParameterList([parameter]))
            parameter.data *= size if "lora_B" in name else 1
    adapted.save_pretrained(folder)
    return largest_relative_error(example_outputs(adapted), plain)


def drop_the_adapter(self: LoraModel, *args, **kwargs) -> torch.nn.Module:
    return self.unload()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("size", [1.0, 0.03, 1e-5])
def test_a_dropped_adapter_is_noticed(size, dtype, tmp_path, refused, monkeypatch):
    effect = write_adapter(base_in(dtype, tmp_path / "base"), tmp_path / "adapter", size)
    assert 1e-7 < effect < 1
    monkeypatch.setattr(LoraModel, "merge_and_unload", drop_the_adapter)
    assert "its outputs differ from the source's by" in refused("to-sam base out --adapter adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_what_is_written_is_what_was_rounded(dtype, tmp_path, refused, monkeypatch):
    """A change of the file is not taken for rounding."""
    write_adapter(base_in(dtype, tmp_path / "base"), tmp_path / "adapter", 0.03)

    def tamper(source: str, folder: Path, *_: object) -> None:
        rewrite(folder, lambda weights: weights["vision_encoder.neck.conv1.weight"].mul_(1.01))

    monkeypatch.setattr(conversions, "copy_processor", tamper)
    message = refused("to-sam base out --adapter adapter")
    assert "weights in the file are not those of the model: vision_encoder.neck.conv1.weight" in message


@pytest.mark.parametrize("dtype", HALF)
def test_what_rounding_takes_is_said(dtype, tmp_path, convert):
    """And float32, which is offered, takes nothing."""
    effect = write_adapter(base_in(dtype, tmp_path / "base"), tmp_path / "adapter", 0.03)
    output = convert("to-sam base out --adapter adapter")
    note = re.search(rf"Rounding to {dtype} changes the outputs by (\S+) \(relative\), which is (\d+)% of", output)
    assert note, output
    assert "--dtype float32 avoids that" in output

    model = PeftModel.from_pretrained(split_class().from_pretrained("base", dtype=torch.float32), "adapter")
    expected = example_outputs(model)
    written = SamModel.from_pretrained("out")
    assert written.dtype == getattr(torch, dtype)
    lost = largest_relative_error(example_outputs(written.float()), expected)
    assert lost == pytest.approx(float(note[1]), rel=0.1)
    assert lost / effect == pytest.approx(int(note[2]) / 100, abs=0.02)

    assert "Rounding" not in convert("to-sam base whole --adapter adapter --dtype float32")
    whole = SamModel.from_pretrained("whole")
    assert whole.dtype == torch.float32
    assert largest_relative_error(example_outputs(whole), expected) < 0.01 * effect


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_nothing_is_rounded_without_an_adapter(dtype, tmp_path, convert):
    base_in(dtype, tmp_path / "base")
    assert "Rounding" not in convert("to-sam base out")
    assert "Rounding to bfloat16" in convert("to-sam base other --dtype bfloat16") or dtype == "bfloat16"


def test_float64_is_kept(tmp_path, convert):
    base = randomize(stock_model().double())
    base.save_pretrained(tmp_path / "base")
    convert("to-sam base out")
    back = SamModel.from_pretrained("out")
    assert back.dtype == torch.float64
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in base.state_dict().items())


def test_an_untrained_adapter_has_nothing_to_compare(tmp_path, convert):
    assert write_adapter(base_in("float32", tmp_path / "base"), tmp_path / "adapter", 0) == 0
    output = convert("to-sam base out --adapter adapter")
    assert "The adapter changes nothing, as if it were untrained" in output
    output = convert("adapter-to-fused adapter fused --base base")
    assert "The adapter changes nothing, as if it were untrained" in output


def test_what_does_not_fit_into_float16_is_refused(tmp_path, refused):
    base_in("float32", tmp_path / "base")
    rewrite(tmp_path / "base", lambda weights: weights["vision_encoder.pos_embed"].fill_(1e5))
    message = refused("to-sam base out --dtype float16")
    assert "In float16, the model holds NaN or infinity in vision_encoder.pos_embed: give --dtype float32" in message


@pytest.mark.parametrize("command", ["to-sam base out", "to-split base out", "to-meta base out.pth"])
def test_weights_that_are_not_numbers_are_named(command, tmp_path, refused):
    base_in("float32", tmp_path / "base")
    rewrite(tmp_path / "base", lambda weights: weights["vision_encoder.neck.conv1.weight"].fill_(float("nan")))
    assert "holds NaN or infinity in vision_encoder.neck.conv1.weight" in refused(command)


def test_a_file_of_a_wider_dtype_than_its_configuration_is_refused(tmp_path, refused):
    """Else its weights would be rounded on the way."""
    configure(base_in("float32", tmp_path / "base"), "dtype", "bfloat16")
    assert "correct `dtype` there" in refused("to-sam base out")


@pytest.mark.parametrize("target", ["q", "qkv"])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_a_wrong_conversion_of_an_adapter_is_noticed(size, target, tmp_path, convert, refused, monkeypatch):
    """However small its effect is: here, one projection of one layer is lost."""
    write_adapter(base_in("float32", tmp_path / "base"), tmp_path / "adapter", size)
    command = "adapter-to-fused adapter out --base base"
    if target == "qkv":
        convert("adapter-to-fused adapter fused --base base")
        command = "adapter-to-split fused out --base base"
    assemble = fused_adapters.assemble

    def forgetful(adapter, weights, factors, model):
        others = {name: part for name, part in factors.items() if ".layers.2." not in name}
        return assemble(adapter, weights, others, model)

    monkeypatch.setattr(fused_adapters, "assemble", forgetful)
    assert "its outputs differ from the source's by" in refused(command)
