"""Makes a stock SAM LoRA-ready, fine-tunes it on half of the coins of a photograph, and hands back stock SAM.

python demo.py [--base checkpoints/sam-tiny]
"""

import argparse
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import hf_hub_download
from skimage import data
from transformers import AutoModel, AutoProcessor, PreTrainedModel, SamModel, SamProcessor

from staging import ROOT, split_class, staged


def main() -> None:
    args = parse_args()
    huggingface_hub.logging.set_verbosity_error()  # else every retry without a network is told
    stock = load_stock(args.base)
    processor = AutoProcessor.from_pretrained(args.base)
    repo = args.output / "sam-split"
    with staged(repo, force=True) as folder:
        split_class().from_pretrained(args.base).save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"Laid out a model repo from {args.base} in {repo}.")
    model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    error = difference(model, stock, processor)
    print(f"The split model against stock: mask logits differ by {error:.1e} at most.", flush=True)

    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--base", str(repo), "--export", "stock"]
    command += ["--output", str(args.output / "finetune"), "--force"]
    command += ["--steps", str(args.steps), "--minutes", str(args.minutes)]
    sys.exit(subprocess.run(command, check=False).returncode)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(ROOT / "checkpoints" / "sam-tiny"), help="folder or Hub id of a SAM v1")
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=5, help="stop training then, whatever the step")
    return parser.parse_args()


def load_stock(base: str) -> SamModel:
    try:
        if not Path(base).is_dir():
            hf_hub_download(base, "config.json")
        model, loading_info = SamModel.from_pretrained(base, output_loading_info=True)
    except (OSError, ValueError) as error:
        sys.exit(f"{base} is not a folder with a SAM checkpoint, and the Hub gives none: {str(error).splitlines()[0]}")
    if missing := sorted(loading_info["missing_keys"]):
        sys.exit(f"{base} is not a stock SAM v1 checkpoint, as the demo needs it: it has no {missing[0]}.")
    return model.eval()


@torch.no_grad()
def difference(first: PreTrainedModel, second: PreTrainedModel, processor: SamProcessor) -> float:
    """The largest difference of the mask logits for a point in the middle of the photograph."""
    image = torch.from_numpy(data.coins()).repeat(3, 1, 1)
    points = [[[[image.shape[2] / 2, image.shape[1] / 2]]]]
    inputs = processor(images=[image], input_points=points, return_tensors="pt")
    inputs = {name: inputs[name].float() for name in ("pixel_values", "input_points")}
    return (first(**inputs).pred_masks - second(**inputs).pred_masks).abs().max().item()


if __name__ == "__main__":
    main()
