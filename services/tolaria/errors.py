"""Everything that can go wrong with training, as one tree.

Each message is for the person who started the run: it names the file, the key or the layer, and the way out.
"""

from __future__ import annotations

from typing import ClassVar

from services.chassis.errors import EsperError, Reason


class TolariaError(EsperError):
    """Root of the tree; ``REASON`` is each class's row of the table of reasons."""

    REASON: ClassVar[Reason] = Reason.TRAINING_FAILED

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=self.REASON)


class DataError(TolariaError):
    """A data set cannot be used: missing, damaged, or not of the promised shape."""

    REASON = Reason.DATA_INVALID


class DataMissingError(DataError):
    """Files of a data set are not there."""


class DataCorruptError(DataError):
    """A file of a data set is not what its publisher published."""


class DownloadError(DataError):
    """A download did not finish; what arrived is kept and resumed next time."""


class FactoryError(TolariaError):
    """A user's factory cannot be imported, failed, or returned something unusable."""

    REASON = Reason.MODEL_INVALID


class ModelError(TolariaError):
    """A host network cannot be built from the configuration."""

    REASON = Reason.MODEL_INVALID


class BudgetError(TolariaError):
    """The growth budget does not allow even the host."""

    REASON = Reason.INVALID_FIELD


class CheckpointError(TolariaError):
    """A checkpoint cannot be used: damaged, of another version, or of another run."""

    REASON = Reason.CHECKPOINT_INVALID


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written; those before it are intact."""


class JournalError(TolariaError):
    """The run's journal cannot be used, or does not agree with what the run does."""

    REASON = Reason.RUN_FOLDER_INVALID


class TrainingFailedError(TolariaError):
    """The run ended for its own reason: the governor's patience is spent."""


class TestSetTouchedError(TolariaError):
    """Something asked for the test set before the end of training, or a second time."""

    __test__ = False  # not a test class, whatever pytest thinks of the name


class ExportError(TolariaError):
    """The grown network cannot be exported or rebuilt; never the end of a run."""

    REASON = Reason.EXPORT_FAILED
