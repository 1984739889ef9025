"""What Kasmina refuses, as one small tree. Torch-free; the servicers translate it into the mesh's errors."""

from __future__ import annotations


class GrowthError(ValueError):
    """A request that Kasmina refuses; the network is as it was."""


class UnknownSlotError(GrowthError):
    """There is no slot of that name, or it was refused; the message says why."""


class UnknownSeedError(GrowthError):
    """There is no seed of that id."""


class SlotUnavailableError(GrowthError):
    """The slot is occupied, under embargo or locked."""


class CommandConflictError(GrowthError):
    """The command id was used before for something else."""


class TopologyError(GrowthError):
    """A saved topology does not fit this host or this version."""
