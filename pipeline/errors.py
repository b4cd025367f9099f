"""Errors that people read: one sentence saying what happened and what to do.

    WiselineError
    ├── ConfigError            a value in ray_config.yaml or --set is wrong
    ├── BadEdit                one edit cannot be accepted (its row goes to quarantine/)
    ├── UnsupportedModel       the architecture or layer is not in the table
    ├── ModelChanged           the base model is not the one the release was trained on
    ├── StoreError
    │   ├── NotFound           the object does not exist
    │   ├── AlreadyExists      a create-only write lost; somebody else's bytes stand
    │   ├── OutcomeUnknown     the store went silent; the write may or may not have happened
    │   ├── CorruptObject      bytes differ from their checksum or cannot be decoded
    │   ├── NewerSchema        written by a newer wiseline
    │   └── UnsafeStore        the store overwrites what it promised to create only once
    ├── TrainingDiverged       a loss became non-finite
    ├── WorkersLost            workers of a round, or what they held, went with their node
    ├── RoundConflict          another round published first
    ├── GateFailed             the candidate missed a threshold; nothing was published
    └── EndpointError          the endpoint is not there or refused

Every class takes its message as the only positional argument (GateFailed also the failures), so all of them survive
pickling through Ray. The command line prints the message and exits 1; nothing else is shown to a user.
"""


class WiselineError(Exception):
    """Base of everything a user may see; `str(error)` is the sentence to show."""


class ConfigError(WiselineError, ValueError): ...


class BadEdit(WiselineError, ValueError): ...


class UnsupportedModel(WiselineError, ValueError): ...


class ModelChanged(WiselineError): ...


class StoreError(WiselineError): ...


class NotFound(StoreError): ...


class AlreadyExists(StoreError): ...


class OutcomeUnknown(StoreError): ...


class CorruptObject(StoreError): ...


class NewerSchema(StoreError): ...


class UnsafeStore(StoreError): ...


class TrainingDiverged(WiselineError): ...


class WorkersLost(WiselineError): ...


class RoundConflict(WiselineError): ...


class GateFailed(WiselineError):
    """`failures` names what missed: one sentence per threshold, then one per failed edit."""

    def __init__(self, message: str, failures: tuple[str, ...] = ()) -> None:
        super().__init__(message, failures)
        self.failures = failures

    def __str__(self) -> str:
        return str(self.args[0])


class EndpointError(WiselineError): ...
