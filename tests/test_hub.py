"""From end to end: `upload.py` pushes to a Hub on this machine, and others load from it with empty caches."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CODE_FILES, MODEL_REPO_FILES
from hub import Server, serve

from checkpoint_tools.checkout import ROOT, SAM_TINY


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


def run(server: Server, cache: Path, *command: str, token: str = "") -> str:
    """Runs a command as a user would who has only set the endpoint, and perhaps a token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    if token:
        environment["HF_TOKEN"] = token
    process = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


@pytest.fixture(scope="module")
def pushed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What upload.py printed, and the commit that it made."""
    cache = tmp_path_factory.mktemp("uploader")
    command = [str(ROOT / "upload.py"), "--base", str(SAM_TINY), "--repo-id", "user/sam-tiny-split", "--private"]
    output = run(server, cache, *command, token="hf_writer")
    return output, server.hub.repos["user/sam-tiny-split"].refs["main"]


@pytest.mark.slow
def test_upload(server: Server, pushed: tuple[str, str]) -> None:
    output, commit = pushed
    repo = server.hub.repos["user/sam-tiny-split"]
    assert repo.private
    assert repo.files().keys() == MODEL_REPO_FILES | {".gitattributes"}
    assert len(repo.commits) == 2, "that of create_repo and one more"
    assert f"{server.url}/user/sam-tiny-split\n" in output
    assert f'from_pretrained("user/sam-tiny-split", revision="{commit}", trust_remote_code=True)' in output
    assert "hf_writer" not in output
    assert f"GET /user/sam-tiny-split/resolve/{commit}/model.safetensors" in server.hub.requests, "loaded back"


@pytest.mark.slow
def test_others_load_it(server: Server, pushed: tuple[str, str], tmp_path: Path) -> None:
    """In one process, with a token that may see the private repo; and adapters and merged models the same way."""
    _, commit = pushed
    code = f"""
        import os
        import pytest, torch
        from PIL import Image
        from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModel, AutoProcessor, SamModel, pipeline

        repo, options = "user/sam-tiny-split", dict(revision="{commit}", trust_remote_code=True)
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModel.from_pretrained(repo, revision="{commit}", trust_remote_code=False)
        with pytest.raises(OSError, match="user/sam-tiny-split"):
            AutoModel.from_pretrained(repo, token=False, **options)
        assert not os.path.exists(os.path.join(os.environ["HF_HOME"], "modules", "transformers_modules", "user"))

        model = AutoModel.from_pretrained(repo, **options)
        processor = AutoProcessor.from_pretrained(repo, revision="{commit}")
        image = Image.effect_noise((90, 70), 80).convert("RGB")
        inputs = processor(image, input_points=[[[[40, 30]]]], return_tensors="pt")
        stock = SamModel.from_pretrained({str(SAM_TINY)!r})
        with torch.no_grad():
            expected = stock(**inputs).pred_masks
            torch.testing.assert_close(model(**inputs).pred_masks, expected)

        # up to the removal of duplicate masks, which is torchvision's
        generator = pipeline("mask-generation", model=repo, **options)
        limits = dict(pred_iou_thresh=-100.0, stability_score_thresh=0.0, stability_score_offset=0.1)
        batch = next(iter(generator.preprocess(image, points_per_batch=8)))
        assert len(generator.forward(batch, **limits)["masks"])

        config = LoraConfig(target_modules=["q", "v"], task_type="FEATURE_EXTRACTION", init_lora_weights=False)
        adapted = get_peft_model(model, config).eval()
        with torch.no_grad():
            expected = adapted(**inputs).pred_masks
            assert not torch.allclose(expected, stock(**inputs).pred_masks)
        adapted.push_to_hub("user/adapter")
        adapted.merge_and_unload().push_to_hub("user/merged")
        for loaded in (
            PeftModel.from_pretrained(AutoModel.from_pretrained(repo, **options), "user/adapter"),
            AutoPeftModelForFeatureExtraction.from_pretrained("user/adapter", trust_remote_code=True),
            AutoModel.from_pretrained("user/merged", trust_remote_code=True),
        ):
            with torch.no_grad():
                torch.testing.assert_close(loaded.eval()(**inputs).pred_masks, expected, rtol=1e-4, atol=1e-4)
    """
    run(server, tmp_path, "-c", textwrap.dedent(code), token="hf_writer")
    adapter, merged = (server.hub.repos[f"user/{name}"].files() for name in ("adapter", "merged"))
    assert b'"base_model_name_or_path": "user/sam-tiny-split"' in adapter["adapter_config.json"]
    assert merged.keys() >= CODE_FILES
