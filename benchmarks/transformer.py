"""The transformer at its true size (60 blocks, random weights) beside diffusers' own, over the same weights.

    python benchmarks/transformer.py [--blocks 60] [--device cuda] [--results FILE] [--cases ...]

"ours" is the fused path where the machine has an NVIDIA GPU. "plain path" is the same class without it,
bit-equal to diffusers. Times are medians after warm-up, all arms in turn (A B C C B A) in one process.
Checks the errors of both against fp32. Needs 52 GiB of device memory for 60 blocks, 66 GiB with `--cases
peers`: the other programs that compute this transformer (transformer_peers.py), which take a minute more.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from arms import GIB, Arms, Note, compare, relative
from results import RESULTS, record
from torch import Tensor
from transformer_model import (
    TEXT_TOKENS,
    build,
    guidance_inputs,
    inputs_of,
    plain,
    profile,
    recorded,
    with_table,
)
from transformer_peers import EAGER, PEERS, Peers, compare_peers, compare_step_caches
from transformer_variants import KINDS, compare_lora, compare_quantized, measure_launch, measure_modulation

from diffusers_qwenimage import fused
from diffusers_qwenimage.kernels import backend, set_backend, use_backend

CASES = (
    "error",
    "forward",
    "guidance",
    "table",
    "batch",
    "streams",
    "graph",
    "profile",
    "lora",
    "modulation",
    "launch",
    "quantized",
    "peers",
    "step-cache",
)
BY_DEFAULT = tuple(case for case in CASES if case not in ("peers", "step-cache"))  # these compile for minutes


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1328, 1024, 512], help="sides of the picture"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=BY_DEFAULT, help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs on each side of A B B A")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of 8 bits (all)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="of case peers (all)")
    parser.add_argument("--steps", type=int, default=20, help="steps of case step-cache (20)")
    parser.add_argument("--heads", type=int, default=24, help="heads of 128 dimensions (24)")
    parser.add_argument("--profile", type=Path, help="file for the kernels of one forward")
    args = parser.parse_args()
    set_backend("auto")
    chosen = backend(torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device))
    print(f"fused path: {chosen.name} ({chosen.reason})")

    def note(case: str, value: float, unit: str, peak: float | None = None) -> None:
        record("transformer", case, value, unit, peak_memory_gib=peak, path=args.results)

    def wants(case: str) -> bool:
        return case in args.cases

    large, small = max(args.sizes), min(args.sizes)
    if wants("error"):
        measure_error(args.device, note, blocks=min(args.blocks, 6), heads=args.heads, side=min(small, 512))
    ours, stock = build(args.blocks, args.device, args.heads)
    weights = sum(p.numel() * p.element_size() for p in ours.parameters()) / GIB
    note("weights, bf16", weights, "GiB")
    for side in args.sizes:
        if wants("forward"):
            compare_forward(ours, stock, side, args.repeats, note)
        if wants("table"):
            compare_table(ours, side, args.repeats, note)
    if wants("profile") and args.profile:
        profile(ours, large, args.profile)
    if wants("batch"):
        compare_unequal_batch(ours, stock, large, args.repeats, note)
    for side in args.sizes:
        if wants("guidance"):
            compare_guidance(ours, stock, side, args.repeats, note)
        if wants("streams"):
            compare_streams(ours, side, args.repeats, note)
        if wants("launch"):
            measure_launch(ours, side, note)
    if wants("graph"):
        compare_graph(ours, small, args.repeats, note)
    if wants("lora"):
        compare_lora(ours, large, args.repeats, note)
    if wants("peers"):
        for side in args.sizes:
            compare_peers(ours, side, args.repeats, note, args.peers)
    if wants("quantized"):
        for kind in args.kinds:
            compare_quantized(ours, kind, args.sizes, args.repeats, note, args.profile)
    if wants("step-cache"):
        compare_step_caches(ours, small, args.steps, args.repeats, note)
    del stock  # it shares the weights: while it lives, offloading ours frees nothing
    if wants("modulation"):
        measure_modulation(ours, large, note)


@torch.no_grad()
def measure_error(device: str, note: Note, *, blocks: int, heads: int, side: int) -> None:
    """Distance to the same model in fp32, for diffusers, our plain path and our fused path in bf16."""
    ours, stock = build(blocks, device, heads)
    peers = dict(Peers(ours).forwards(EAGER[1:]))
    for case, inputs in (("forward", inputs_of(ours, side)), ("packed", guidance_inputs(ours, side)[0])):
        results = {"fused path": ours(**inputs)[0]}
        with use_backend("off"):
            results["plain path"] = ours(**inputs)[0]
            if case == "forward":
                results["diffusers"] = stock(**inputs)[0]
                results |= {name: forward(**inputs)[0] for name, forward in peers.items()}
            wide = {key: _float(value) for key, value in inputs.items()}
            exact = ours.float()(**wide)[0]
            ours.to(torch.bfloat16)
        for name, result in results.items():
            label = f"{blocks} blocks, {side}x{side} {case}, relative error against fp32, {name}"
            note(label, relative(result, exact), "")


@torch.no_grad()
def compare_forward(
    ours: torch.nn.Module,
    stock: torch.nn.Module,
    side: int,
    repeats: int,
    note: Note,
    *,
    with_plain: bool = True,
) -> None:
    """One forward of one picture."""
    one = inputs_of(ours, side)
    tabulated = with_table(ours, one)
    expected, got = stock(**one)[0], tabulated()[0]
    note(f"{side}x{side} forward, ours against diffusers, relative difference", relative(got, expected), "")
    arms: Arms = {
        "diffusers": lambda: stock(**one),
        "ours": lambda: ours(**one),
        "ours, modulation tabulated": tabulated,
    }
    if with_plain:
        with use_backend("off"):
            equal = torch.equal(expected, ours(**one)[0])
        note(f"{side}x{side} forward, plain path bit-equal to diffusers (1 = yes)", float(equal), "")
        arms["ours, plain path"] = plain(ours, one)
    compare(arms, repeats, note, f"{side}x{side} forward")


@torch.no_grad()
def compare_guidance(
    ours: torch.nn.Module,
    stock: torch.nn.Module,
    side: int,
    repeats: int,
    note: Note,
    *,
    with_plain: bool = True,
) -> None:
    """One step with guidance: diffusers' two forwards against one packed pass."""
    one = inputs_of(ours, side)
    packed, second = guidance_inputs(ours, side)

    def separate() -> Tensor:
        return torch.cat([stock(**one)[0], stock(**second)[0]])

    tabulated = with_table(ours, packed)
    difference = relative(tabulated()[0], separate())
    note(
        f"{side}x{side} packed guidance against diffusers' two forwards, relative difference", difference, ""
    )
    arms = {
        "diffusers (two forwards)": separate,
        "ours (packed, modulation tabulated)": tabulated,
    }
    if with_plain:
        arms["ours, plain path (packed)"] = plain(ours, packed)
    compare(arms, repeats, note, f"{side}x{side} step with guidance")


