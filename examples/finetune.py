"""Fine-tunes Segment Anything on your own images, and hands back an adapter, a merged model, or stock SAM.

python examples/finetune.py --images DIR --masks DIR --output DIR [--base facebook/sam-vit-base]
accelerate launch --num_processes 2 examples/finetune.py ...

Without images it learns from a part of a photograph of coins, with a small SAM that comes with this repo.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import huggingface_hub
import psutil
import torch
from adapted_model import UnusableModel, four_bits, load_base, make_trainable
from images_and_masks import BadData, Coins, coco_images, paired_files
from peft import PeftModel
from prompts import KINDS
from results import write_results
from samples import Split, split
from training import build_trainer, build_training_args, metrics_of
from transformers import set_seed

from staging import ROOT, staged


# What may differ when a run is resumed: the result is the same.
NOT_PART_OF_THE_RUN = {"resume", "output", "force", "export", "push_to_hub", "workers", "minutes"}


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        finetune(args)
    except (BadData, UnusableModel, FileExistsError) as error:
        sys.exit(str(error))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--images", type=Path, help="folder of PNG, JPEG or TIFF images")
    group.add_argument("--masks", type=Path, help="folder of PNG or TIFF label images, named as the images")
    group.add_argument("--coco", type=Path, help="COCO annotations of the images, instead of masks")
    group.add_argument(
        "--validation", type=float, help="share to validate on: of the images (0.2), of one image (0.5)"
    )
    group.add_argument("--tile", type=int, help="cut images into tiles of so many pixels")
    group.add_argument("--overlap", type=float, default=0.25, help="share of a tile that the next one shows too")
    group.add_argument("--min-area", type=int, default=4, help="pixels of the model's masks to count as an object")
    group.add_argument("--augment", choices=("none", "crop", "turn"), default="turn", help="crop also mirrors")
    group.add_argument("--workers", type=int, default=0, help="processes that prepare the data")

    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", choices=KINDS, default="point")
    group.add_argument("--points", type=int, default=1, help="points in each object")
    group.add_argument("--negative-points", type=int, default=0, help="points beside each object")
    group.add_argument("--objects", type=int, default=6, help="objects of an image in a training step")
    group.add_argument("--multimask", action="store_true", help="predict three masks per prompt, and train the best")

    group = parser.add_argument_group("model")
    tiny = str(ROOT / "checkpoints" / "sam-tiny")
    group.add_argument("--base", default=tiny, help="folder or Hub id of a SAM v1, stock or split")
    group.add_argument("--revision", help="of the base, on the Hub")
    group.add_argument(
        "--method",
        choices=("lora", "full", "decoder"),
        default="lora",
        help="adapters, all weights of the vision encoder, or those of the mask decoder alone",
    )
    group.add_argument("--target", nargs="+", default=["q", "v"], help="Linears of the vision layers to adapt")
    group.add_argument("--rank", type=int, default=16)
    group.add_argument("--alpha", type=float, default=32)
    group.add_argument("--dropout", type=float, default=0.1)
    group.add_argument("--dora", action="store_true")
    group.add_argument("--rslora", action="store_true")
    group.add_argument("--last-layers", type=int, metavar="N", help="adapt the last N layers only")
    group.add_argument("--train-decoder", choices=("full", "lora"), help="the mask decoder too")
    group.add_argument("--load-in-4bit", action="store_true")

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=300)
    group.add_argument("--minutes", type=float, help="stop training then, whatever the step")
    group.add_argument("--batch-size", type=int, default=4, help="images of a step, in each process")
    group.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    group.add_argument("--learning-rate", type=float, default=1e-3)
    group.add_argument("--loss", choices=("cross-entropy", "focal"), default="cross-entropy", help="beside dice")
    group.add_argument("--eval-every", type=int, default=50, metavar="STEPS", help="validate, and save a checkpoint")
    group.add_argument("--patience", type=int, help="stop after so many validations without improvement")
    group.add_argument("--gradient-checkpointing", action="store_true")
    group.add_argument("--bf16", action="store_true")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, default=Path("build/finetune"))
    group.add_argument("--force", action="store_true", help="replace what an earlier run left in --output")
    group.add_argument("--export", nargs="+", choices=("merged", "stock"), default=[], help="whole models to write")
    group.add_argument("--push-to-hub", metavar="USER/NAME", help="upload what was trained to this model repo")
    args = parser.parse_args(arguments)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if settings contradict each other."""
    if args.coco and args.masks:
        parser.error("--masks and --coco are both given: expected one of them.")
    if bool(args.images) != bool(args.coco or args.masks):
        parser.error("expected --images together with --masks or --coco, or none of them for the coins.")
    if args.validation is not None and not 0 < args.validation < 1:
        parser.error(f"--validation {args.validation}: expected a share between 0 and 1.")
    if not 0 <= args.overlap < 1:
        parser.error(f"--overlap {args.overlap}: expected a share from 0 to less than 1.")
    for name in ("tile", "points", "objects", "rank", "steps", "batch_size", "accumulate", "eval_every", "patience"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1 or more.")
    for name in ("negative_points", "min_area", "workers", "dropout"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more.")
    if args.method != "lora" and (args.load_in_4bit or args.last_layers or args.dora or args.rslora):
        parser.error(f"--method {args.method} trains whole weights: it takes no settings of adapters, nor 4 bits.")
    if args.method != "lora" and args.train_decoder == "lora":
        parser.error(f"--method {args.method} adds no adapters: expected --train-decoder full.")


def finetune(args: argparse.Namespace) -> None:
    """Does all that the arguments ask for.

    Raises:
        BadData: If something is wrong with the files; nothing is written then.
        UnusableModel: If something is wrong with the base model.
    """
    training_args = build_training_args(args)  # first, as it joins the other processes
    is_main = training_args.process_index == 0
    say = print if is_main else lambda *_: None
    huggingface_hub.logging.set_verbosity_error()  # else every retry without a network is told
    if args.push_to_hub:
        require_login()

    set_seed(args.seed)
    model, processor = load_base(args.base, args.revision, four_bits(args.bf16) if args.load_in_4bit else None)
    mask_side = 4 * model.prompt_encoder.image_embedding_size[0]
    found, about_data = read_data(args, mask_side)
    objects = {name: sum(len(s.ids) for s in getattr(found, name)) for name in ("train", "validation")}
    say(f"{about_data}: {objects['train']} objects to learn from, {objects['validation']} to validate on.")
    for note in found.notes:
        say(f"  {note}")
    model = make_trainable(model, args)
    trainable, total = parameter_counts(model)
    say(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
    checkpoint = start(args, found, training_args.world_size, is_main)

    # Not by evaluate(), after which the model counts as prepared: each process would train for itself.
    training_args.eval_on_start = checkpoint is None
    trainer = build_trainer(args, training_args, model, processor, found, mask_side)
    started, cpu_started, loaded = time.perf_counter(), time.process_time(), peak_memory()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    before = metrics_of(next(entry for entry in trainer.state.log_history if "eval_iou" in entry))
    after = metrics_of(trainer.evaluate())

    folder = args.output / ("adapter" if isinstance(model, PeftModel) else "model")
    trainer.save_model(str(folder))  # by all processes, which may each hold a part of it
    if not is_main:
        return
    (folder / "training_args.bin").unlink()  # a pickle, for no one but Trainer
    metrics = {
        "base": args.base,
        "revision": args.revision,
        "data": about_data,
        "prompt": args.prompt,
        "objects": objects,
        "trainable_parameters": trainable,
        "before": before,
        "after": after,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gigabytes": (peak_memory() - loaded) / 1e9,  # above what it took to load all
        "history": trainer.state.log_history,
    }
    write_results(args, folder, metrics, trainer.eval_dataset)


def require_login() -> None:
    """Finds out before training whether there is someone to upload as.

    Raises:
        UnusableModel: If not.
    """
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network
        raise UnusableModel(
            f"--push-to-hub: the Hub does not know you. Run hf auth login. ({type(error).__name__})"
        ) from None


def read_data(args: argparse.Namespace, mask_side: int) -> tuple[Split, str]:
    """Returns the samples, and their description in words."""
    notes: list[str] = []
    if args.coco:
        sources, notes = coco_images(args.images, args.coco)
    elif args.images:
        sources = paired_files(args.images, args.masks)
    else:
        sources = [Coins()]
    validation = args.validation or (0.5 if len(sources) == 1 else 0.2)
    found = split(sources, mask_side, validation, args.tile, args.overlap, args.min_area, args.seed)
    found.notes[:0] = notes
    number = "1 image" if len(sources) == 1 else f"{len(sources)} images"
    return found, f"{number} from {args.images.name}" if args.images else "A photograph of coins"


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Returns the trainable parameters and all, of which PEFT knows those in 4 bits."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def start(args: argparse.Namespace, found: Split, world_size: int, is_main: bool) -> str | None:
    """Notes the settings in the output folder, or finds there the checkpoint to go on from.

    Raises:
        UnusableModel: If the folder holds something else, or what is to be resumed had other settings.
        FileExistsError: If it is in use.
    """
    file = args.output / "settings.json"
    settings = {name: value for name, value in vars(args).items() if name not in NOT_PART_OF_THE_RUN}
    settings |= {"processes": world_size, "data": digest(found)}
    settings = json.loads(json.dumps(settings, default=lambda path: str(path.resolve())))
    if args.resume and file.exists():
        noted = json.loads(file.read_text())
        if other := [name for name in settings if settings[name] != noted.get(name)]:
            differences = ", ".join(f"{name} {noted.get(name)} then and {settings[name]} now" for name in other)
            raise UnusableModel(f"--resume: {args.output} was started with other settings: {differences}.")
        # The state is written last: a checkpoint without one was interrupted.
        complete = [state.parent for state in args.output.glob("checkpoints/checkpoint-*/trainer_state.json")]
        if not complete:
            return None
        last = max(complete, key=lambda folder: int(folder.name.split("-")[1]))
        best = json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"]
        if best and not Path(best).is_dir():  # transformers would end with the last weights instead
            raise UnusableModel(
                f"--resume: the best checkpoint so far was {best}, which is not there: move {args.output} back, or "
                "start from the folder in which it was started."
            )
        return str(last)
    if is_main:
        if args.force and args.output.is_dir() and any(args.output.iterdir()) and not file.exists():
            raise UnusableModel(
                f"--force: {args.output} is not the output of an earlier run; choose another --output."
            )
        # A new folder, as an earlier run's checkpoints would be taken for this one's.
        with staged(args.output, force=args.force) as folder:
            (folder / file.name).write_text(json.dumps(settings, indent=2) + "\n")
    return None


def digest(found: Split) -> str:
    """Differs if images or objects have come or gone, with which a run would validate on what it learnt from."""
    samples = [
        (part, Path(sample.source.name).name, str(sample.window), sample.ids.tolist())
        for part in ("train", "validation")
        for sample in getattr(found, part)
    ]
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:12]


def peak_memory() -> float:
    """The most bytes that this process has held: of the GPU, or where there is none, of memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


if __name__ == "__main__":
    main()
