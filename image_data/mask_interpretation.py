"""Finds out what the numbers in the masks of a data set mean, by examining them together.

A reading that is certain is taken, and said; where there is more than one, the run stops and asks for an option.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from .labels import LabelReading
from .mask_facts import MaskFacts, examine
from .pillow_images import DataError


Answers = list[tuple[bool, str]]  # whether it is a question, and its text or a note


def interpret_masks(
    masks: Sequence[tuple[str, Callable[[], np.ndarray]]], labels: LabelReading
) -> tuple[LabelReading, list[str]]:
    """Returns what `interpret` finds out about masks. Those that cannot be read are left out.

    Args:
        masks: The name of each mask, and a function that reads its integers (H, W).
        labels: What is known of their meaning.

    Raises:
        DataError: With every question that the masks leave open, and the options that answer it.
    """
    if None not in (labels.background, labels.void) and labels.instances == "labels":
        return labels, []  # nothing is left to be found out, not even soft edges
    facts = []
    for name, read in tqdm(masks, desc="Examining masks", unit="mask", disable=len(masks) < 50):
        with contextlib.suppress(ValueError):  # reported with all other problems, when images and masks are read
            mask = read()
            mask = mask if labels.threshold is None else mask >= labels.threshold
            facts.append(examine(mask, name, labels.background or (0,)))
    return interpret(facts, labels)


def interpret(facts: list[MaskFacts], reading: LabelReading) -> tuple[LabelReading, list[str]]:
    """Returns the reading with all that was None found out, and notes on it.

    Raises:
        DataError: With every question that the masks leave open, and the options that answer it.
    """
    if not facts:
        return reading, []
    if question := soft_edges(facts, reading):
        raise DataError([question])
    background, answers = find_background(facts, reading)
    void, more = find_void(facts, reading, background)
    instances, most = find_instances(facts, reading, background, void)
    answers = [*answers, *more, *most]
    if questions := [text for is_question, text in answers if is_question]:
        raise DataError(questions)
    reading = LabelReading(background, void, instances, reading.threshold, reading.turn_masks)
    return reading, [text for _, text in answers]


def soft_edges(facts: list[MaskFacts], reading: LabelReading) -> str | None:
    """Returns a question if masks have scraps of numbers at the borders of others."""
    soft = [one for one in facts if one.scraps >= 8 and 2 * one.scraps >= np.count_nonzero(one.numbers)]
    if not soft or reading.instances == "labels":
        return None
    worst = max(soft, key=lambda one: one.scraps)
    numbers = np.count_nonzero(worst.numbers)
    main = worst.numbers[np.argsort(worst.areas)[-2:]]
    looks_binary = 0 in main and main.max() == worst.numbers.max()
    half = int(main.max()) // 2 + 1
    advice = (
        f"If they show one kind of object on 0, say --threshold {half}. Otherwise save" if looks_binary else "Save"
    )
    return (
        f"{worst.name}: {numbers} different numbers, {worst.scraps} of them in scraps of a few pixels at the borders "
        f"of others ({len(soft)} of {len(facts)} masks are like this): the mask was saved as JPEG, or resized with "
        f"soft edges. {advice} masks as PNG, and resize them with nearest neighbour; or say --instances labels if "
        "every number is an object."
    )


def find_background(facts: list[MaskFacts], reading: LabelReading) -> tuple[tuple[int, ...], Answers]:
    """Returns the numbers of the background."""
    if reading.background is not None:
        return reading.background, []
    around = [one for one in facts if one.surrounding]
    if not around:
        return (0,), []
    number, count = Counter(one.surrounding for one in around if one.surrounding).most_common(1)[0]
    if 2 * count <= sum(one.numbers.any() for one in facts):
        examples = ", ".join(one.name for one in around[:3])
        return (0,), [
            (False, f"in {len(around)} of {len(facts)} masks, one object surrounds or fills all: {examples}")
        ]
    has_0 = any((one.numbers == 0).any() for one in facts)
    example = min((one for one in around if one.surrounding == number), key=lambda one: -len(one.numbers))
    fills = len(example.numbers) == 1
    if not has_0 and not fills and count == len(facts):
        note = (
            f"0 is in no mask; {number} surrounds all else, and is the background (--background 0 if it is an object)"
        )
        return (number,), [(False, note)]
    share = example.areas[example.numbers == number][0] / example.areas.sum()
    question = (
        f"In {count} of {len(facts)} masks, {number} {'fills the image' if fills else 'surrounds all else'}, as in "
        f"{example.name} ({share:.0%} of the pixels). If it is the background, say --background "
        f"{f'0 {number}' if fills and has_0 else number}; if it is an object, --background 0."
    )
    return (0,) if fills else (number,), [(True, question)]


def find_void(
    facts: list[MaskFacts], reading: LabelReading, background: tuple[int, ...]
) -> tuple[tuple[int, ...], Answers]:
    """Returns the numbers of pixels without a label."""
    if reading.void is not None:
        return reading.void, []
    commonest = Counter(int(one.numbers[-1]) for one in facts).most_common(1)
    for number in dict.fromkeys([255, 65535, *(largest for largest, _ in commonest)]):
        with_it = [
            one
            for one in facts
            if one.numbers[-1] == number and number not in background and one.others(0, number, *background).any()
        ]
        share = sum(one.outline_at_largest for one in with_it) / max(1, sum(one.outline for one in with_it))
        is_around = share >= 0.7
        where = f"in {len(with_it)} of {len(facts)} masks"
        if number in (255, 65535) and is_around:
            note = (
                f"{number} lies around the objects {where}: its pixels do not count (--void none if it is an object)"
            )
            return (number,), [(False, note)]
        known = np.unique(np.concatenate([one.numbers[one.others(0, number, *background)] for one in facts]))
        known = known[known < number]
        if number in (255, 65535) and with_it and not belongs_to(known, number):
            seen = f"beside numbers up to {known[-1]}"
        elif is_around and 2 * len(with_it) > max(2, len(facts)):
            seen = "around the others"
        else:
            continue
        question = (
            f"{number} is {where}, as in {with_it[0].name}, {seen}. If it marks pixels without a label, say --void "
            f"{number}; if it is an object, --void none."
        )
        return (), [(True, question)]
    return (), []


def belongs_to(known: np.ndarray, number: int) -> bool:
    """Whether a number goes on in the row of the others, in steps of one or more."""
    step = np.gcd.reduce(known, initial=number)
    return known[-1] == number - 1 or (step > 1 and len(known) + 1 == number // step)


def find_instances(
    facts: list[MaskFacts], reading: LabelReading, background: tuple[int, ...], void: tuple[int, ...]
) -> tuple[str, Answers]:
    """Returns whether numbers or their connected parts are objects."""
    if reading.instances is not None:
        return reading.instances, []
    chosen = [one.others(*background, *void) for one in facts]
    parts = [one.parts[which] for one, which in zip(facts, chosen, strict=True)]
    numbers, in_parts = sum(map(len, parts)), int(sum(part.sum() for part in parts))
    if in_parts >= 1.5 * numbers and in_parts - numbers >= 2:
        worst = max(range(len(facts)), key=lambda place: parts[place].sum())
        question = (
            f"The masks have {numbers} labels in {in_parts} separate parts; {facts[worst].name} has "
            f"{len(parts[worst])} in {parts[worst].sum()}. If each part is an object, say --instances components; if "
            "each label is one object, whatever parts it has, --instances labels."
        )
        return "labels", [(True, question)]
    several = sum(int((part > 1).sum()) for part in parts)
    note = f"{several} of {numbers} objects have several separate parts (--instances components if each is an object)"
    return "labels", [(False, note)] if several else []