@torch.no_grad()
def compare_table(ours: torch.nn.Module, side: int, repeats: int, note: Note) -> None:
    """The forward with the modulation computed in it, and with it tabulated for the schedule."""
    one = inputs_of(ours, side)
    arms = {"computed": lambda: ours(**one), "tabulated": with_table(ours, one)}
    compare(arms, repeats, note, f"{side}x{side} forward, ours, modulation")


@torch.no_grad()
def compare_unequal_batch(
    ours: torch.nn.Module, stock: torch.nn.Module, side: int, repeats: int, note: Note
) -> None:
    """Two prompts of 128 and 40 tokens: diffusers pads and masks, ours packs."""
    padded = inputs_of(ours, side, batch=2)
    mask = torch.ones(2, TEXT_TOKENS, device=ours.device, dtype=torch.long)
    mask[1, 40:] = 0
    text = padded["encoder_hidden_states"]
    packed = {**padded, "encoder_hidden_states": [text[0], text[1, :40]]}  # type: ignore[index]
    masked = {**padded, "encoder_hidden_states_mask": mask}
    difference = relative(ours(**packed)[0], stock(**masked)[0])
    note(f"{side}x{side} unequal prompts, packed against masked, relative difference", difference, "")
    arms = {"diffusers (mask)": lambda: stock(**masked), "ours (packed)": with_table(ours, packed)}
    compare(arms, repeats, note, f"{side}x{side} batch of 2 unequal prompts")


@torch.no_grad()
def compare_streams(ours: torch.nn.Module, side: int, repeats: int, note: Note) -> None:
    """The text stream and the next block's modulation beside the image stream, and one after the other."""
    for case, inputs in (
        ("forward", inputs_of(ours, side)),
        ("step with guidance", guidance_inputs(ours, side)[0]),
    ):

        def one_stream(inputs: dict[str, object] = inputs) -> None:
            fused.text_beside_image = False
            ours(**inputs)
            fused.text_beside_image = True

        arms: Arms = {"side streams": lambda x=inputs: ours(**x), "one stream": one_stream}
        compare(arms, repeats, note, f"{side}x{side} {case}, ours")


@torch.no_grad()
def compare_graph(ours: torch.nn.Module, side: int, repeats: int, note: Note) -> None:
    """Replays of a CUDA graph against launching every kernel."""
    for case, inputs in (
        ("forward", inputs_of(ours, side)),
        ("step with guidance", guidance_inputs(ours, side)[0]),
    ):
        recording = recorded(partial(ours, **inputs))
        if recording is None:
            return
        graph, (got,) = recording
        graph.replay()
        equal = torch.equal(got, ours(**inputs)[0])
        note(f"{side}x{side} {case}, graph equal (1 = yes)", float(equal), "")
        arms: Arms = {"launched": lambda x=inputs: ours(**x), "CUDA graph": graph.replay}
        compare(arms, repeats, note, f"{side}x{side} {case}, ours")


def _float(value: object) -> object:
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, list) and isinstance(value[0], Tensor):
        return [item.float() for item in value]
    return value


if __name__ == "__main__":
    main()
