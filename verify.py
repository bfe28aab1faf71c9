"""Loads a split model in the way that a new user would, and compares weights and outputs with its base.

python verify.py USER/NAME --base facebook/sam-vit-base [--revision COMMIT]
"""

import argparse
import json
import pickle
import sys

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from checkpoint_tools.sources import fetch
from checkpoint_tools.staging import one_line
from checkpoint_tools.verification import verify


def main() -> None:
    args = parse_args()
    try:
        base = fetch(args.base, args.base_revision)
        print(json.dumps(verify(args.repo, base, args.revision), indent=2))
    except (
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
        HTTPError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        sys.exit(f"Verification failed: {one_line(error)}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="folder or Hub id of a split model")
    parser.add_argument("--revision", help="its branch, tag or commit")
    parser.add_argument("--base", required=True, help="folder or Hub id of the SAM it was made from")
    parser.add_argument("--base-revision", help="its branch, tag or commit")
    return parser.parse_args()


if __name__ == "__main__":
    main()
