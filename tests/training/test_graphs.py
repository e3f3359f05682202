"""Steps as CUDA graphs on a GPU: the same course as launched steps, whatever the captions' lengths."""

import pytest
from training_data import config

from diffusers_qwenimage.training import trainer as module
from diffusers_qwenimage.training.logs import read_log
from diffusers_qwenimage.training.trainer import train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": "selective", "batch_size": 2}])
def test_recorded_steps_take_the_course_of_launched_ones(workplace, monkeypatch, changes):
    (workplace / "data" / "metadata.csv").write_text(
        "image,prompt\n0.png,one\n1.png,two dots\n2.png,three\n3.png,four dots here\n", encoding="utf-8"
    )
    made = []
    graphs = module.StepGraphs

    def make(**arguments):
        made.append(graphs(**arguments))
        return made[-1]

    monkeypatch.setattr(module, "StepGraphs", make)
    settings = {"dtype": "bfloat16", "max_steps": 24, "save_steps": 12, "learning_rate": 1e-3, **changes}
    train(config(output_path="recorded", **settings))
    train(config(output_path="launched", cuda_graphs=False, **settings))
    assert len(made) == 1 and made[0].number >= 2 and not made[0].given_up
    logs = [read_log(workplace / folder / "log.csv") for folder in ("recorded", "launched")]
    for one, two in zip(*logs, strict=True):
        # the same kernels; sums of attention's gradients are not always in one order
        assert one.loss == pytest.approx(two.loss, rel=2e-3), one.step
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=5e-2), one.step


def test_resumes_from_a_recorded_run(workplace):
    settings = {"dtype": "bfloat16", "max_steps": 12, "save_steps": 6, "learning_rate": 1e-3}
    train(config(output_path="out", **settings))
    first = read_log(workplace / "out" / "log.csv")
    (workplace / "out" / "step-12.state").rename(workplace / "gone")
    train(config(output_path="out", resume_from="latest", **settings))
    for one, two in zip(first, read_log(workplace / "out" / "log.csv"), strict=True):
        assert one.loss == pytest.approx(two.loss, rel=2e-3), one.step
