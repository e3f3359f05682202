"""Loading in place: host memory never holds a second copy of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_files import write_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
WIDTH = {"attention_head_dim": 128, "num_attention_heads": 8, "axes_dims_rope": (16, 56, 56)}
BLOCKS = 4
BLOCK = 2 * 24 * 1024**2  # bytes of one in bf16, without its modulation
MB = 10**6
CODE = """
import json, sys, threading
from diffusers_qwenimage import QwenImagePipeline

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

before, peak, ended = anonymous(), [0], threading.Event()

def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
weights = None if sys.argv[2] == "bf16" else sys.argv[2]
pipe = QwenImagePipeline.from_pretrained(sys.argv[1], vram_limit=0, device="cpu", weights=weights)
unpinned = pipe.memory_report().components[0].unpinned
pipe.finish_pinning()
ended.set()
thread.join()
report = pipe.memory_report().components[0]
placed = report.resident + report.streamed
sizes = {"placed": placed, "on_call": report.on_call, "unpinned": unpinned}
print(json.dumps({"peak": peak[0] - before, **sizes}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, num_layers=BLOCKS, **WIDTH)


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_peak_of_host_memory(weights: str, folder: Path) -> None:
    command = [sys.executable, "-c", CODE, str(folder), weights]
    # glibc gives back at once what is freed; it would keep some of it, more or less by the timing of threads.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["placed"] > BLOCKS * BLOCK * (0.95 if weights == "bf16" else 0.45)
    # The modulation stays in the mapped file.
    assert got["on_call"] >= BLOCKS * BLOCK / 2
    assert (got["unpinned"] > 0) == (weights == "bf16")  # what is quantised has no place in the file
    # What is placed, what is on its way (of fp8: a layer, a few times, in fp32), and allocators' pieces; on a
    # CPU as the "device" all of it is host memory.
    assert got["peak"] < got["placed"] + 1.5 * BLOCK + 60 * MB
