"""Errors of this package: each message names the value, what was expected and the way out."""


class CMANPError(Exception):
    """
    Base of every error that this package raises on purpose.
    """


class ConfigError(CMANPError, ValueError):
    """
    A model, parameter or training configuration that cannot be used.
    """


class InputError(CMANPError, ValueError):
    """
    Observations or targets that do not fit; nothing was changed by them.
    """


class CheckpointError(CMANPError):
    """
    A checkpoint or state file that cannot be read, is damaged, or belongs to another model.
    """


class StateMismatchError(CMANPError):
    """
    Two states that cannot be combined: other sizes, weights, workspace or units.
    """


class TransformError(CMANPError):
    """
    No transform to the map frame at the stamp of a message.

    :ivar reason: counter key: 'no_frame', 'no_stamp', 'no_tf2', 'no_transform', 'bad_transform',
        'transform_too_old', 'transform_too_new', 'tf_queue_full', 'cleared' or 'closed'.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
