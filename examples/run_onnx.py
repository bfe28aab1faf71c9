r"""Segments one object with the files that `convert.py to-onnx` writes, in onnxruntime.

python convert.py to-onnx checkpoints/sam-tiny build/onnx-sam --interface sam
python examples/run_onnx.py build/onnx-sam docs/images/coins.png build/mask.png --interface sam --side 128 \
    --point 46 260

Copy `segment` and the function of your `--interface`. Logits above 0 are the object.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from transformers import SamProcessor


INSIDE, UPPER_LEFT, LOWER_RIGHT, NO_BOX = 1, 2, 3, -1  # labels of points


def main() -> None:
    """Writes the mask as a picture in black and white."""
    args = parse_args()
    if args.box is None and not args.point:
        raise SystemExit("run_onnx.py: expected --point X Y or --box LEFT TOP RIGHT BOTTOM.")
    image = Image.open(args.image).convert("RGB")
    logits = segment(args.folder, image, args.point, args.box, args.interface, args.side)
    Image.fromarray(logits > 0).save(args.output)
    print(f"{args.output}: {(logits > 0).sum():,} pixels")


def segment(
    folder: Path,
    image: Image.Image,
    inside: Sequence[Sequence[float]] = (),
    box: Sequence[float] | None = None,
    interface: str = "transformers",
    side: int | None = None,
) -> np.ndarray:
    """Returns the logits of one object's mask, (H, W).

    Args:
        folder: What `to-onnx` wrote.
        image: An RGB image.
        inside: x and y of points in the object, in pixels of the image.
        box: Left, top, right and bottom of the box around it.
        interface: The `--interface` of the files.
        side: The model's image_size, where files of `sam` do not tell it.
    """
    points = [(*point, INSIDE) for point in inside]
    if box is not None:
        points += [(*box[:2], UPPER_LEFT), (*box[2:], LOWER_RIGHT)]
    elif interface != "transformers-js":  # whose decoder appends this point itself
        points += [(0, 0, NO_BOX)]
    prompt = np.array(points, dtype=np.float32)
    return run_sam(folder, image, prompt, side) if interface == "sam" else INTERFACES[interface](folder, image, prompt)


def run_transformers(folder: Path, image: Image.Image, points: np.ndarray) -> np.ndarray:
    """Runs files of `--interface transformers`.

    Args:
        folder: What `to-onnx` wrote.
        image: An RGB image.
        points: (points, 3): x and y in pixels of the image, and the label.
    """
    pixels = pixel_values(folder, image)
    side = pixels.shape[-1]
    decoder = session(folder / "decoder.onnx")
    grid = next(each.shape[-1] for each in decoder.get_inputs() if each.name == "input_masks")
    (embeddings,) = session(folder / "encoder.onnx").run(None, {"pixel_values": pixels})
    pred_masks, _ = decoder.run(
        None,
        {
            "image_embeddings": embeddings,
            "input_points": scaled(points, image, side)[None, None],
            "input_labels": points[None, None, :, 2].astype(np.int64),
            "input_masks": np.zeros((1, 1, grid, grid), dtype=np.float32),
            "has_input_masks": np.array([[False]]),
            "multimask_output": np.array(False),  # one mask, not three
        },
    )
    return in_image(pred_masks[0, 0, 0], image, side)


def run_sam(folder: Path, image: Image.Image, points: np.ndarray, side: int | None = None) -> np.ndarray:
    """Runs files of `--interface sam`, with the arguments of `run_transformers`.

    `side` is the model's image_size: by default 4 times its masks' side, as with patches of 16 pixels.
    """
    decoder = session(folder / "decoder.onnx")
    grid = next(each.shape[-1] for each in decoder.get_inputs() if each.name == "mask_input")
    side = side or 4 * grid
    pixels = np.asarray(image.resize(size_in_model(image, side), Image.Resampling.BILINEAR), dtype=np.float32)
    (embeddings,) = session(folder / "encoder.onnx").run(None, {"input_image": pixels})
    masks, _, _ = decoder.run(
        None,
        {
            "image_embeddings": embeddings,
            "point_coords": scaled(points, image, side)[None],
            "point_labels": points[None, :, 2],
            "mask_input": np.zeros((1, 1, grid, grid), dtype=np.float32),
            "has_mask_input": np.zeros(1, dtype=np.float32),
            "orig_im_size": np.array([image.height, image.width], dtype=np.float32),
        },
    )
    return masks[0, 0]


def run_transformers_js(folder: Path, image: Image.Image, points: np.ndarray) -> np.ndarray:
    """Runs files of `--interface transformers-js`, with the arguments of `run_transformers`."""
    pixels = pixel_values(folder, image)
    side = pixels.shape[-1]
    encoder = session(folder / "onnx" / "vision_encoder.onnx")
    embeddings, positions = encoder.run(None, {"pixel_values": pixels})
    scores, pred_masks = session(folder / "onnx" / "prompt_encoder_mask_decoder.onnx").run(
        None,
        {
            "image_embeddings": embeddings,
            "image_positional_embeddings": positions,
            "input_points": scaled(points, image, side)[None, None],
            "input_labels": points[None, None, :, 2].astype(np.int64),
        },
    )
    return in_image(pred_masks[0, 0, scores[0, 0].argmax()], image, side)  # the best rated of three


INTERFACES = {"transformers": run_transformers, "sam": run_sam, "transformers-js": run_transformers_js}


def session(file: Path) -> InferenceSession:
    """Opens a file to run on the CPU."""
    return InferenceSession(file, providers=["CPUExecutionProvider"])


def pixel_values(folder: Path, image: Image.Image) -> np.ndarray:
    """Returns what the encoder takes, (1, 3, side, side): resized, normalized, padded."""
    return SamProcessor.from_pretrained(folder)(image, return_tensors="np")["pixel_values"]


def size_in_model(image: Image.Image, side: int) -> tuple[int, int]:
    """Returns the width and the height of the image when its longer side is the model's."""
    width, height = (int(length * side / max(image.size) + 0.5) for length in image.size)
    return width, height


def scaled(points: np.ndarray, image: Image.Image, side: int) -> np.ndarray:
    """Returns x and y in pixels of the resized image, (points, 2)."""
    return (
        points[:, :2] * np.array(size_in_model(image, side), dtype=np.float32) / np.array(image.size, dtype=np.float32)
    )


def in_image(mask: np.ndarray, image: Image.Image, side: int) -> np.ndarray:
    """Returns a predicted mask, (grid, grid), without the padding and in the size of the image."""
    padded = Image.fromarray(mask).resize((side, side), Image.Resampling.BILINEAR)
    whole = padded.crop((0, 0, *size_in_model(image, side))).resize(image.size, Image.Resampling.BILINEAR)
    return np.asarray(whole)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what to-onnx wrote")
    parser.add_argument("image", type=Path, help="an image file")
    parser.add_argument("output", type=Path, help="the picture of the mask to write, such as mask.png")
    parser.add_argument("--interface", choices=INTERFACES, default="transformers", help="as given to to-onnx")
    parser.add_argument(
        "--side", type=int, help="the model's image_size, for sam with patches of other than 16 pixels"
    )
    parser.add_argument(
        "--point", nargs=2, type=float, action="append", default=[], metavar=("X", "Y"), help="inside the object"
    )
    parser.add_argument("--box", nargs=4, type=float, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="around it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
