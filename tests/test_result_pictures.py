"""What a run sends to the trackers that it reports to."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import finetune


pytest.importorskip("tensorboard")


@pytest.mark.slow
def test_pictures_of_masks_go_to_tensorboard(photos, tmp_path):
    """One for each evaluation, in which the true masks stay and the prediction changes; the run is as without."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    size = ["--image-size", "64", "--steps", "2", "--eval-steps", "1", "--learning-rate", "0.01"]
    for name, options in (("plain", []), ("reported", ["--report-to", "tensorboard"])):
        finetune.main([*photos, *size, *options, "--output", str(tmp_path / name)])
    plain, reported = (
        {name: json.loads((tmp_path / run / "metrics.json").read_text())[name] for name in ("before", "after")}
        for run in ("plain", "reported")
    )
    assert reported == plain

    (folder,) = (tmp_path / "reported" / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    pictures = events.Images("eval/masks")
    assert sorted({picture.step for picture in pictures}) == [0, 1, 2]
    before, after = (np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))) for picture in pictures[:3:2])
    assert before.shape == after.shape
    prompts_and_truth, prediction = np.split((before != after).any(-1), [before.shape[1] * 2 // 3], axis=1)
    assert not prompts_and_truth.any() and prediction.any()
    assert not (tmp_path / "plain" / "runs").exists()
