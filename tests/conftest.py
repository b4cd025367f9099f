"""One thread per process: the models here are tiny, and on a busy machine threads that wait for each other cost more
than they give. Set before torch is imported anywhere. For the same machines no property test has a deadline."""

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
