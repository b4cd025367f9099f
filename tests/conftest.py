"""One thread per process: the models here are tiny, and on a busy machine threads that wait for each other cost more
than they give. Set before torch is imported anywhere."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
