"""WISE lifelong model editing as a distributed system. Start reading at `pipeline/rounds.py`."""
