"""The main job in the other precision; a file of its own, so that it runs beside the rest"""
import dataclasses

from graftlab.demo import demo
from graftlab.demo_plan import QUICK
from test_demo import PHASES, losses, read


def test_bf16(tmp_path):
    "The other precision, whatever this machine would choose; a step of each phase, since processors that only emulate it take half a minute for one"
    small = dataclasses.replace(QUICK, samples=8, texts=4, max_tokens=16, teach_batch=1, teach_steps=1, teach_early_steps=1, refresh=False, adapter_steps=1, steps=1, early_steps=1, host_steps=1,
                                batch_size=1, pictures=4, questions=1)
    demo(tmp_path/'run', 3, plan=small, precision='bf16', progress=False)
    assert read(tmp_path/'run', 'plan.json')['precision']=='bf16' and read(tmp_path/'run', 'run.json')['finished']
    assert set(losses(tmp_path/'run'))==PHASES
