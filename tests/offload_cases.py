"""What the tests of streaming share: tiny models with inputs, and a lane that copies as late as it may."""

import contextlib
import importlib
import threading

import components
import diffusers
import model_files
import torch

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.checkpoint import empty_module, read_component
from diffusers_qwenimage.offload import plan_stream, state

NUM_BLOCKS = 5
BUDGETS = (0.0, 0.1, 0.35, 0.7, 1.0)  # from the smallest to everything


def transformer(dtype=torch.float32, *, seed=0, **config):
    """Our tiny transformer."""
    torch.manual_seed(seed)
    settings = {**components.TRANSFORMER, "num_layers": NUM_BLOCKS, **config}
    return QwenImageTransformer2DModel(**settings).to(dtype).eval().requires_grad_(False)


def transformer_inputs(dtype=torch.float32, batch=2, lengths=None):
    inputs = components.transformer_inputs([(1, 4, 6)], batch)
    if lengths is not None:
        inputs["encoder_hidden_states"] = [components.random(n, components.WIDTH, seed=n) for n in lengths]
    return {key: _cast(value, dtype) for key, value in inputs.items()}


def stock_transformer(dtype=torch.float32):
    torch.manual_seed(0)
    settings = {**components.TRANSFORMER, "num_layers": NUM_BLOCKS}
    return diffusers.QwenImageTransformer2DModel(**settings).to(dtype).eval()


def text_encoder(dtype=torch.float32):
    torch.manual_seed(0)
    return model_files.tiny_text_encoder(500).to(dtype).eval()


def text_inputs():
    ids = torch.randint(1, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def run(model, inputs):
    """What the model computes: one tensor."""
    output = model(**inputs)
    return (output.sample if hasattr(output, "sample") else output.logits).clone()


def limit_of(model, share, *, split=False, **settings):
    """A budget between the smallest (0; `split`: for parts of blocks) and that of everything (1)."""
    whole = plan_stream(model, None, device="cpu", split=split, **settings)
    return int(whole.smallest_bytes + share * (whole.resident_bytes - whole.smallest_bytes))


def empty(folder, dtype=torch.float32):
    """A transformer on meta as its files say, and their weights."""
    config, weights = read_component(folder, "transformer")
    model = empty_module(lambda: QwenImageTransformer2DModel.from_config(config))
    return model.to(dtype).eval().requires_grad_(False), weights


class FailsAt:
    """A function that fails when it is called for the `number`th time."""

    def __init__(self, function, number, error):
        self.function, self.left, self.error = function, number, error
        self.failed = False

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.failed = True
            raise self.error
        return self.function(*args, **kwargs)

    def __get__(self, instance, owner):
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


def inject(patch, target, number, error):
    """Let the `number`th call of what `target` names fail."""
    path, _, name = target.rpartition(".")
    owner = _resolve(path)
    fails = FailsAt(getattr(owner, name), number, error)
    patch.setattr(owner, name, fails)
    return fails


def _resolve(path):
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(_resolve(module), name)


class LateLane:
    """A device that copies as late as it may: when somebody waits. Until then the target holds no numbers.

    It checks that no tensor of the model lies where something is copied to.
    """

    model = None

    def __init__(self, device):
        self._queue = []
        self._lock = threading.Lock()  # a thread that reads files waits for copies too

    def mark(self):
        return {"copies": 0}

    def copy(self, target, source, *, after, done):
        start, end = target.data_ptr(), target.data_ptr() + target.numel()
        for name, tensor in self.model.named_parameters():
            assert not start <= tensor.data_ptr() < end, f"{name} is in use"
        target.fill_(255)  # all bits: not a number in every floating-point type
        with self._lock:
            self._queue.append((target, source))
            for mark in done:
                mark["copies"] = len(self._queue)

    def reach(self, mark):
        pass

    def wait(self, mark):
        with self._lock:
            for index in range(mark["copies"]):
                if self._queue[index] is not None:
                    target, source = self._queue[index]
                    target.copy_(source)
                    self._queue[index] = None

    def host_wait(self, mark):
        self.wait(mark)

    def drain(self):
        self.wait({"copies": len(self._queue)})


@contextlib.contextmanager
def late_lane(monkeypatch, model):
    """Stream through a `LateLane`."""
    with monkeypatch.context() as patch:
        patch.setattr(state, "lane_to", LateLane)
        patch.setattr(LateLane, "model", model)
        yield


def _cast(value, dtype):
    if isinstance(value, list) and torch.is_tensor(value[0]):
        return [item.to(dtype) for item in value]
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
