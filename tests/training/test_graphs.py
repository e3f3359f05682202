"""Steps as CUDA graphs on a GPU: the same course as launched steps, whatever the captions' lengths."""

import pytest
from training_data import config

from diffusers_qwenimage.training import learner as module
from diffusers_qwenimage.training.logs import read_log
from diffusers_qwenimage.training.trainer import train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": "selective", "batch_size": 2},
        {"dtype": "float32", "batch_size": 2},  # blocks take the plain path
    ],
)
def test_recorded_steps_take_the_course_of_launched_ones_and_resume(workplace, monkeypatch, changes):
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
    recorded = read_log(workplace / "recorded" / "log.csv")
    assert len(made) == 1 and made[0].number >= 2 and not made[0].given_up
    train(config(output_path="launched", cuda_graphs=False, **settings))
    assert_same_course(recorded, read_log(workplace / "launched" / "log.csv"))
    (workplace / "recorded" / "step-24.state").rename(workplace / "gone")
    train(config(output_path="recorded", resume_from="latest", **settings))
    assert_same_course(recorded, read_log(workplace / "recorded" / "log.csv"))


def assert_same_course(ones, twos):
    for one, two in zip(ones, twos, strict=True):
        # the same kernels; sums of attention's gradients are not always in one order
        assert one.loss == pytest.approx(two.loss, rel=2e-3), one.step
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=5e-2), one.step
