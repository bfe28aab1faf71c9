"""Checks PEFT's methods on q and v (train, save, load, merge, `to_sam`); prints the tables of docs/peft-methods.md.

python -m benchmarks.peft_family
"""

import argparse
import contextlib
import io
import logging
import tempfile
import warnings
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, SamConfig, SamModel
from transformers.utils.logging import disable_progress_bar

from checkpoint_tools.checkout import split_class
from checkpoint_tools.loading import let_gradients_through_4bit
from checkpoint_tools.output_comparison import example_outputs, largest_relative_error


Q_AND_V = {"target_modules": ["q", "v"], "task_type": "FEATURE_EXTRACTION"}
LAYER_NORMS = {**Q_AND_V, "target_modules": r"vision_encoder\.layers\.\d+\.layer_norm[12]"}
STEPS = 4
EQUAL = 1e-5  # of the largest output; training changes the outputs much more


@dataclass
class Method:
    """A method of PEFT: the configuration's class and arguments, and what a user has to do besides."""

    config: str
    arguments: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    four_bits: bool = False


METHODS = {
    "LoRA": Method("LoraConfig", {"r": 4}),
    "rsLoRA": Method("LoraConfig", {"r": 4, "use_rslora": True}),
    "DoRA": Method("LoraConfig", {"r": 4, "use_dora": True}),
    "LoRA, PiSSA init": Method("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "LoRA, OLoRA init": Method("LoraConfig", {"r": 4, "init_lora_weights": "olora"}),
    "LoRA, EVA init": Method(
        "LoraConfig",
        {"r": 4, "init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
        "`initialize_lora_eva_weights(model, batches, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)`",
    ),
    "AdaLoRA": Method(
        "AdaLoraConfig",
        {"init_r": 6, "target_r": 4, "total_step": STEPS, "tinit": 1, "tfinal": 1},
        "`model.base_model.update_and_allocate(step)` after each step of the optimizer",
    ),
    "LoHa": Method("LoHaConfig", {"r": 4}),
    "LoKr": Method("LoKrConfig", {"r": 4}),
    "OFT": Method("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "BOFT": Method("BOFTConfig", {"boft_block_size": 4}),
    "IA³": Method("IA3Config", {"feedforward_modules": []}, "`feedforward_modules=[]`"),
    "VeRA": Method("VeraConfig", {"r": 4}),
    "FourierFT": Method("FourierFTConfig", {"n_frequency": 20}),
    "HRA": Method("HRAConfig", {"r": 4}),
    "LN tuning": Method("LNTuningConfig", LAYER_NORMS, "on `layer_norm1` and `layer_norm2`"),
    "QLoRA": Method(
        "LoraConfig",
        {"r": 4},
        "4-bit bitsandbytes; `dequantize()` before `to_sam()`",
        four_bits=True,
    ),
}

RECIPES: dict[str, dict[str, Any]] = {
    "`q`, `v`": {"target_modules": ["q", "v"]},
    "`q`, `k`, `v`": {"target_modules": ["q", "k", "v"]},
    "`q`, `k`, `v`, `proj`": {"target_modules": ["q", "k", "v", "proj"]},
    "`q`, `v` and the encoder's MLPs": {"target_modules": r"vision_encoder\..*\.(q|v|lin1|lin2)"},
    "all Linears of the encoder": {"target_modules": r"vision_encoder\..*\.(q|k|v|proj|lin1|lin2)"},
    "the decoder's attention": {"target_modules": r"mask_decoder\..*\.(q_proj|k_proj|v_proj|out_proj)"},
    "`q`, `v` and the decoder's attention": {
        "target_modules": r"vision_encoder\..*\.(q|v)|mask_decoder\..*\.(q_proj|k_proj|v_proj|out_proj)"
    },
    "`q`, `v`, and the whole decoder trained": {"target_modules": ["q", "v"], "modules_to_save": ["mask_decoder"]},
    "all Linears of the model": {"target_modules": "all-linear"},
}


@dataclass
class Result:
    """Result of one method: relative differences of the outputs, and an error, if any."""

    trained: bool = False
    effect: float = 0
    reload: float | None = None
    merge: float | None = None
    to_sam: float | None = None
    error: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peft_family",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    torch.set_num_threads(1)  # more only slow such a small model down
    disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as base:
        small_sam().save_pretrained(base)
        results = {name: measure(method, base) for name, method in METHODS.items()}
    print(methods_table(results), recipes_table(), sep="\n\n")
    exact = [result for name, result in results.items() if not result.error and not METHODS[name].four_bits]
    worst = max(value for r in exact for value in (r.reload, r.merge, r.to_sam) if value is not None)
    print(
        f"\nEqual: outputs differ by {worst:.1e} at most, relative to the largest. Training changed them by "
        f"{min(r.effect for r in exact):.1e} at least."
    )


def small_sam() -> SamModel:
    """A stock SAM of noise; its encoder's widths are multiples of 64, which 4 bits on a CPU need."""
    image = {"image_size": 64, "patch_size": 8}
    vision = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "global_attn_indexes": [1]}
    vision |= {"window_size": 3, "mlp_dim": 128, "output_channels": 32, "num_pos_feats": 16}
    model = SamModel(
        SamConfig(
            vision_config={**image, **vision},
            prompt_encoder_config={**image, "hidden_size": 32},
            mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 32},
        )
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def measure(method: Method, base: str) -> Result:
    """Trains, saves, loads, merges and converts a model with an adapter of this kind."""
    result = Result()
    if not hasattr(peft, method.config):
        result.error = f"peft {peft.__version__} has no {method.config}"
        return result
    options = {}
    if method.four_bits:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

    def load() -> PreTrainedModel:
        model = split_class().from_pretrained(base, **options)
        let_gradients_through_4bit(model)
        return model

    torch.manual_seed(0)
    try:
        plain = example_outputs(load())
        adapted = get_peft_model(load(), getattr(peft, method.config)(**{**Q_AND_V, **method.arguments}))
        result.trained = train(adapted)
        expected = example_outputs(adapted)
        result.effect = largest_relative_error(expected, plain)
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            result.reload = largest_relative_error(
                example_outputs(PeftModel.from_pretrained(load(), folder)), expected
            )
        merged = adapted.merge_and_unload()
        result.merge = largest_relative_error(example_outputs(merged), expected)
        stock = merged.dequantize().to_sam() if method.four_bits else merged.to_sam()
        result.to_sam = largest_relative_error(example_outputs(stock), expected)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        result.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return result


def train(adapted: PeftModel) -> bool:
    """Trains a few steps. Returns whether exactly the adapter's weights, on all targeted layers, got gradients."""
    batch = example_batch(adapted.get_base_model())
    if getattr(adapted.peft_config["default"], "init_lora_weights", None) == "eva":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it skips padding
            peft.initialize_lora_eva_weights(
                adapted,
                [batch] * 2,
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=None,
                show_progress_bar=False,
            )
    parameters = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    touched = set()
    adapted.train()
    for step in range(STEPS):
        adapted(**batch).pred_masks.square().mean().backward()
        touched |= {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        if hasattr(adapted.base_model, "update_and_allocate"):
            adapted.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    adapted.eval()
    layers = adapted.get_base_model().vision_encoder.layers
    targets = ("layer_norm1", "layer_norm2") if adapted.peft_type == peft.PeftType.LN_TUNING else ("attn.q", "attn.v")
    places = {f".layers.{index}.{target}." for index in range(len(layers)) for target in targets}
    reached = {place for place in places if any(place in name for name in touched)}
    return touched == parameters.keys() and reached == places and all(any(p in n for p in places) for n in touched)


def example_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two images with two points each."""
    side = model.config.vision_config.image_size
    return {"pixel_values": torch.randn(2, 3, side, side), "input_points": side * torch.rand(2, 2, 1, 2)}


def methods_table(results: dict[str, Result]) -> str:
    lines = ["| method | trains | saved and loaded | merged | `to_sam()` | note |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        cells = [
            "yes" if result.trained else "no",
            equal(result.reload),
            "rounded" if METHODS[name].four_bits else equal(result.merge),
            "rounded" if METHODS[name].four_bits else equal(result.to_sam),
            f"`{result.error}`" if result.error else METHODS[name].note,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def equal(error: float | None) -> str:
    return "" if error is None else "equal" if error <= EQUAL else f"differs by {error:.0e}"


def recipes_table() -> str:
    """Exact counts of LoRA on ViT-B with r=16, on no memory."""
    lines = ["| LoRA, r=16, on | settings of `LoraConfig` | trainable parameters |", "|---|---|---|"]
    for name, settings in RECIPES.items():
        text = ", ".join(f"{key}={value!r}" for key, value in settings.items()).replace("|", r"\|").replace("'", '"')
        lines.append(f"| {name} | `{text}` | {trainable(settings):,} |")
    return "\n".join(lines)


def trainable(settings: dict[str, Any]) -> int:
    with torch.device("meta"):
        model = get_peft_model(split_class()(SamConfig()), peft.LoraConfig(r=16, **settings))
    return model.get_nb_trainable_parameters()[0]


if __name__ == "__main__":
    main()
