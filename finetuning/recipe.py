"""What `finetune.py` does, step by step: reads data and model, trains, measures, and has the results written."""

import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
from peft import PeftModel
from transformers import TrainerState, set_seed

from checkpoint_tools.base_provenance import Base, described, named_base
from checkpoint_tools.conversions import load_checked
from checkpoint_tools.fetching import fetch
from checkpoint_tools.licences import Licence
from checkpoint_tools.option_checks import SettingsError
from checkpoint_tools.push_to_hub import check_destination
from image_data.layouts import read_data
from image_data.samples import Sample
from segmentation.adapted_model import load_base

from .data_summary import PICTURE, DataSummary
from .prompts import ValidationSet
from .recipe_settings import Settings
from .result_files import destination_of, write_results
from .resuming import first_diverged, has_stopped
from .run_folder import opened_run, write_check
from .trainable_weights import four_bits, make_trainable
from .trainer import PromptTrainer, build_trainer, metrics_of


def finetune(settings: Settings) -> None:
    """Trains what the settings ask for, and writes all results into the output folder.

    Raises:
        DataError: If something is wrong with the files; nothing is written then.
        ModelError: If something is wrong with the base model.
        SettingsError: If the settings do not fit the machine, or the run to be resumed.
        FileExistsError: If the output folder is in use.
        PushError: If the Hub refuses the upload that is asked for.
    """
    training = settings.training
    is_main = training.process_index == 0
    say = print if is_main else lambda *_: None
    if training.hub_model_id:
        require_login(training.hub_token)
        check_destination(*destination_of(training))
    set_seed(training.seed)
    quantization = four_bits(training.bf16) if settings.model.load_in_4bit else None
    model, processor = load_base(settings.model.base, settings.model.revision, quantization, settings.model.image_size)
    base = base_of(settings)
    mask_side = 4 * model.prompt_encoder.image_embedding_size[0]
    parts, about_data = read_data(settings.data, mask_side, training.seed)
    summary = DataSummary.of(parts, about_data, mask_side)
    say(str(summary))
    if settings.output.check:
        if is_main:
            write_check(settings, summary, parts)
        say(f"{settings.folder / PICTURE}: are the outlines those of your objects? Nothing was trained.")
        return
    model = make_trainable(model, settings.model, base.commit)
    trainable, total = parameter_counts(model)
    say(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
    facts = {
        "base": settings.model.base,
        "revision": settings.model.revision,
        "data": about_data,
        "prompts": settings.prompts.prompts,
        "objects": summary.objects,
        "trainable_parameters": trainable,
    }
    with opened_run(settings, parts, is_main) as checkpoint:
        if is_main:
            summary.save(settings.folder, parts)
            say(f"Pictures of the data: {settings.folder / PICTURE}")
        trainer = build_trainer(settings, model, processor, parts, mask_side)
        metrics = facts | train(trainer, checkpoint)
        if parts.test:
            metrics["test"] = test(trainer, parts.test)
            say(f"Mean IoU on the {metrics['test']['objects']:.0f} test objects: {metrics['test']['iou']:.3f}.")
        weights = settings.folder / ("adapter" if isinstance(model, PeftModel) else "model")
        trainer.save_model(str(weights))  # on all ranks: each may hold a shard
        if is_main:
            (weights / "training_args.bin").unlink()  # a pickle that only Trainer reads
            write_results(settings, base, weights, metrics, parts, trainer)


def train(trainer: PromptTrainer, checkpoint: str | None) -> dict[str, Any]:
    """Trains, loads the best weights, and returns what was measured.

    Raises:
        SettingsError: If training diverged before any validation loss was a number.

    Do not call `trainer.evaluate()` before `train()`: accelerate would skip wrapping the model in DDP, and ranks would
    diverge.
    """
    trainer.args.eval_on_start = checkpoint is None
    if checkpoint:
        earlier = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if has_stopped(earlier, trainer.args.patience):
            trainer.args.max_steps = earlier.global_step
            trainer.train_dataset.size = earlier.global_step * trainer.args.step_size
    started, cpu_started, loaded = time.perf_counter(), time.process_time(), peak_memory()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    state, name = trainer.state, trainer.args.metric_for_best_model
    if (step := first_diverged(state)) is not None:
        best, diverged = state.best_global_step, f"at step {step}, the validation loss is not a number"
        if best is None or best >= step:
            raise SettingsError(
                f"--learning-rate {trainer.args.learning_rate:g}: training diverged: {diverged}. Start again with a "
                "lower one, or with --bf16 instead of --fp16, and with --force."
            )
        if trainer.args.process_index == 0:
            print(f"Training diverged: {diverged}. The weights of step {best} are used.")
    before = metrics_of(next(entry for entry in state.log_history if f"eval_{name}" in entry))
    after = metrics_of(trainer.evaluate())
    return {
        "before": before,
        "after": after,
        "selected_by": name,
        "better_than_base": (after[name] > before[name]) == trainer.args.greater_is_better,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gigabytes": (peak_memory() - loaded) / 1e9,  # relative to memory after loading
        "history": state.log_history,
    }


def base_of(settings: Settings) -> Base:
    """Returns what is known of the base, or of the same model as `--base-model` names it, and of its licence.

    Raises:
        SettingsError: If they are not the same, or if that is not enough for the upload that is asked for.
    """
    model, output = settings.model, settings.output
    licence = Licence(output.license, output.license_name, output.license_link)
    try:
        if model.base_model:
            commit = named_base(model.base_model, load_checked(model.base, model.revision)[0])
            base = described(model.base_model, fetch(model.base_model, commit, weights=False), licence)
        else:
            base = described(model.base, fetch(model.base, model.revision, weights=False), licence)
    except (ValueError, RuntimeError) as error:
        raise SettingsError(str(error)) from error
    if not settings.training.hub_model_id:
        return base
    if base.licence.problem:
        raise SettingsError(f"--push-to-hub: {base.name}: {base.licence.problem}.")
    if base.is_folder and model.method == "lora":
        raise SettingsError(
            f"--push-to-hub: the adapter would name the folder {model.base}, which others do not have: upload the "
            "base with upload.py, and give its Hub id as --base-model."
        )
    return base


def test(trainer: PromptTrainer, samples: list[Sample]) -> dict[str, float]:
    """Returns the metrics of the weights that were chosen, on images that took no part in the choice."""
    dataset = ValidationSet(samples, trainer.eval_dataset.encode, seed=trainer.args.seed)
    return metrics_of(trainer.predict(dataset, metric_key_prefix="eval").metrics)


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


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Returns the numbers of trainable and of all parameters; PEFT counts packed 4-bit weights correctly."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def peak_memory() -> float:
    """Returns the peak memory of this process in bytes: GPU memory, or resident memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
