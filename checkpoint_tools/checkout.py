"""This checkout, and its model classes as users of a model repo get them."""

from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent.parent
SAM_TINY = ROOT / "checkpoints" / "sam-tiny"


def split_class(name: str = "SamSplitModel") -> type[PreTrainedModel]:
    """Returns a model class of this checkout, as users of a model repo get it."""
    # The configuration first, as AutoModel does: transformers 5.0 would later import it a second time.
    get_class_from_dynamic_module("configuration_sam_split.SamSplitConfig", str(ROOT))
    return get_class_from_dynamic_module(f"modeling_sam_split.{name}", str(ROOT))
