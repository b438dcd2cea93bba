"""Copy what a demo run measured, without weights and pictures: keep_run.py RUN DESTINATION"""
import shutil
import sys
from pathlib import Path

FILES = ('run.json', 'plan.json', 'trajectory.json', 'models.json', 'phases.json', 'scores.json')

if __name__ == '__main__':
    run, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES: shutil.copyfile(run/name, out/name)
    for lines in run.glob('stage*/metrics.jsonl'):
        (out/lines.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(lines, out/lines.parent.name/lines.name)
