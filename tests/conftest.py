"""One thread per process: the models here are tiny, and on a busy machine threads that wait for each other cost more
than they give. Set before torch is imported anywhere. For the same machines no property test has a deadline. No model
hub is asked: a name that is no folder is refused at once, whatever the network does."""

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
