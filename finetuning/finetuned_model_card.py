"""The model card of what was trained: its base and licence, data, settings and metrics, and how it is loaded."""

from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from checkpoint_tools.base_provenance import Base
from checkpoint_tools.config_files import read_json
from checkpoint_tools.licences import UNKNOWN

from .recipe_settings import ModelSettings


Kind = Literal["adapter", "split model", "stock model"]
TITLES: dict[Kind, str] = {
    "adapter": "Adapter for the split SAM of",
    "split model": "Split SAM, from",
    "stock model": "Stock SAM, from",
}
TAGS: dict[Kind, list[str]] = {"adapter": ["lora"], "split model": ["custom_code"], "stock model": []}
NOT_METRICS = ("loss", "objects")
LOAD_ADAPTER = """
from peft import AutoPeftModelForFeatureExtraction
from transformers import AutoProcessor

adapter = "{place}"
model = AutoPeftModelForFeatureExtraction.from_pretrained(adapter, trust_remote_code=True{options}).eval()
processor = AutoProcessor.from_pretrained(adapter)
"""
LOAD_ADAPTER_ON_STOCK = """
from peft import PeftConfig, PeftModel
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

adapter = "{place}"
names = PeftConfig.from_pretrained(adapter)  # of the base, a stock SAM, and its commit
SamSplitModel = get_class_from_dynamic_module("modeling_sam_split.SamSplitModel", adapter)  # runs the code there
base = SamSplitModel.from_pretrained(names.base_model_name_or_path, revision=names.revision{options})
model = PeftModel.from_pretrained(base, adapter).eval()
processor = AutoProcessor.from_pretrained(adapter)
"""
LOAD_SPLIT = """
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{place}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{place}")
"""
LOAD_STOCK = """
from transformers import SamModel, SamProcessor

model = SamModel.from_pretrained("{place}")
processor = SamProcessor.from_pretrained("{place}")
"""


def is_stock(base: Base) -> bool:
    """Whether a model that was made of this base needs code which the base does not bring."""
    return read_json(base.folder / "config.json").get("model_type") == "sam"


def card(settings: ModelSettings, base: Base, metrics: dict[str, Any], kind: Kind, repo_id: str | None) -> ModelCard:
    """Returns the card of a trained adapter or model, that is to be in `repo_id`, or is in a folder."""
    revision = None if settings.base_model else settings.revision
    lines = [
        f"---\n{card_data(base, metrics, kind).to_yaml()}\n---",
        f"# {base.title}, fine-tuned",
        f"{TITLES[kind]} `{base.title}`{f', revision `{revision}`' if revision else ''}. "
        f"Data: {metrics['data']}, {metrics['objects']['train']} training objects, "
        f"{metrics['objects']['validation']} validation objects.",
        "## How to load it",
        *how_to_load(settings, base, kind, repo_id),
        "## Results",
        f"Best of {metrics['steps']} steps, prompts: {metrics['prompts']}. On the validation objects, at the "
        "resolution of the model's masks:",
        *([] if metrics["better_than_base"] else [f"**Do not use it:** {worse_than_base(metrics)}"]),
        "\n".join(["| | before | after |", "|---|---|---|", *metric_rows(metrics)]),
        "## Licence",
        licence_text(base),
    ]
    return ModelCard("\n\n".join(lines) + "\n")


def card_data(base: Base, metrics: dict[str, Any], kind: Kind) -> ModelCardData:
    """Returns what the Hub reads."""
    results = [
        EvalResult(
            task_type="mask-generation",
            dataset_type="custom",
            dataset_name=metrics["data"],
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in metrics["after"].items()
        if name not in NOT_METRICS
    ]
    return ModelCardData(
        license=base.licence.id or UNKNOWN,  # type: ignore[arg-type]  # the Hub takes lists as well
        license_name=base.licence.name,
        license_link=base.licence.link,
        base_model=base.hub_ids,
        base_model_relation=("adapter" if kind == "adapter" else "finetune") if base.hub_ids else None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="mask-generation",
        tags=["segment-anything", "sam", *TAGS[kind]],
        model_name=f"{base.title}, fine-tuned",
        eval_results=results,
    )


def metric_rows(metrics: dict[str, Any]) -> list[str]:
    """Returns a row for each metric, before and after training."""
    return [
        f"| {name.replace('_', ' ')} | {metrics['before'][name]:.3f} | {value:.3f} |"
        for name, value in metrics["after"].items()
        if name not in NOT_METRICS
    ]


def worse_than_base(metrics: dict[str, Any]) -> str:
    """Returns a sentence for trained weights that are no better than the base's."""
    name = metrics["selected_by"]
    return (
        f"no checkpoint is better than the base by {name.replace('_', ' ')}: {metrics['before'][name]:.3f} before, "
        f"{metrics['after'][name]:.3f} after. Train with more images, for more steps, or with a lower --learning-rate."
    )


def how_to_load(settings: ModelSettings, base: Base, kind: Kind, repo_id: str | None) -> list[str]:
    """Returns a block of code that loads model and processor, and what to know about it."""
    place, sentences = repo_id or ".", []
    if repo_id is None:
        sentences.append("In this folder, whose path, or Hub id, stands elsewhere for the dot:")
    options = f", image_size={settings.image_size}" if settings.image_size else ""
    code = {"adapter": LOAD_ADAPTER, "split model": LOAD_SPLIT, "stock model": LOAD_STOCK}[kind]
    remarks = [] if kind == "stock model" else ["This runs `*_sam_split.py` files on your machine: read them before."]
    if kind == "adapter" and is_stock(base):
        code = LOAD_ADAPTER_ON_STOCK
        remarks.append(
            "`AutoPeftModel` and `AutoModel` cannot load it: they take the base for what it is, a stock `SamModel`, "
            "whose vision encoder has no `q`, `k` and `v`."
        )
    return [*sentences, f"```python\n{code.format(place=place, options=options).strip()}\n```", *remarks]


def licence_text(base: Base) -> str:
    """Returns what is known of the licence of the base's weights."""
    licence = base.licence
    if licence.id is None:
        return f"The licence of `{base.title}` is unknown, because its card names none. Ask its authors before use."
    return f"That of `{base.title}`: {licence}{f' ({licence.link})' if licence.link else ''}."
