"""Results of actor calls, with the user's sentence instead of Ray's traceback when there is one."""

from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.errors import WiselineError


def fetch(reference: Any) -> Any:
    """`ray.get`, with a WiselineError of the actor as itself, and an actor that died for good as one sentence."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, WiselineError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise WiselineError(
            "An actor died more often than resources.max_restarts allows (out of memory or a lost node, most likely: "
            f"{str(error).strip().splitlines()[-1].strip()}); what was finished is kept, run the round again."
        ) from None
