"Install graftlab: everything it says comes from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
spdx = {'apache2': 'Apache-2.0'}[cfg['license']]
status = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}[cfg['status']]
readme = here/'README.md'

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], license_expression=spdx, license_files=['LICENSE'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    classifiers=[f'Development Status :: {status}', f'Intended Audience :: {cfg["audience"]}', f'Natural Language :: {cfg["language"]}',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=['graftlab', 'graftlab.*']), include_package_data=True, zip_safe=False,
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    entry_points={'console_scripts': cfg['console_scripts'].split('\n'), 'lmms_eval.models': cfg['lmms_models'].split('\n'), 'nbdev': [f'{cfg["lib_name"]}={cfg["lib_path"]}._modidx:d']},
)
