"""Where checkpoints come from: folders and the Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download


def fetch(checkpoint: str, revision: str | None = None, token: str | None = None) -> Path:
    """Returns `checkpoint` if it is a folder; otherwise downloads the Hub repo and returns its folder.

    Weights (preferably safetensors), JSON, code and card are downloaded.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint).resolve()

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(checkpoint, revision=revision, token=token, allow_patterns=list(patterns)))

    folder = download("*.json", "model*.safetensors", "*.py", "README.md")
    return folder if any(folder.glob("model*.safetensors")) else download("pytorch_model*.bin")
