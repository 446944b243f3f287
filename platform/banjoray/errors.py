"""Every error that banjoray raises on purpose, with the exit code that the command line gives it.

    BanjorayError                     1  the run failed
    |-- AskedWrong                    2  you asked for something that can't be done as written
    |   |-- ConfigError                  a key or a value in a job file, a serve config or --set
    |   |-- DataError                    a file, a row or a cell
    |   |-- ModelError                   a base model that can't be had, or can't be frozen as asked
    |   `-- RegistryError                a model, version or alias that is not there
    |       |-- StaleAlias            1  the alias moved while you were promoting
    |       `-- BrokenVersion         1  files of a version differ from its manifest
    |-- TrainingFailed                1  the workers gave up, after every retry
    |   |-- OutOfMemory                  a microbatch did not fit; the next start takes smaller ones
    |   |-- Untrainable                  the values of the job can't be trained with
    |   `-- Stopped                      the run was told to end; the same command goes on
    |-- ClusterError                  1  Ray, Serve or the job server did not do its part
    |-- GateRefused                   3  the model was trained and its score is below the gate
    `-- RequestError                  -  an HTTP request that can't be answered; has a status

Every error carries one message that says where, what was found, what was needed and what to do.
It is built from that message alone, so that it survives pickling between Ray processes.
"""

from collections.abc import Mapping

# Of what a client sent, no more than this is sent back to it.
MOST_TOLD = 2000


class BanjorayError(Exception):
    """Anything that went wrong in a way banjoray knows about; the message is written for the user."""

    exit_code = 1


class AskedWrong(BanjorayError):
    """The request can't be carried out as written; nothing was started."""

    exit_code = 2


class ConfigError(AskedWrong):
    """A key or value in a job file, a serve config or ``--set``; the message starts with the dotted key."""


class DataError(AskedWrong):
    """Rows that can't be trained on or scored; the message names the file and the row."""


class ModelError(AskedWrong):
    """A base model that can't be found, is not what its digest says, or can't be frozen as asked."""


class RegistryError(AskedWrong):
    """A model, version or alias that the registry does not hold; the message lists what it does hold."""


class StaleAlias(RegistryError):
    """The alias no longer points where the caller thought; nothing was changed."""

    exit_code = 1


class BrokenVersion(RegistryError):
    """A version whose files differ from its manifest, or that does not give its recorded score."""

    exit_code = 1


class TrainingFailed(BanjorayError):
    """The training workers failed and every retry is used up; the newest complete checkpoint is kept."""


class OutOfMemory(TrainingFailed):
    """A microbatch did not fit into the GPU's memory; its half has been noted in the run's folder."""


class Untrainable(TrainingFailed):
    """What was asked for can't be trained: losses that are no numbers, or a row that is larger than the memory."""


class Stopped(TrainingFailed):
    """The run was told to end and wrote a checkpoint; the same command goes on from there."""


class ClusterError(BanjorayError):
    """Ray, Ray Serve or the job server did not do its part."""


class GateRefused(BanjorayError):
    """The model was trained and scored, and its score is below ``registry.gate``; it is not registered."""

    exit_code = 3


class RequestError(BanjorayError):
    """An HTTP request that can't be answered.

    ``status`` is the HTTP status: 400 not JSON or a path that does not fit the task, 404 unknown model, 413 too large,
    422 wrong shape, 429 too many rows wait. ``headers`` go with it. The message is cut to `MOST_TOLD` characters and
    can always be sent as UTF-8.
    """

    def __init__(self, message: str, status: int = 422, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, status, headers)
        shown = message if len(message) <= MOST_TOLD else f"{message[:MOST_TOLD]} ..."
        self.message = shown.encode("utf-8", "backslashreplace").decode("utf-8")
        self.status = status
        self.headers = headers

    def __str__(self) -> str:
        return self.message
