"""The embedded checkpoint is a stock SAM that really segments, split or not."""

from transformers import AutoImageProcessor, AutoModel, SamModel

from checkpoint_tools.checkout import SAM_TINY, split_class
from checkpoint_tools.loading import processor_for
from pretraining.train_sam_tiny import build_config, evaluate


def test_it_is_stock_and_small():
    assert type(SamModel.from_pretrained(SAM_TINY).config).model_type == "sam"
    assert sum(file.stat().st_size for file in SAM_TINY.iterdir()) < 6e6


def test_segments_held_out_scenes_when_split(tmp_path):
    """The card has the scores of 400 scenes."""
    split_class().from_pretrained(SAM_TINY).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    scores = evaluate(model, processor_for(build_config()), difficulty=0.5, num_scenes=40)
    assert scores["point, single mask"] > 0.7
    assert scores["box, single mask"] > 0.8


def test_processor_fits_the_model():
    size = SamModel.from_pretrained(SAM_TINY).config.vision_config.image_size
    processor = AutoImageProcessor.from_pretrained(SAM_TINY)
    assert processor.pad_size["height"] == processor.pad_size["width"] == size
