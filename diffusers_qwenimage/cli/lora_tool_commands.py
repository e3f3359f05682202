"""What the commands of `lora_tools.py` do: inspect, merge, resize, extract, bake, doctor."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from diffusers_qwenimage.checkpoint.reader import weight_files
from diffusers_qwenimage.cli.lora_commands import (
    EXIT_DIFFERS,
    EXIT_DONE,
    EXIT_REFUSED,
    num_bytes,
    progress_bar,
    write_result,
)
from diffusers_qwenimage.lora.bake import bake_loras
from diffusers_qwenimage.lora.consumers import CONSUMERS
from diffusers_qwenimage.lora.convert import Conversion
from diffusers_qwenimage.lora.doctor import diagnose, repair_lora
from diffusers_qwenimage.lora.extract import extract_lora
from diffusers_qwenimage.lora.merge import merge_loras
from diffusers_qwenimage.lora.predict import Prediction, predict
from diffusers_qwenimage.lora.read import LoraFile, listing, parse_header_only, parse_lora
from diffusers_qwenimage.lora.report import report, report_lines
from diffusers_qwenimage.lora.resize import RankRule, Resized, resize_lora, summary
from diffusers_qwenimage.lora.sources import RemoteLora, parse_source, read_remote_header

WORDS = {
    "exact": "loads exactly",
    "strength": "wrong strength",
    "partly": "loads partly",
    "nothing": "silently nothing",
    "error": "error",
    "unrecognised": "not recognised",
}


def inspect(arguments: argparse.Namespace) -> int:
    """Say what a file holds and what each program will do with it."""
    file = _open(arguments.input)
    facts = report(file)
    predictions = predict(file, CONSUMERS) if not file.problems else []
    data = {**facts.as_json(), "consumers": [asdict(prediction) for prediction in predictions]}
    write_result(arguments, data, [*report_lines(facts), *_prediction_lines(predictions)])
    return EXIT_REFUSED if file.problems else EXIT_DONE


def merge(arguments: argparse.Namespace) -> int:
    """Merge files and print the proof."""
    pairs = [_weighted(text) for text in arguments.inputs]
    with progress_bar("merge and verify", 2 * sum(num_bytes(path) for path, _ in pairs)) as progress:
        conversion = merge_loras(pairs, arguments.output, arguments.to, progress=progress)
    data = {**_written(conversion), "sources": [{"path": path, "weight": weight} for path, weight in pairs]}
    lines = [
        f"{arguments.output}: {len(pairs)} {'file' if len(pairs) == 1 else 'files'} merged",
        *_written_lines(conversion),
    ]
    write_result(arguments, data, lines)
    return EXIT_DONE


def resize(arguments: argparse.Namespace) -> int:
    """Resize a file and print the errors."""
    with progress_bar("resize", num_bytes(arguments.input)) as progress:
        resized = resize_lora(
            arguments.input,
            arguments.output,
            _rule(arguments),
            to=arguments.to,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            progress=progress,
        )
    lines = [f"{arguments.output}: resized", *summary(resized), *_written_lines(resized.conversion)]
    write_result(arguments, _resized(resized), lines)
    return EXIT_DONE


def extract(arguments: argparse.Namespace) -> int:
    """Extract a LoRA and print the errors."""
    total = sum(file.stat().st_size for file in weight_files(arguments.tuned))
    with progress_bar("extract", total) as progress:
        extracted = extract_lora(
            arguments.base,
            arguments.tuned,
            arguments.output,
            _rule(arguments),
            to=arguments.to,
            dtype=getattr(torch, arguments.dtype),
            drop_others=arguments.drop_others,
            progress=progress,
        )
    data = {
        **_resized(extracted),
        "num_unchanged": extracted.num_unchanged,
        "left_out": list(extracted.left_out),
    }
    lines = [
        f"{arguments.output}: {len(extracted.modules)} modules extracted, {extracted.num_unchanged} "
        "parameters did not change",
        *_left_out(extracted.left_out),
        *summary(extracted),
        *_written_lines(extracted.conversion),
    ]
    write_result(arguments, data, lines)
    return EXIT_DONE


def bake(arguments: argparse.Namespace) -> int:
    """Bake LoRAs into a checkpoint."""
    pairs = [_weighted(text) for text in arguments.inputs]
    total = sum(file.stat().st_size for file in weight_files(arguments.checkpoint))
    with progress_bar("bake", total) as progress:
        baked = bake_loras(arguments.checkpoint, pairs, arguments.output, progress=progress)
    line = (
        f"{arguments.output}: {baked.num_changed} of {baked.num_tensors} parameters changed, "
        f"{baked.num_bytes / 2**20:.1f} MiB; rounding to the checkpoint's type is "
        f"{baked.relative_rounding:.2e} of the change"
    )
    write_result(arguments, asdict(baked), [line])
    return EXIT_DONE


def doctor(arguments: argparse.Namespace) -> int:
    """Report damage, and repair it if there is an output."""
    if arguments.output is None:
        diagnosis = diagnose(arguments.input, drop_unknown=arguments.drop_unknown)
        findings = [asdict(finding) for finding in diagnosis.findings]
        lines = [
            f"{'can be repaired' if finding.repaired else 'cannot be repaired'}: {finding.text}"
            for finding in diagnosis.findings
        ]
        write_result(arguments, {"findings": findings}, lines or ["no known damage"])
        return EXIT_DONE if diagnosis.healthy else EXIT_REFUSED if diagnosis.hopeless else EXIT_DIFFERS
    with progress_bar("repair and verify", 2 * num_bytes(arguments.input)) as progress:
        repair = repair_lora(
            arguments.input,
            arguments.output,
            arguments.to,
            drop_unknown=arguments.drop_unknown,
            progress=progress,
        )
    data = {
        "findings": [asdict(finding) for finding in repair.diagnosis.findings],
        **(_written(repair.conversion) if repair.conversion else {}),
    }
    if repair.conversion is None:
        lines = ["no known damage; nothing was written"]
    else:
        lines = [
            *(f"repaired: {finding.text}" for finding in repair.diagnosis.findings),
            f"{arguments.output}: {repair.target}",
            *_written_lines(repair.conversion),
        ]
    write_result(arguments, data, lines)
    return EXIT_DONE


def _open(source: str) -> LoraFile:
    place = parse_source(source)
    if not isinstance(place, RemoteLora):
        return parse_lora(place)
    path, header = read_remote_header(place)
    return parse_header_only(header, name=f"{place.hub}:{place.model_id}/{path}")


def _prediction_lines(predictions: Sequence[Prediction]) -> list[str]:
    if not predictions:
        return []
    width = max(len(prediction.consumer) for prediction in predictions)
    lines = ["programs (* predicted from their source, not run)"]
    for prediction in predictions:
        mark = " " if prediction.evidence == "ran" else "*"
        text = WORDS[prediction.verdict]
        if prediction.verdict != "exact":
            text += f": {prediction.detail}"
        if prediction.target:
            text += f" -> convert --to {prediction.target}"
        lines.append(f"  {prediction.consumer:<{width}}{mark} {text}")
    return lines


def _weighted(text: str) -> tuple[str, float]:
    """A path, perhaps with "=WEIGHT"; a path that has a "=" itself needs a weight."""
    path, equals, number = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:
        if Path(text).exists():
            return text, 1.0
        raise ValueError(f"{number!r} in {text!r} is not a number; write FILE=0.8.") from None


def _left_out(names: Sequence[str]) -> list[str]:
    return [f"left out, as asked: {listing(tuple(names))}"] if names else []


def _rule(arguments: argparse.Namespace) -> RankRule:
    return RankRule(rank=arguments.rank, energy=arguments.energy, threshold=arguments.threshold)


def _written(conversion: Conversion) -> dict[str, object]:
    bound = conversion.comparison.bound
    return {
        "target": conversion.target,
        "num_bytes": conversion.num_bytes,
        "exact": conversion.comparison.exact,
        "bound": bound,
        "summary": conversion.comparison.summary(),
        "notes": list(conversion.notes),
    }


def _written_lines(conversion: Conversion) -> list[str]:
    return [
        f"{conversion.target}, {conversion.num_bytes / 2**20:.1f} MiB; {conversion.comparison.summary()}",
        *(f"note: {note}" for note in conversion.notes),
    ]


def _resized(resized: Resized) -> dict[str, object]:
    modules = [{**asdict(module), "relative_error": module.relative_error} for module in resized.modules]
    return {**_written(resized.conversion), "relative_error": resized.relative_error, "modules": modules}
