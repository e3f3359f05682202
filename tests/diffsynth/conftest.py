"""Fixtures of the DiffSynth-style tests."""

from loading_fixtures import hub, model_folder

__all__ = ["hub", "model_folder"]
