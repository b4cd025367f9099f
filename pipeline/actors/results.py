"""Results of actor calls, with the user's sentence instead of Ray's traceback when there is one."""

from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from pipeline.errors import WiselineError, WorkersLost


def fetch(reference: Any) -> Any:
    """`ray.get`, with a WiselineError of the actor as itself. Raises WorkersLost where an actor died for good, cannot
    be reached, or what another actor left with Ray went with its node."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, WiselineError):
            raise error.cause from None
        if isinstance(error.cause, RayActorError | ObjectLostError):
            raise _lost(error.cause) from None
        raise
    except (RayActorError, ObjectLostError) as error:
        raise _lost(error) from None


def _lost(error: Exception) -> WorkersLost:
    return WorkersLost(
        "An actor died more often than resources.max_restarts allows (out of memory or a lost node, most likely: "
        f"{str(error).strip().splitlines()[-1].strip()}); what was finished is kept, run the round again."
    )
