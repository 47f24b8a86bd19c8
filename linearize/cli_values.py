"""What the options of a command line may be: text to value, or an error of argparse that says what is allowed."""

import argparse


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, is '{text}'")
    return int(text)


def port(text: str) -> int:
    if positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, is '{text}'")
    return int(text)


def some_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def batch_size(text: str) -> int | str:
    """Of lm-eval."""
    return text if text == "auto" else positive(text)


def listed(read):
    """Several of what `read` takes, by commas."""
    return lambda text: [read(word.strip()) for word in text.split(",")]


def _count(text: str) -> int:
    """'8k' -> 8192."""
    return positive(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)


def _prompt(text: str) -> int:
    """Tokens; a prompt may be empty."""
    return 0 if text == "0" else _count(text)


def _rows(text: str) -> int | str:
    return text if text == "max" else _count(text)


def _pair(text: str) -> tuple:
    """'8k:max' -> (8192, 'max')."""
    words = text.split(":")
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"must be prompt:batch pairs, as 1k:128,8k:max, is '{text}'")
    return _prompt(words[0]), _rows(words[1])


counts, prompts, batches, pairs = (listed(read) for read in (_count, _prompt, _rows, _pair))


def names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("names nothing")
    return found
