"""Fixtures of the tests that load from hubs."""

from loading_fixtures import hub, model_folder

__all__ = ["hub", "model_folder"]
