"""What the judge is asked: the images, then `rubric` + "\\nPrompt: ..." or "\\nInstruction: ...".

The answer that is trained and read: "{rationale}\\nScore: {N}", N a digit 1..5; the score token is
the one right after "Score: ".
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field

Dimension = Literal["alignment", "aesthetics", "portrait", "instruction"]
Reading = Literal["expected", "yes_no", "integer"]
DIMENSIONS: tuple[str, ...] = get_args(Dimension)
SCALE = ("1", "2", "3", "4", "5")
MARK = "Score:"
LEAD = "Score: "
CLOSE = "\nScore: "

DimensionField = Annotated[
    Dimension,
    Field(description="what is judged; instruction: an edit of condition images, the rest: images"),
]

_ANSWER = (
    "Think it through in a few sentences, then end with the line 'Score: N', where N is a whole "
    "number from 1 (bad) to 5 (excellent)."
)
_YES_NO = "\nIs this fully achieved? Answer with one word, Yes or No."

_CRITERIA = {
    "alignment": (
        "You judge how faithfully an image shows what its prompt asks for. Go through the prompt "
        "item by item: each object, how many there are, its colour, material and other traits, "
        "what it does, where it stands relative to the others, any written words, the setting and "
        "the style. 5: every item is there and nothing contradicts the prompt. 4: one small "
        "detail is off. 3: the main subject is right but a stated trait, number or relation is "
        "wrong. 2: much of what was asked for is missing or wrong. 1: the image has little to do "
        "with the prompt. Beauty does not count here."
    ),
    "aesthetics": (
        "You judge how well an image is made, whatever it shows. Look at composition, light, "
        "colour harmony, sharpness and texture, and at faults: noise, banding, smeared or repeated "
        "patterns, broken shapes, impossible anatomy, pasted edges. 5: could be published as it "
        "is. 4: pleasing, with a slight weakness. 3: acceptable but plain or with a visible fault. "
        "2: clear faults that spoil it. 1: ugly or badly damaged. Whether it follows the prompt "
        "does not count here."
    ),
    "portrait": (
        "You judge how believable the people in an image are. Look at faces first: proportions, "
        "eyes and gaze, teeth, skin with natural texture and no waxy smoothing, hair; then at "
        "hands, limbs, posture, and whether age, expression and other traits are those the prompt "
        "states. 5: passes for a photograph of a real person, or is flawless in the style asked "
        "for. 4: natural, one slight flaw. 3: recognisably generated but not disturbing. 2: a "
        "distorted face, hand or limb. 1: grossly malformed."
    ),
    "instruction": (
        "You judge an edit. The first image or images are the source, the last one is the result "
        "of following the instruction. Split the instruction into core requirements (what must "
        "change, and into what) and non-core ones (manner, placement, degree, finish). Check each "
        "core requirement, then each non-core one, then coherence: what the instruction does not "
        "mention, identities above all, stays as in the source, and the change fits the scene in "
        "light, perspective and texture. 5: all core and non-core requirements met, coherent. 4: "
        "all core met, a non-core one missed or a slight incoherence. 3: the core is met only in "
        "part, or it is met but something unrelated changed visibly. 2: a core requirement is "
        "missed. 1: not attempted, or the source is destroyed. A missed core requirement never "
        "gets more than 2, however good the rest looks."
    ),
}

CONTROL = re.compile(r"<\|[A-Za-z0-9_]+\|>")


def rubric(dimension: str, reading: str = "expected") -> str:
    """The built-in rubric of a dimension; for `yes_no` without the line on how to give a score."""
    criteria = _CRITERIA[dimension]
    return criteria if reading == "yes_no" else f"{criteria} {_ANSWER}"


def refuse_control(text: str, what: str) -> None:
    """ValueError for text that holds a control token or is no Unicode (lone surrogates)."""
    if found := CONTROL.search(text):
        raise ValueError(f"{what} holds the control token {found[0]}; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a surrogate pair ({error.reason}); mend it") from error


def question(dimension: str, text: str, rubric_text: str, reading: str = "expected") -> str:
    """The text after the images. text: the prompt, or the instruction of an edit.

    ValueError for empty text or one that holds a control token such as <|im_end|>, which would
    let a prompt write its own verdict.
    """
    if not text.strip():
        raise ValueError("the prompt is empty; wanted what the image is judged against")
    refuse_control(text, "the prompt")
    label = "Instruction" if dimension == "instruction" else "Prompt"
    return f"{rubric_text}\n{label}: {text}" + (_YES_NO if reading == "yes_no" else "")


def answer(rationale: str) -> str:
    """The assistant's text up to the score token: rationale, then the line that it stands in."""
    return f"{rationale}{CLOSE}" if rationale else LEAD
