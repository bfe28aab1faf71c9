"""The staged folder equals the base; anything else is not pushed; errors say what to do."""

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FIGURES, MODEL_REPO_FILES, Malicious, configure, rewrite, stock_model
from hub import Fault, File, Hub
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, SamVisionModel

from checkpoint_tools import model_repo
from checkpoint_tools.checkout import ROOT
from checkpoint_tools.output_folders import MARKER


# huggingface_hub's own way of sending files
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


# --- nothing that is not verified


@pytest.mark.slow
def test_failed_verification_pushes_nothing(
    hub: Hub, run_upload, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*args) -> None:
        stage(*args)
        rewrite(args[1], lambda weights: weights["vision_encoder.layers.0.attn.q.weight"].add_(0.1))

    stage = model_repo.stage
    monkeypatch.setattr(model_repo, "stage", spoilt)
    options = ("--base", base_dir, "--repo-id", "user/sam", "--license", "mit")
    message = run_upload(*options, "--output", tmp_path / "sam", fails=True)
    assert "Verification failed" in message
    assert "outputs differ from stock" in message
    assert not (tmp_path / "sam").exists()
    assert not hub.repos


# --- what is no base


POSITIONS = "shared_image_embedding.positional_embedding"


def with_pickle(content: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return change


def replaced_by(model) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        model().save_pretrained(folder)

    return change


def tiny_bert() -> BertModel:
    return BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (replaced_by(tiny_bert), "expected SAM v1 .*, got 'bert'"),
        (
            replaced_by(lambda: SamVisionModel(stock_model().config.vision_config)),
            "expected SAM v1 .*, got 'sam_vision_model'",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no config.json: .* An adapter must be merged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: configure(folder, "quantization_config", {"quant_method": "bitsandbytes"}), "quantized"),
        (lambda folder: (folder / "processor_config.json").unlink(), "no processor"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{"), "header too small"),
        (
            lambda folder: rewrite(folder, lambda weights: weights.pop("mask_decoder.iou_token.weight")),
            "missing: .*iou_token",
        ),
        (
            lambda folder: rewrite(folder, lambda weights: weights.update(head=torch.zeros(1))),
            "unexpected_keys: .*head",
        ),
        (
            lambda folder: rewrite(folder, lambda weights: weights.update({POSITIONS: torch.zeros(2, 3)})),
            f"mismatched_keys: .*{POSITIONS}",
        ),
        (with_pickle(Malicious()), "is damaged, or holds objects, which are code"),
    ],
)
def test_not_a_base(spoil, problem: str, base_dir: Path, run_upload, verified: list, tmp_path: Path) -> None:
    folder = shutil.copytree(base_dir, tmp_path / "made" / "sam")
    spoil(folder)
    message = run_upload("--base", folder, "--output", tmp_path / "output" / "sam", fails=True)
    assert re.search(problem, message), message
    assert not verified
    assert not list((tmp_path / "output").glob("*"))


def test_staging_alone(
    base_dir: Path, run_upload, verified: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = run_upload("--base", base_dir, "--output", "new/sam")
    assert {path.name for path in (tmp_path / "new" / "sam").iterdir()} == {*MODEL_REPO_FILES, MARKER}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sam"]
    assert "config.json" in output
    assert "not empty" in run_upload("--base", base_dir, "--output", "new/sam", fails=True)
    run_upload("--base", base_dir, "--output", "new/sam", "--force")
    shutil.copytree(base_dir, tmp_path / "holds" / "base")
    assert "same or lie in one another" in run_upload(
        "--base", "holds/base", "--output", "holds", "--force", fails=True
    )
    assert (tmp_path / "holds" / "base" / "model.safetensors").exists()
    texts = [path.read_text() for path in (tmp_path / "new" / "sam").iterdir() if path.suffix in (".json", ".md")]
    assert not any(str(place) in text for place in (tmp_path, base_dir.parent, ROOT) for text in texts)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_no_space(error, base_dir: Path, run_upload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args) -> None:
        raise error

    monkeypatch.setattr(model_repo, "stage", full)
    assert "No space left on the disk: choose another" in run_upload(
        "--base", base_dir, "--output", tmp_path / "sam", fails=True
    )
    assert not list(tmp_path.iterdir())


# --- pushing


@pytest.mark.slow
def test_push_again(hub: Hub, push, verified: list, split_dir: Path) -> None:
    push()
    repo = hub.repos["user/sam"]
    commit = repo.refs["main"]
    assert repo.files()["model.safetensors"] == (split_dir / "model.safetensors").read_bytes()
    assert verified[-1][2] == commit, "loaded back"

    assert "No changes: user/sam is up to date" in push()
    assert repo.refs["main"] == commit

    repo.commit("main", {**repo.commits[commit], "notes.txt": File(b"mine", lfs=False)})
    assert "No changes" not in push("--max-shard-size", "20KB", "--commit-message", "Shards")
    files = repo.files()
    assert "model.safetensors" not in files, "it would be loaded in place of the shards"
    assert "notes.txt" in files
    assert "model.safetensors.index.json" in files


def test_an_unknown_licence_is_not_pushed(
    hub: Hub, run_upload, base_dir: Path, verified: list, tmp_path: Path
) -> None:
    arguments = ("--base", base_dir, "--repo-id", "user/sam")
    assert "its licence is unknown, because its card names none: give the one" in run_upload(*arguments, fails=True)
    assert not verified and not hub.repos
    output = run_upload("--base", base_dir, "--output", tmp_path / "sam")
    assert "Note: it is not ready for a push: its licence is unknown" in output


def test_licences_are_those_of_the_base(hub: Hub, run_upload, base_dir: Path, verified: list, tmp_path: Path) -> None:
    """With the file and the link; and what a folder was made from may be said."""
    folder = shutil.copytree(base_dir, tmp_path / "base")
    (folder / "LICENSE").write_text("mine")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\nbase_model: /home/me/sam\n---\n")
    arguments = ("--base", folder, "--repo-id", "user/sam", "--base-model", "facebook/sam-vit-base")
    assert "its licence is 'other': give --license-name" in run_upload(*arguments, fails=True)
    assert "--license mit: the base's card says other" in run_upload(*arguments, "--license", "mit", fails=True)
    run_upload(*arguments, "--license-name", "mine")
    files = hub.repos["user/sam"].files()
    assert files["LICENSE"] == b"mine"
    assert files["LICENSE-code"] == (ROOT / "LICENSE").read_bytes()
    data = ModelCard(files["README.md"].decode()).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "LICENSE")
    assert data.base_model == ["facebook/sam-vit-base"]
    assert b"/home/me" not in files["README.md"]


def test_dry_run(hub: Hub, push, verified: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    output = push("--dry-run")
    assert all(re.search(rf" [\d,]+  {re.escape(name)}\n", output) for name in MODEL_REPO_FILES)
    assert not hub.requests


@pytest.mark.slow
def test_branch_and_pull_request(hub: Hub, push, verified: list, monkeypatch: pytest.MonkeyPatch) -> None:
    push("--revision", "next")
    repo = hub.repos["user/sam"]
    assert repo.files("next").keys() == MODEL_REPO_FILES | {".gitattributes"}
    assert repo.files().keys() == {".gitattributes"}
    push("--revision", "next")
    assert len(repo.commits) == 2

    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "/user/sam/discussions/1" in push("--create-pr")
    assert repo.files("refs/pr/1").keys() == MODEL_REPO_FILES | {".gitattributes"}
    assert verified[-1][2] == repo.refs["refs/pr/1"]


def test_token_file(hub: Hub, push, verified: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_writer\n")
    push("--private", "--token-file", tmp_path / "token")
    assert hub.repos["user/sam"].private
    (tmp_path / "token").write_text("hf_secret and more\n")
    assert "does not contain a token" in push("--token-file", tmp_path / "token", fails=True)
    assert "No such file" in push("--token-file", tmp_path / "nothing", fails=True)


def test_somebody_pushes_meanwhile(hub: Hub, push, monkeypatch: pytest.MonkeyPatch, split_dir: Path) -> None:
    repo = hub.add("user/sam", split_dir)

    def meanwhile(*args) -> dict:
        repo.commit("main", {"theirs.txt": File(b"theirs", lfs=False)})
        return FIGURES

    monkeypatch.setattr(model_repo, "run_verify", meanwhile)
    assert "Someone else pushed to user/sam in the meantime" in push("--max-shard-size", "20KB", fails=True)
    assert repo.files() == {"theirs.txt": b"theirs"}


@pytest.mark.parametrize(
    ("token", "repo_id", "problem"),
    [
        (None, "user/sam", "A push needs a token"),
        ("hf_unknown", "user/sam", "rejected the token"),
        ("hf_reader", "user/new", "may not write to user/new"),
        ("hf_reader", "user/sam", "may not write to user/sam"),
        ("hf_writer", "user/data", "user/data is taken by a dataset"),
        ("hf_writer", "user/adapter", "user/adapter contains an adapter"),
    ],
)
def test_refused(
    token, repo_id: str, problem: str, hub: Hub, run_upload, base_dir, verified, monkeypatch, tmp_path
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text("{}")
    for name in ("user/sam", "user/adapter"):
        hub.add(name, tmp_path / "theirs" if name == "user/adapter" else base_dir)
    hub.other_types.add("user/data")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    assert re.search(problem, run_upload("--base", base_dir, "--repo-id", repo_id, "--license", "mit", fails=True))
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())
    assert not hub.lfs


def test_public_repo_is_no_private_one(hub: Hub, push, base_dir: Path) -> None:
    hub.add("user/sam", base_dir)
    assert "user/sam exists and is public" in push("--private", fails=True)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nobody/nothing", "not a folder, and the Hub has no such model"),
        ("user/gated", "user/gated is gated: accept its terms"),
        ("a/b/c", "no such folder, and it is no Hub id, which is USER/NAME"),
    ],
)
def test_no_such_base(name: str, problem: str, hub: Hub, run_upload, base_dir: Path, tmp_path: Path) -> None:
    hub.add("user/gated", base_dir, gated=True)
    assert problem in run_upload("--base", name, "--output", tmp_path / "sam", fails=True)


def test_pickled_private_base_on_the_hub(
    hub: Hub, run_upload, base_dir: Path, verified: list, tmp_path: Path, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_writer")
    folder = shutil.copytree(base_dir, tmp_path / "made")
    with_pickle(load_file(folder / "model.safetensors"))(folder)
    hub.add("user/pickled", folder, private=True)
    assert "a token is needed" in run_upload("--base", "user/pickled", "--output", tmp_path / "sam", fails=True)
    run_upload("--base", "user/pickled", "--output", tmp_path / "sam", "--token-file", tmp_path / "token")
    assert {path.name for path in (tmp_path / "sam").iterdir()} == {*MODEL_REPO_FILES, MARKER}


def test_no_such_base_revision(hub: Hub, run_upload, base_dir: Path, tmp_path: Path) -> None:
    hub.add("user/sam", base_dir)
    message = run_upload("--base", "user/sam", "--base-revision", "old", "--output", tmp_path / "sam", fails=True)
    assert "user/sam has no revision old" in message


def test_no_hub(run_upload, tmp_path: Path) -> None:
    """Offline, as all tests are."""
    assert "try checkpoints/sam-tiny" in run_upload("--output", tmp_path / "sam", fails=True)


# --- faults on the way


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited before each of its retries."""
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    return waits


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/preupload/", 500),
        Fault("POST", "/preupload/", 429, {"Retry-After": "20"}),
        Fault("POST", "/objects/batch", 503, times=2),
        Fault("PUT", "/lfs/", 500),
        Fault("PUT", "/lfs/", None, times=2),
    ],
    ids=str,
)
def test_passing_fault(fault: Fault, hub: Hub, push, verified: list, no_waiting: list[float]) -> None:
    hub.faults.append(fault)
    push()
    assert hub.repos["user/sam"].files().keys() == MODEL_REPO_FILES | {".gitattributes"}
    assert not hub.faults
    assert no_waiting[0] >= (20 if fault.headers else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault("GET", "/whoami-v2", None), "connection to the Hub was lost"),
        (Fault("POST", "/repos/create", 429, {"Retry-After": "20"}), "rate limit is reached"),
        (Fault("POST", "/repos/create", 500), "connection to the Hub was lost"),
        (Fault("POST", "/objects/batch", 403), "may not write"),
        (Fault("POST", "/preupload/", 429, times=-1), "rate limit is reached"),
        (Fault("PUT", "/lfs/", None, times=-1), "connection to the Hub was lost: run the command again"),
        (Fault("PUT", "/lfs/", 403), "may not write"),
        (Fault("POST", "/commit/", None), "connection to the Hub was lost: run the command again"),
        (Fault("POST", "/commit/", 409), "user/sam is taken"),
        (Fault("POST", "/commit/", 418), "The Hub refused"),
    ],
    ids=str,
)
def test_lasting_fault(fault: Fault, problem: str, hub: Hub, push, verified: list, no_waiting: list[float]) -> None:
    """It ends with one line, nothing is half there, and the next run does the rest."""
    hub.faults.append(fault)
    assert problem in push(fails=True)
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())
    sent = set(hub.lfs)
    hub.faults.clear()
    hub.requests.clear()
    push()
    assert hub.repos["user/sam"].files().keys() == MODEL_REPO_FILES | {".gitattributes"}
    assert not any(request == f"PUT /lfs/{oid}" for oid in sent for request in hub.requests)
