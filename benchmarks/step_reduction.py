"""What fewer forwards cost in quality on the embedded checkpoint: caches, guidance interval, fewer steps.

    python benchmarks/step_reduction.py [--number 200] [--steps 20] [--arms WORD ...] [--results FILE]

Every arm draws the same captions from the same noise as the exact run. Reported: how many pictures are right
(examples/tiny/evaluate.py), PSNR to the pictures of the exact run (mean over the pictures), and the forwards
of a picture. A cache is worth having if it is nearer to the exact run than as many forwards without it.
A cache decides for a whole batch at once. On a GPU the steps are CUDA graphs where nothing hooks into them.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from judging import Judges, Pictures, arguments, psnr
from results import record

from diffusers_qwenimage import QwenImagePipeline
from diffusers_qwenimage.graphs import graphs_of
from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.step_cache import ForecastCache

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny"))
from evaluate import draw, held_out_requests  # noqa: E402

CFG = 4.0


def main() -> None:
    """Draw with every arm and record it."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of the exact run (20)")
    parser.add_argument("--arms", nargs="+", help="only arms with one of these words in their name")
    args = parser.parse_args()
    requests = held_out_requests(args.number, seed=1)
    judges = Judges(requests)
    pipe = QwenImagePipeline.from_pretrained(str(args.model)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    graphs_of(pipe.transformer).mode = "on"
    exact: Pictures | None = None
    for name, arm in arms_of(args.steps).items():
        if exact is not None and args.arms and not any(word in name for word in args.arms):
            continue
        start = time.perf_counter()
        pictures, forwards = run(pipe, arm, [r.caption.text for r in requests], args.batch)
        print(f"    drawn in {time.perf_counter() - start:.1f} s", flush=True)
        exact = pictures if exact is None else exact
        case = f"{len(requests)} captions, {name}"
        record("step_reduction", f"{case}: right", judges.percent_right(pictures), "%", path=args.results)
        record("step_reduction", f"{case}: forwards of a picture", forwards, "", path=args.results)
        if pictures is not exact:
            record("step_reduction", f"{case}: PSNR to exact", psnr(pictures, exact), "dB", path=args.results)
    judges.stop()


class Arm:
    """One way of drawing: what it sets on the pipeline, and the arguments of its calls."""

    def __init__(
        self, steps: int, set_up: Callable[[Any], None] = lambda pipe: None, **arguments: Any
    ) -> None:
        self.steps = steps
        self.set_up = set_up
        self.arguments = arguments


def arms_of(steps: int) -> dict[str, Arm]:
    """All arms by name; the exact run first."""
    arms = {f"exact, {steps} steps": Arm(steps)}
    for share in (0.75, 0.6, 0.5, 0.4):
        fewer = round(share * steps)
        arms[f"{fewer} steps"] = Arm(fewer)
    for end in (0.8, 0.6, 0.4):
        arms[f"guidance to {end:g} of the steps"] = Arm(steps, cfg_end=end)
    for start, end in ((0.1, 1.0), (0.1, 0.8)):
        arms[f"guidance from {start:g} to {end:g} of the steps"] = Arm(steps, cfg_start=start, cfg_end=end)
    for order in (0, 1, 2):
        for threshold in (0.02, 0.05, 0.1, 0.2):
            cache = ForecastCache(order=order, threshold=threshold)
            name = f"forecast of order {order}, threshold {threshold:g}"
            arms[name] = Arm(steps, partial(forecast, cache=cache))
    for threshold in (0.02, 0.05, 0.1, 0.2):
        arms[f"first-block cache, threshold {threshold:g}"] = Arm(
            steps, partial(first_block, threshold=threshold)
        )
    cache = ForecastCache(order=1, threshold=0.05)
    arms["forecast of order 1, threshold 0.05, guidance to 0.8"] = Arm(
        steps, partial(forecast, cache=cache), cfg_end=0.8
    )
    return arms


def forecast(pipe: Any, *, cache: ForecastCache) -> None:
    """The package's cache."""
    pipe.enable_step_cache(cache)


def first_block(pipe: Any, *, threshold: float) -> None:
    """diffusers' cache."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))


def run(pipe: Any, arm: Arm, captions: list[str], batch: int) -> tuple[Pictures, float]:
    """Pictures of an arm, and the forwards that each took."""
    arm.set_up(pipe)
    try:
        with counting(pipe.transformer) as count:
            pictures = draw(
                partial(pipe, **arm.arguments), captions, steps=arm.steps, cfg=CFG, seed=0, batch=batch
            )
    finally:
        pipe.disable_step_cache()
        if pipe.transformer.is_cache_enabled:
            pipe.transformer.disable_cache()
    return pictures, count() / len(captions)


@contextmanager
def counting(transformer: Any) -> Iterator[Callable[[], int]]:
    """Counts the samples of all forwards: in the graphs, or, with a first-block cache, in the second but last
    block, so that what the cache leaves out is not counted."""
    graphs, counted = graphs_of(transformer), 0
    before = graphs.num_samples
    if not transformer.is_cache_enabled:
        yield lambda: graphs.num_samples - before
        return

    def count(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal counted
        counted += kwargs["hidden_states"].shape[0]

    handle = transformer.transformer_blocks[-2].attn.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with use_backend("off"):  # the fused path does not call the module that counts
            yield lambda: counted
    finally:
        handle.remove()


if __name__ == "__main__":
    main()
