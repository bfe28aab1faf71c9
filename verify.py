"""Loads a split model in the way that a new user would, and compares weights and outputs with its base.

python verify.py USER/NAME --base facebook/sam-vit-base [--revision COMMIT]
"""

import argparse
import json

from checkpoint_tools.packages import needs


with needs("tools"):
    from checkpoint_tools.errors import one_line_errors
    from checkpoint_tools.fetching import fetch
    from checkpoint_tools.quiet import quiet
    from checkpoint_tools.verification import verify


def main() -> None:
    args = parse_args()
    with quiet(), one_line_errors(ValueError, RuntimeError, prefix="Verification failed: "):
        base = fetch(args.base, args.base_revision)
        print(json.dumps(verify(args.repo, base, args.revision), indent=2))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="folder or Hub id of a split model")
    parser.add_argument("--revision", help="branch, tag or commit of the split model on the Hub")
    parser.add_argument("--base", required=True, help="folder or Hub id of the SAM that it was made from")
    parser.add_argument("--base-revision", help="branch, tag or commit of the base on the Hub")
    return parser.parse_args()


if __name__ == "__main__":
    main()
