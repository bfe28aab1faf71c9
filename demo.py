"""Makes a stock SAM LoRA-ready, fine-tunes it on half of the coins of a photograph, and hands back stock SAM.

python demo.py [--base checkpoints/sam-tiny]
"""

import argparse
from pathlib import Path

from checkpoint_tools.packages import needs


with needs("finetune"):
    import finetune
    from checkpoint_tools.checkout import SAM_TINY
    from checkpoint_tools.conversions import to_split
    from checkpoint_tools.errors import one_line_errors
    from checkpoint_tools.quiet import quiet
    from segmentation.adapted_model import load_base


def main() -> None:
    args = parse_args()
    repo = args.output / "sam-split"
    with quiet(), one_line_errors(ValueError, RuntimeError):
        load_base(args.base)  # before anything is written, what fine-tuning needs is looked for, such as a processor
        error = to_split(args.base, repo, force=True)
    print(f"Wrote a model repo from {args.base} to {repo}.")
    difference = f"differ by {error:.1e} at most, relative to the largest" if error else "are equal"
    print(f"The split model against stock: outputs {difference}.", flush=True)
    options = ["--base", str(repo), "--steps", str(args.steps), "--minutes", str(args.minutes), "--export", "stock"]
    if Path(args.base).resolve() == SAM_TINY:
        options += ["--image-size", "192"]  # finetune.py's default for sam-tiny, which has another name here
    finetune.main([*options, "--output", str(args.output / "finetune"), "--force"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default=str(SAM_TINY), help="folder or Hub id of a stock SAM v1 (checkpoints/sam-tiny)"
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for all results (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (%(default)s)")
    parser.add_argument("--minutes", type=float, default=5, help="time limit of training, in minutes (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
