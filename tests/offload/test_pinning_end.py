"""A process may end while weights are being pinned."""

import subprocess
import sys
import time
from pathlib import Path

from offload_cases import transformer

TESTS = Path(__file__).parents[1]
CODE = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from offload_cases import empty, limit_of, run, transformer_inputs
from diffusers_qwenimage.offload import Pinner, adopt, pinning

def slow(*args):
    time.sleep(2)
    return copy(*args)

copy, pinning._pinned_copy = pinning._pinned_copy, slow
model, weights = empty(sys.argv[2])
adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.0), pinner=Pinner())
run(model, transformer_inputs())
run(model, transformer_inputs())
print([thread.name for thread in threading.enumerate()])
print(time.time())
"""


def test_a_process_ends_when_the_block_at_work_is_done(tmp_path):
    transformer().save_pretrained(tmp_path)
    command = [sys.executable, "-c", CODE, str(TESTS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    threads, ended = done.stdout.splitlines()[-2:]
    assert "pinning" in threads
    # Not the half minute that all parts of all blocks would take; with the end of the interpreter itself.
    assert time.time() - float(ended) < 15
