"""pytest plugin: diffusers' own tests of Qwen-Image, on the classes of this package.

In a checkout of diffusers, with this folder on PYTHONPATH:

    pytest -p diffusers_suite tests/models/transformers/test_models_transformer_qwenimage.py

Before the tests are imported, every class that diffusers and this package have under the same name becomes
ours in `diffusers`; a test module that got hold of diffusers' class some other way is an error, so that
nothing passes for the wrong reason.
"""

from collections.abc import Generator

import diffusers
import pytest

import diffusers_qwenimage

OURS = {
    name: getattr(diffusers_qwenimage, name)
    for name in diffusers_qwenimage.__all__
    if isinstance(getattr(diffusers_qwenimage, name), type) and hasattr(diffusers, name)
}


def pytest_configure() -> None:
    for name, ours in OURS.items():
        setattr(diffusers, name, ours)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    held = getattr(collector, "obj", None) if isinstance(collector, pytest.Module) and report.passed else None
    missed = [name for name, ours in OURS.items() if getattr(held, name, ours) is not ours]
    if missed:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} imports diffusers' own {', '.join(missed)}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"ours in diffusers: {', '.join(OURS)}")
