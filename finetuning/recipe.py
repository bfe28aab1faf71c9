"""The fine-tuning recipe: trains an adapter or a model from settings, evaluates it, and resumes interrupted runs."""

import hashlib
import json
import sys
import time
from pathlib import Path

import huggingface_hub
import psutil
import torch
from peft import PeftModel
from transformers import set_seed

from checkpoint_tools.outputs import staged

from .coco import coco_images
from .folders import paired_files
from .model import four_bits, load_base, make_trainable
from .options import write_file
from .results import write_results
from .samples import TrainValidationParts, train_validation_parts
from .settings import DataSettings, Settings, SettingsError
from .sources import Coins
from .training import build_trainer, metrics_of


# Settings that may change on resume, because they do not affect the result.
NOT_PART_OF_THE_RUN = {
    *("resume", "force", "export", "output_dir", "minutes", "dataloader_num_workers", "report_to", "run_name"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision"),
}
NOT_REPEATED = {"resume", "force", "hub_token"}  # in run.yaml


def finetune(settings: Settings) -> None:
    """Trains what the settings ask for, and writes all results into the output folder.

    Raises:
        DataError: If something is wrong with the files; nothing is written then.
        ModelError: If something is wrong with the base model.
        SettingsError: If the settings do not fit the machine, or the run to be resumed.
        FileExistsError: If the output folder is in use.
    """
    training, folder = settings.training, settings.folder
    is_main = training.process_index == 0
    say = print if is_main else lambda *_: None
    huggingface_hub.logging.set_verbosity_error()  # otherwise it logs every retry when offline
    if training.hub_model_id:
        require_login(training.hub_token)

    set_seed(training.seed)
    quantization = four_bits(training.bf16) if settings.model.load_in_4bit else None
    model, processor = load_base(settings.model.base, settings.model.revision, quantization, settings.model.image_size)
    mask_side = 4 * model.prompt_encoder.image_embedding_size[0]
    parts, about_data = read_data(settings.data, mask_side, training.seed)
    objects = {name: sum(len(s.ids) for s in getattr(parts, name)) for name in ("train", "validation")}
    say(f"{about_data}: {objects['train']} training objects, {objects['validation']} validation objects.")
    for note in parts.notes:
        say(f"  {note}")
    model = make_trainable(model, settings.model)
    trainable, total = parameter_counts(model)
    say(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
    checkpoint = start(settings, parts, is_main)

    # Do not call `trainer.evaluate()` before `train()`: accelerate would skip wrapping the model in DDP, and ranks
    # would diverge.
    training.eval_on_start = checkpoint is None
    trainer = build_trainer(settings, model, processor, parts, mask_side)
    started, cpu_started, loaded = time.perf_counter(), time.process_time(), peak_memory()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    before = metrics_of(next(entry for entry in trainer.state.log_history if "eval_iou" in entry))
    after = metrics_of(trainer.evaluate())

    weights = folder / ("adapter" if isinstance(model, PeftModel) else "model")
    trainer.save_model(str(weights))  # on all ranks: each may hold a shard
    if not is_main:
        return
    (weights / "training_args.bin").unlink()  # a pickle that only Trainer reads
    metrics = {
        "base": settings.model.base,
        "revision": settings.model.revision,
        "data": about_data,
        "prompts": settings.prompts.prompts,
        "objects": objects,
        "trainable_parameters": trainable,
        "before": before,
        "after": after,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gigabytes": (peak_memory() - loaded) / 1e9,  # relative to memory after loading
        "history": trainer.state.log_history,
    }
    write_results(settings, weights, metrics, trainer.eval_dataset, trainer.prompting)


def require_login(token: str | None) -> None:
    """Checks before training that the Hub accepts the token.

    Raises:
        SettingsError: If not.
    """
    try:
        huggingface_hub.HfApi(token=token).whoami()
    except Exception as error:  # no token, a wrong one, no network
        raise SettingsError(
            f"--push-to-hub: not logged in to the Hub. Run `hf auth login`. ({type(error).__name__})"
        ) from None


def read_data(settings: DataSettings, mask_side: int, seed: int) -> tuple[TrainValidationParts, str]:
    """Returns the samples, and a sentence that describes them."""
    notes: list[str] = []
    if settings.images and settings.coco:
        found = coco_images(settings.images, settings.coco)
        sources, notes = found.sources, [f"{number} {what}" for what, number in found.left_out.items()] + found.notes
    elif settings.images and settings.masks:
        sources = paired_files(settings.images, settings.masks).sources
    else:
        sources = [Coins()]
    validation = settings.validation or (0.5 if len(sources) == 1 else 0.2)
    parts = train_validation_parts(
        sources, mask_side, validation, settings.tile, settings.overlap, settings.min_area, seed
    )
    parts.notes[:0] = notes
    number = "1 image" if len(sources) == 1 else f"{len(sources)} images"
    return parts, f"{number} from {settings.images.name}" if settings.images else "A photograph of coins"


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Returns the numbers of trainable and of all parameters; PEFT counts packed 4-bit weights correctly."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def start(settings: Settings, parts: TrainValidationParts, is_main: bool) -> str | None:
    """Writes the settings into the output folder; with `resume`, returns the checkpoint to continue from.

    Raises:
        SettingsError: If the interrupted run had other settings.
        FileExistsError: If the folder is in use, or belongs to something else.
    """
    output = settings.folder
    file = output / "settings.json"
    run = {name: value for name, value in settings.options.items() if name not in NOT_PART_OF_THE_RUN}
    run |= {"processes": settings.training.world_size, "data": digest(parts)}
    if settings.output.resume and file.exists():
        earlier = json.loads(file.read_text())
        names = [*run, *(name for name in earlier if name not in run)]
        if changed := [name for name in names if run.get(name) != earlier.get(name)]:
            differences = ", ".join(f"{name} {earlier.get(name)} then and {run.get(name)} now" for name in changed)
            raise SettingsError(f"--resume: {output} was started with other settings: {differences}.")
        # trainer_state.json is written last: a checkpoint without it is incomplete.
        complete = [state.parent for state in output.glob("checkpoint-*/trainer_state.json")]
        if not complete:
            return None
        last = max(complete, key=lambda folder: int(folder.name.split("-")[1]))
        best = json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"]
        if best and not Path(best).is_dir():  # otherwise transformers would silently export the last weights
            raise SettingsError(
                f"--resume: the best checkpoint {best} does not exist: move {output} back, or run from the "
                "original working directory."
            )
        return str(last)
    if is_main:
        # Start in a new folder, so that checkpoints of an earlier run are not mistaken for this run's.
        sources = (settings.data.images, settings.data.masks, settings.data.coco, settings.model.base)
        with staged(output, "fine-tuning run", settings.output.force, sources, grows=True) as folder:
            (folder / file.name).write_text(json.dumps(run, indent=2) + "\n")
            repeated = {name: value for name, value in settings.options.items() if name not in NOT_REPEATED}
            write_file(repeated, folder / "run.yaml")
    return None


def digest(parts: TrainValidationParts) -> str:
    """Returns a hash of the samples. With other data, a resumed run could validate on objects it was trained on."""
    samples = [
        (name, Path(sample.source.name).name, str(sample.window), sample.ids.tolist())
        for name in ("train", "validation")
        for sample in getattr(parts, name)
    ]
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:12]


def peak_memory() -> float:
    """Returns the peak memory of this process in bytes: GPU memory, or resident memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
