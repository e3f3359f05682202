"""Other programs' own loaders, in their own environments: they change the weights as we say they do.

Run with `pytest -m peers tests/peers`. The interpreter that runs the tests is one peer (its diffusers and
PEFT); more are named in the environment variable PEER_PYTHON, separated by ":". README.md says how the
environments are made.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import LOKR_WHOLE, LORA, LOW_RANK, OTHER_MODEL, WITH_TEXT_ENCODER, sample_kind, samples
from safetensors.torch import load_file, save_file

from diffusers_qwenimage.lora.consumers import CONSUMERS
from diffusers_qwenimage.lora.convert import convert_lora
from diffusers_qwenimage.lora.factors import delta_weight
from diffusers_qwenimage.lora.fused import split_all
from diffusers_qwenimage.lora.predict import Consumer, predict
from diffusers_qwenimage.lora.read import parse_lora, read_lora
from diffusers_qwenimage.lora.targets import TARGETS

pytestmark = pytest.mark.peers

PYTHONS = (sys.executable, *filter(None, os.environ.get("PEER_PYTHON", "").split(os.pathsep)))
LOADERS = ("diffusers", "peft", "diffsynth")
SCRIPT = Path(__file__).with_name("load_in_peer.py")
# Files of fp32 factors; the programs multiply in fp32, and DiffSynth-Studio the alpha before.
TOLERANCE = 1e-6
Loaded = tuple[dict[str, Any], dict[str, torch.Tensor]]  # the answer, and the changes by module


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A loader in an environment."""

    python: str
    loader: str
    title: str


@cache
def versions(python: str) -> dict[str, str | None]:
    return ask(python, "versions")  # type: ignore[no-any-return]


def ask(python: str, request: object) -> Any:
    """The answer of `load_in_peer.py` in another environment; it sees none of our paths."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-W", "ignore", str(SCRIPT)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def consumer_of(peer: Peer) -> Consumer | None:
    """The rules that speak of this version."""
    version = peer.title.partition(" ")[2]
    if peer.loader == "diffsynth":
        return next(consumer for consumer in CONSUMERS if consumer.name == "DiffSynth-Studio")
    minor = ".".join(version.split(".")[:2])
    names = {"0.35": "0.35.2", "0.36": "0.36 to 0.37.1", "0.37": "0.36 to 0.37.1"}
    names |= {"0.40": "0.40.0", "0.42": "0.42.1"}
    titled = {consumer.title: consumer for consumer in CONSUMERS}
    return titled.get(f"diffusers {names.get(minor)}") if peer.loader == "diffusers" else None


def observed(result: dict[str, Any], changes: dict[str, torch.Tensor], path: Path) -> tuple[str, float]:
    """What really happened: the verdict, and the factor on the change."""
    if result["status"] == "error":
        return "error", 0.0
    applied = {name: change.double() for name, change in changes.items() if bool(change.any())}
    if not applied:
        return "nothing", 0.0
    file = parse_lora(path)
    wanted = {u.module: delta_weight(u) for u in split_all(file.updates, file.architecture)}
    if applied.keys() != wanted.keys():
        return "partly", 0.0
    factors = [float((applied[name] * w).sum() / w.square().sum()) for name, w in wanted.items()]
    factor = sum(factors) / len(factors)
    errors = [float((applied[name] - factor * w).norm() / w.norm()) for name, w in wanted.items()]
    if max(errors) > TOLERANCE * max(1.0, factor):
        return "partly", 0.0
    return ("exact", 1.0) if abs(factor - 1) < TOLERANCE else ("strength", factor)


def load_all(peer: Peer, paths: list[Path], folder: Path) -> list[Loaded]:
    tasks = [
        {"loader": peer.loader, "path": str(path), "output": str(folder / f"{number}.changes")}
        for number, path in enumerate(paths)
    ]
    results = ask(peer.python, tasks)
    return [
        (result, load_file(task["output"]) if result["status"] == "ok" else {})
        for task, result in zip(tasks, results, strict=True)
    ]


@pytest.fixture(params=[(number, loader) for number in range(len(PYTHONS)) for loader in LOADERS], ids=str)
def peer(request: pytest.FixtureRequest) -> Peer:
    number, loader = request.param
    version = versions(PYTHONS[number])[loader]
    if version is None:
        pytest.skip(f"{loader} is not installed there")
    return Peer(python=PYTHONS[number], loader=loader, title=f"{loader} {version}")


def test_predictions_against_the_program(peer: Peer, tmp_path: Path) -> None:
    """Every sample, as it is: it does what `inspect` says it will do.

    Of kinds whose change needs the base weights, only what is refused or ignored can be observed so.
    """
    consumer = consumer_of(peer)
    if consumer is None:
        pytest.skip("no rules for this program or version")
    paths = []
    for name, sample in samples().items():
        path = tmp_path / f"{name}.safetensors"
        tensors = sample.tensors(dtype=torch.float32, alpha=1.0)
        tensors = {k: t for k, t in tensors.items() if not k.startswith(("text_encoder", "lora_te_"))}
        save_file(tensors, path)
        plain = sample_kind(name) in (LORA, LOW_RANK, LOKR_WHOLE)
        (prediction,) = predict(parse_lora(path), [consumer])
        if plain or (sample_kind(name) != OTHER_MODEL and prediction.verdict in ("error", "nothing")):
            paths.append(path)
    wrong = []
    for path, (result, changes) in zip(paths, load_all(peer, paths, tmp_path), strict=True):
        verdict, factor = observed(result, changes, path)
        (prediction,) = predict(parse_lora(path), [consumer])
        same = verdict == prediction.verdict
        if prediction.verdict == "partly" and prediction.num_applied == 0:
            same = verdict == "nothing"  # an adapter without its tensors changes nothing
        if same and verdict == "strength":
            same = prediction.strength == pytest.approx(factor, rel=TOLERANCE)
        if not same:
            wrong.append((path.stem, verdict, factor, prediction.verdict, result.get("message", "")))
    assert len(paths) > 45 and not wrong, "\n".join(map(str, wrong))


def test_what_we_write_is_read_exactly(peer: Peer, tmp_path: Path) -> None:
    """Every LoRA sample in every spelling of ours, wherever we say that the program loads it exactly."""
    consumer = consumer_of(peer)
    if consumer is None and peer.loader != "peft":
        pytest.skip("no rules for this version")
    sources, outputs, targets = [], [], set()
    for name, sample in samples().items():
        if sample_kind(name) not in (LORA, LOW_RANK) or name in WITH_TEXT_ENCODER:
            continue
        source = tmp_path / f"{name}.source.safetensors"
        save_file(sample.tensors(dtype=torch.bfloat16, alpha=2.0), source)  # so products are exact in fp32
        for target in ("peft",) if peer.loader == "peft" else set(TARGETS) - {"peft"}:
            output = tmp_path / f"{name}.{target}{'' if target == 'peft' else '.safetensors'}"
            convert_lora(source, output, target)
            if consumer is None or predict(read_lora(output), [consumer])[0].verdict == "exact":
                sources.append(source)
                outputs.append(output)
                targets.add(target)
    assert targets >= ({"peft"} if peer.loader == "peft" else {"opensource"})
    wrong = [
        (output.name, result)
        for source, output, (result, changes) in zip(
            sources, outputs, load_all(peer, outputs, tmp_path), strict=True
        )
        if observed(result, changes, source) != ("exact", 1.0)
    ]
    assert not wrong, "\n".join(map(str, wrong))
