"""Errors that a user can act on: each names the thing, the place and the remedy."""

from __future__ import annotations


class DistDpError(Exception):
    """Base of every error this package raises on purpose.

    The command line prints the message alone, without a traceback, and exits with status 1.
    """


class ConfigError(DistDpError):
    """A setting is unknown, of the wrong type, or impossible together with another one."""


class DataError(DistDpError):
    """An input file or data set cannot be used as it is."""


class ModelError(DistDpError):
    """The model has a part that cannot be trained privately (no clipping rule, batch mixing)."""


class BudgetError(DistDpError):
    """The privacy budget does not allow what was asked for."""


class LedgerError(DistDpError):
    """The ledger on disk cannot be read, or contradicts what is asked of it."""


class LedgerAwayError(LedgerError):
    """The ledger cannot be used just now: asking again later may help."""


class StaleAttemptError(DistDpError):
    """An attempt at a run that was given up, and that another one has taken the place of."""


class ReleaseError(DistDpError):
    """A released model cannot be written or loaded."""


class CheckpointError(DistDpError):
    """A training checkpoint cannot be written, read or resumed from."""
