"""Releases as folders that other programs load. `import pipeline.export` also makes transformers' Auto classes know
the folders that `wiseline export --format hf` writes."""

from pipeline.export.routed_model import register

register()
