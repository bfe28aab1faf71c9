"""Makes a stock SAM LoRA-ready, fine-tunes it on half of the coins of a photograph, and hands back stock SAM.

python demo.py [--base checkpoints/sam-tiny]
"""

import argparse
import sys
from pathlib import Path

import huggingface_hub
from safetensors import SafetensorError

import finetune
from checkpoint_tools.conversions import to_split
from checkpoint_tools.staging import SAM_TINY, one_line


def main() -> None:
    args = parse_args()
    huggingface_hub.logging.set_verbosity_error()  # else it logs every retry without a network
    repo = args.output / "sam-split"
    try:
        error = to_split(args.base, repo, force=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        sys.exit(f"{args.base}: expected a stock SAM v1 checkpoint: {one_line(problem)}")
    print(f"Wrote a model repo from {args.base} to {repo}.")
    print(
        f"The split model against stock: outputs differ by {error:.1e} at most, relative to the largest.", flush=True
    )
    options = ["--base", str(repo), "--steps", str(args.steps), "--minutes", str(args.minutes)]
    finetune.main([*options, "--output", str(args.output / "finetune"), "--force", "--export", "stock"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(SAM_TINY), help="folder or Hub id of a SAM v1")
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=5, help="stop training then, whatever the step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
