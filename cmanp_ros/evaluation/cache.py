"""A folder that keeps predictions: an exact GP takes seconds for what is scored in no time."""

import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Key(NamedTuple):
    """What was predicted, and by whom."""

    study: str
    seed: int
    num_context: int
    setting: float | str
    """Noise or kind."""
    method: str
    index: int
    """Number of the task."""


class Cache:
    """
    One npz file for each key; written whole or not at all, so several processes may share it.
    """

    def __init__(self, folder):
        """
        Use a folder, which comes into being with the first prediction.
        """
        self.folder = Path(folder)

    def path(self, key: Key) -> Path:
        """Return where the predictions of a key are, or would be."""
        setting = f'{key.setting:g}' if isinstance(key.setting, float) else str(key.setting)
        name = f'{key.seed}_{key.num_context}_{setting}_{key.index:04d}.npz'
        return self.folder / key.study / re.sub(r'[^a-z0-9]+', '-', key.method.lower()) / name

    def store(self, key: Key, y_target, **arrays):
        """
        Write predictions.

        :param y_target: what they are for; a later protocol with other targets will not match.
        :param arrays: such as mean, stddev and seconds.
        """
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f'.{os.getpid()}.tmp')
        with partial.open('wb') as file:
            np.savez(file, y_target=y_target, **arrays)
        partial.replace(path)

    def load(self, key: Key, y_target) -> dict[str, np.ndarray] | None:
        """
        Read predictions.

        :param y_target: what they have to be for.
        :return: what was stored; None: nothing, or for other targets, or a damaged file.
        """
        try:
            with np.load(self.path(key)) as file:
                arrays = dict(file)
            known = arrays.pop('y_target')
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        # Sums may differ in their last digits from one processor to another.
        same = known.shape == np.shape(y_target) and np.allclose(known, y_target, 1e-9, 1e-9)
        return arrays if same else None
