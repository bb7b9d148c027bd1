"""Coarse word classes of sub-word tokens, without a tagger."""

from __future__ import annotations

from collections.abc import Sequence

CLASSES = ("function", "content", "name", "continuation", "number", "punctuation", "space")
FUNCTION_WORDS = frozenset(
    "a an the this that these those i you he she it we they me him her us them my your his its "
    "our their who whom whose which what and or but nor so yet if then else because as while "
    "when where of in on at by for with about against between into through during before after "
    "above below to from up down out off over under again further is am are was were be been "
    "being have has had do does did will would shall should can could may might must not no "
    "than too very there here all any both each few more most other some such only own same how "
    "why".split()
)


def token_classes(texts: Sequence[str]) -> list[str]:
    """Class of each token of a row, in order.

    A token without a space before it that follows a letter continues a word; a capital letter in
    the middle of a sentence makes a name; the function words are a closed list.

    Args:
        texts: each token decoded by itself, spaces kept.
    """
    classes: list[str] = []
    before, sentence_start = "", True
    for text in texts:
        word = text.strip()
        joined = bool(before) and before[-1].isalnum() and text[:1].isalnum()
        if not word:
            classes.append("space")
        elif any(c.isdigit() for c in word):
            classes.append("number")
        elif not any(c.isalpha() for c in word):
            classes.append("punctuation")
        elif joined:
            classes.append("continuation")
        elif word.lower() in FUNCTION_WORDS:
            classes.append("function")
        elif word[0].isupper() and not sentence_start:
            classes.append("name")
        else:
            classes.append("content")
        if word:
            sentence_start = word[-1] in ".!?"
        before = text
    return classes
