"""Adapters that cannot be converted or merged are refused, with the reason."""

import re
import sys

import pytest
import torch
from adapter_files import lora, rewrite, write
from conftest import ROOT, stock_model

import app
import convert
import evaluate
import finetune
import segment
from checkpoint_tools.adapter_conversions import adapter_to_fused, adapter_to_split


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "initialised with 'pissa'"),
        ({"init_lora_weights": "olora"}, "initialised with 'olora'"),
        ({"modules_to_save": ["k"]}, "contains whole projections"),
        ({"target_modules": ["lin1"]}, "got one of no projection"),
    ],
    ids=str,
)
def test_what_has_no_exact_form_is_refused(settings, problem, load, stock_dir, tmp_path):
    write(load(), lora(**{"target_modules": ["q", "v"], **settings}), tmp_path / "adapter")
    with pytest.raises(ValueError, match=problem):
        adapter_to_fused(str(tmp_path / "adapter"), tmp_path / "out", str(stock_dir))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"config": {"peft_type": "LOHA"}}, "is a LOHA adapter"),
        ({"config": {"lora_bias": True}}, "sets lora_bias=True"),
        ({"config": {"setting_of_the_future": 1}}, "sets setting_of_the_future=1"),
        ({"config": {"base_model_name_or_path": None}}, "give it with --base"),
        ({"config": {"target_modules": ["q"]}}, r"no module for .*layers\.0\.attn\.v"),
        (
            {"config": {"target_modules": ["q", "k", "v"]}},
            r"lacks .*layers\.0\.attn\.k",
        ),
        ({"rename": ("2.attn.v", "2.attn.qkv")}, "got one of q, qkv, v"),
        ({"rename": ("layers.2", "layers.7")}, r"lacks .*encoder\.layers\.2"),
    ],
    ids=str,
)
def test_broken_adapters_are_refused(change, problem, load, tmp_path, recwarn):
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", **change)
    with pytest.raises(ValueError, match=problem):
        adapter_to_fused(str(tmp_path / "adapter"), tmp_path / "out")


def test_the_wrong_direction_is_refused(load, stock_dir, tmp_path):
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "split")
    with pytest.raises(ValueError, match="Expected an adapter of qkv, got one of q, v"):
        adapter_to_split(str(tmp_path / "split"), tmp_path / "out", str(stock_dir))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "adapter_config.json holds [], expected the settings of an adapter by name"),
        ("{", "adapter_config.json is not JSON"),
    ],
)
def test_a_broken_configuration(content, message, load, tmp_path, refused):
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    assert message in refused("adapter-to-fused adapter out --base base")


@pytest.mark.parametrize("change", [{"lora_alpha": 0}, {"alpha_pattern": {"v": 0}}])
def test_an_alpha_of_zero(change, load, stock_dir, tmp_path, refused):
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", change)
    assert "lora_alpha is 0, with which LoRA does nothing" in refused(
        f"adapter-to-fused adapter out --base {stock_dir}"
    )


def test_another_width_is_said_in_short(load, tmp_path, refused):
    """PEFT would list each weight."""
    write(load(), lora(target_modules=["q", "v"], modules_to_save=["neck"]), tmp_path / "adapter")
    stock_model(hidden_size=14, num_attention_heads=1).save_pretrained(tmp_path / "base")
    message = refused("adapter-to-fused adapter out --base base")
    assert re.search(r"does not fit base: vision_encoder\.\S+ has \(14,.*\) channels there, and \(28,", message), (
        message
    )
    assert len(message) < 300
    stock_model(output_channels=8).save_pretrained(tmp_path / "other")
    assert "channels there" in (message := refused("adapter-to-fused adapter out --base other"))
    assert len(message) < 300


def test_weights_that_are_not_numbers(load, stock_dir, tmp_path, refused):
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", value=lambda tensor: tensor * torch.nan)
    assert "adapter holds NaN or infinity in" in refused(f"adapter-to-fused adapter out --base {stock_dir}")


MERGED = {
    "a rank that is a word": ({"r": "a"}, "wrong value (TypeError"),
    "targets that are a number": ({"target_modules": 3}, "wrong value (TypeError"),
    "patterns that are a list": ({"rank_pattern": [1]}, "wrong value (AttributeError"),
}


@pytest.mark.parametrize("case", MERGED)
def test_a_malformed_adapter_is_not_merged(case, load, split_dir, tmp_path, refused):
    change, message = MERGED[case]
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", change)
    assert message in refused(f"to-sam {split_dir} out --adapter adapter")


def test_an_adapter_without_numbers_is_not_merged(load, split_dir, tmp_path, refused):
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", value=lambda tensor: tensor * torch.nan)
    assert "adapter holds NaN or infinity in" in refused(f"to-sam {split_dir} out --adapter adapter")


def test_a_folder_without_its_weights_is_not_looked_for_on_the_hub(load, split_dir, tmp_path, refused):
    adapted = write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    adapted.add_adapter("other", lora(target_modules=["k"]))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert "adapter has no adapter_model.safetensors" in refused(f"to-sam {split_dir} out --adapter adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    for command in (f"to-sam {split_dir} out --adapter adapter", f"adapter-to-fused adapter out --base {split_dir}"):
        assert (
            "adapter has no adapter_config.json, as PEFT saves it with an adapter: choose one of those in other"
            in (refused(command))
        )


def test_no_such_base(load, tmp_path, refused):
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    message = refused("adapter-to-fused adapter out --base ./no/such/folder")
    assert "./no/such/folder: there is no such folder, and it is no Hub id, which is USER/NAME" in message


def test_an_adapter_in_the_place_of_a_model_is_refused(load, tmp_path, monkeypatch, capsys):
    """transformers loads it onto the base that it names, at the base's side and without the adapter's settings."""
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    adapter, photo = str(tmp_path / "adapter"), str(ROOT / "docs" / "images" / "coins.png")
    monkeypatch.chdir(tmp_path)
    for command, *arguments in (
        (segment, photo, "--point", "9", "9", "--base", adapter),
        (evaluate, "--model", adapter),
        (finetune, "--base", adapter),
        (app, "--base", adapter),
        (convert, "to-sam", adapter, "out"),
        (convert, "to-onnx", adapter, "out"),
    ):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as end:
            command.main()
        assert f"{adapter} is an adapter: expected a whole model. Give the adapter as --adapter" in str(end.value.code)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
