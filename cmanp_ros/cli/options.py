"""Checks of what users give on the command line: numbers, and files that are to be written."""

import argparse
import os
from collections.abc import Callable, Collection
from math import inf
from pathlib import Path

from cmanp_ros.core.errors import ConfigError

MAX_THREADS = 1024
MAX_SEED = 2**31
PICTURES = ('.png', '.pdf', '.svg')


def number(kind: type, low: float, high: float = inf) -> Callable:
    """
    Return a type for argparse: finite numbers within limits.

    :param kind: int or float.
    """
    expected = f'at least {low:g}' if high == inf else f'{low:,} to {high:,}'

    def checked(text):
        value = kind(text)
        if not low <= value <= high or value == inf:
            raise argparse.ArgumentTypeError(f'{text} is out of range, expected {expected}')
        return value

    checked.__name__ = kind.__name__  # for what is no number, argparse says this name
    return checked


def check_output(option: str, path: Path, endings: Collection[str] = ()) -> None:
    """
    Refuse a file that could not be written at the end, before all the work.

    :param option: that names it.
    :param endings: of which its name has one; none: any.
    :raises ConfigError: for another ending, a folder, or a file in one that is not there or that
        cannot be written.
    """
    if endings and path.suffix.lower() not in endings:
        raise ConfigError(f'{option} {path}: expected a name that ends in {", ".join(endings)}')
    if path.is_dir():
        raise ConfigError(f'{option} {path} is a folder; expected the name of a file')
    if not path.resolve().parent.is_dir():
        raise ConfigError(
            f'{option} {path}: there is no folder {path.parent}; expected one: make it'
        )
    is_replaced = path.suffix == '.safetensors'  # others are written where they are
    place = path if path.exists() and not is_replaced else path.parent
    if not os.access(place, os.W_OK):
        raise ConfigError(
            f'{option} {path}: {place} cannot be written; expected a file in a folder that can'
        )
