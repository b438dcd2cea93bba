"The project itself: metadata, commands that README names, size and style of modules, the tools that make docs/"
import ast, importlib.metadata, json, re, shlex, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import nbformat
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted((ROOT/'graftlab').glob('*.py'))
README = (ROOT/'README.md').read_text(encoding='utf-8')

def settings():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def run(*args, cwd=ROOT): return subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True)

def code_cells(path): return [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code']

def tracked():
    "Files of the project: those under version control, or all that a build leaves alone"
    names = run('git', 'ls-files', '--cached', '--others', '--exclude-standard').stdout.split('\n')
    return [ROOT/n for n in names if n and (ROOT/n).is_file()]

# Metadata

def test_settings_are_the_one_source():
    cfg,meta = settings(),importlib.metadata.metadata('graftlab')
    assert meta['Name'] == cfg['lib_name'] and meta['Summary'] == cfg['description']
    assert meta['Version'] == cfg['version'] and meta['Requires-Python'] == f'>={cfg["min_python"]}'
    extras = {k.removesuffix('_requirements') for k in cfg if k.endswith('_requirements')}
    assert set(meta.get_all('Provides-Extra')) == extras and 'dev' in extras

def test_version_is_the_same_everywhere():
    import graftlab
    assert graftlab.__version__ == settings()['version']
    assert f'version: {settings()["version"]}\n' in (ROOT/'CITATION.cff').read_text()

def test_licence():
    text = (ROOT/'LICENSE').read_text()
    assert 'Apache License' in text and 'Version 2.0, January 2004' in text and 'END OF TERMS AND CONDITIONS' in text
    assert settings()['license'] == 'apache2' and importlib.metadata.metadata('graftlab')['License-Expression'] == 'Apache-2.0'
    assert 'license: Apache-2.0\n' in (ROOT/'CITATION.cff').read_text()

def test_constraints_pin_what_settings_ask_for():
    lines = (ROOT/'constraints.txt').read_text().split()
    pins = {}
    for line in lines:
        name,_,version = line.partition('==')
        assert version, f'constraints.txt: {line!r} is not pinned with =='
        pins[name.lower().replace('_', '-')] = version
    cfg = settings()
    for key in ('requirements', 'dev_requirements', 'site_requirements'):
        for req in map(Requirement, cfg[key].split()):
            pin = pins.get(req.name.lower().replace('_', '-'))
            assert pin and req.specifier.contains(pin), f'settings.ini asks for {req}, constraints.txt has {pin}'

def test_wheel_holds_the_package_and_its_licence(tmp_path):
    for f in ('setup.py', 'settings.ini', 'MANIFEST.in', 'LICENSE', 'README.md'): shutil.copy(ROOT/f, tmp_path)
    shutil.copytree(ROOT/'graftlab', tmp_path/'graftlab', ignore=shutil.ignore_patterns('__pycache__'))
    out = run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--use-pep517', '-q', '-w', tmp_path/'out', '.', cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    wheel, = (tmp_path/'out').glob('graftlab-*.whl')
    import zipfile
    names = zipfile.ZipFile(wheel).namelist()
    assert {f'graftlab/{m.name}' for m in MODULES} <= set(names)
    assert any(n.endswith('licenses/LICENSE') for n in names) and any(n.endswith('entry_points.txt') for n in names)

# The commands that README names

def shell_blocks(): return [re.sub(r' #.*', '', b) for b in re.findall(r'```sh\n(.*?)```', README, re.S)]

def test_make_targets_of_readme_exist():
    targets = {t for shell in shell_blocks() for t in re.findall(r'\bmake ([a-z]+)\b', shell)}
    assert {'demo', 'test'} <= targets
    for t in targets:
        out = run('make', '-n', t)
        assert out.returncode == 0, f'README names `make {t}`: {out.stderr}'

def test_graftlab_commands_of_readme_are_understood():
    from graftlab.cli import make_parser
    lines = [l[l.index('graftlab '):] for block in shell_blocks() for l in block.split('\n') if re.search(r'(^|\s)graftlab ', l)]
    assert {'demo', 'zoo', 'surrogate', 'train', 'graft'} <= {l.split()[1] for l in lines}
    for line in lines:
        args = make_parser().parse_args(shlex.split(line)[1:])
        assert callable(args.function), line

def test_scores_of_readme_are_those_of_the_kept_run():
    kept = json.loads((ROOT/'nbs/experiments/demo/seed0/scores.json').read_text())
    for row in kept['rows']:
        found = [row['scores'][t][m] for t in ('color', 'shape') for m in ('rank', 'exact')]
        cells = [f"{s['accuracy']:.0%} ({100*s['low']:.0f} to {100*s['high']:.0f})".replace('%', ' %') for s in found]
        assert f"| {' | '.join([row['title'], *cells])} |" in README, row['title']

def test_links_and_pictures_of_readme_and_docs_exist():
    for page in [ROOT/'README.md', *(ROOT/'docs').rglob('*.md')]:
        text = re.sub(r'(`{3,}).*?\1', '', page.read_text(encoding='utf-8'), flags=re.S)
        for target in re.findall(r'\]\(([^)#\s]+)(?:#[^)]*)?\)', text) + re.findall(r'<img src="([^"]+)"', text):
            if re.match(r'[a-z]+:', target): continue
            assert (page.parent/target).exists(), f'{page.relative_to(ROOT)} points to {target}, which is not there'

# Notebooks and modules

def test_every_notebook_is_listed_in_docs():
    index = (ROOT/'docs/index.md').read_text(encoding='utf-8')
    for nb in NOTEBOOKS:
        if nb.name == 'index.ipynb': continue
        assert f'({nb.relative_to(ROOT/"nbs").with_suffix(".md").as_posix()})' in index, f'docs/index.md lacks {nb.name}: run make docs'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_title_and_line_and_no_star_import(path):
    head = nbformat.read(path, as_version=4).cells[0].source
    assert re.search(r'^# \S', head, re.M) and re.search(r'^> \S', head, re.M), f'{path.name}: first cell needs "# title" and "> one line"'
    for source in code_cells(path):
        if re.search(r'^#\|\s*export\b', source, re.M): assert not re.search(r'^\s*from \S+ import \*', source, re.M), f'{path.name}: {source}'

def test_experiments_and_benchmarks_export_nothing():
    for path in NOTEBOOKS:
        if path.parent.name in ('experiments', 'bench'):
            assert not any(re.search(r'^#\|\s*(export|default_exp)\b', s, re.M) for s in code_cells(path)), path.name

@pytest.mark.parametrize('path', [m for m in MODULES if m.name not in ('__init__.py', '_modidx.py')], ids=lambda p: p.stem)
def test_module_is_small_and_explicit(path):
    text = path.read_text(encoding='utf-8')
    lines = [l for l in text.splitlines() if l.strip() and not l.strip().startswith('#')]
    assert len(lines) < 300, f'{path.name} has {len(lines)} lines of code'
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom): assert all(a.name != '*' for a in node.names), f'{path.name}:{node.lineno}'
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            n = node.end_lineno-node.lineno+1
            assert n <= 40, f'{path.name}: {node.name} has {n} lines'

def test_no_trace_of_a_machine():
    "No path of anybody's machine and no host of a package registry"
    paths = [f'/{d}/' for d in ('work', 'root', 'Users')] + ['/tmp/' + 'tmp', '/home/' + 'user']
    hosts = ['.'.join(h) for h in (('pypi', 'org'), ('pythonhosted', 'org'), ('npmjs', 'org'), ('deb', 'debian', 'org'))]
    for f in tracked():
        try: text = f.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        if f.suffix == '.ipynb': text = re.sub(r'"image/png": "[^"]*"', '', text)
        for word in paths+hosts: assert word not in text, f'{f.relative_to(ROOT)} holds {word!r}'

def test_weights_are_loaded_from_safetensors_only():
    for f in MODULES:
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if isinstance(node, ast.keyword): assert node.arg != 'trust_remote_code', f'{f.name}:{node.value.lineno}'
            if isinstance(node, ast.Import): assert all(a.name != 'pickle' for a in node.names), f'{f.name}:{node.lineno}'
            if isinstance(node, ast.ImportFrom): assert node.module != 'pickle', f'{f.name}:{node.lineno}'
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute): continue
            name,owner = node.func.attr,getattr(node.func.value, 'id', '')
            assert (owner, name) != ('torch', 'load'), f'{f.name}:{node.lineno}'
            weights = name == 'from_pretrained' and (owner.startswith(('AutoModel', 'Llava')) and 'Config' not in owner)
            if weights: assert any(k.arg == 'gguf_file' or k.arg == 'use_safetensors' and getattr(k.value, 'value', None) is True for k in node.keywords), f'{f.name}:{node.lineno} may load pickled weights'

# The tools

PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='

def small_project(folder):
    "A project of two notebooks with the real tools"
    (folder/'nbs').mkdir(parents=True)
    shutil.copytree(ROOT/'tools', folder/'tools', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'settings.ini', folder)
    md,code = nbformat.v4.new_markdown_cell,nbformat.v4.new_code_cell
    picture = nbformat.v4.new_output('display_data', data={'image/png': PNG, 'text/plain': '<Figure>'})
    write = lambda name,cells: nbformat.write(nbformat.v4.new_notebook(cells=cells), folder/'nbs'/name)
    write('index.ipynb', [md('# little\n\n> A little project'), md('See [add](00_add.ipynb) and `add()`.\n\n## More\n\n<!-- notebooks -->'), code('show()', outputs=[picture])])
    write('00_add.ipynb', [md('# Adding\n\n> One plus one'), code('#| default_exp add'), code('#| hide\nsecret = 1'),
        code('#| export\ndef add(\n    a:int, # One\n    b:int, # Other\n)->int: # Sum\n    "Sum of two"\n    return a+b'),
        code('print(add(1, 1))', outputs=[nbformat.v4.new_output('stream', name='stdout', text='2\n')]),
        code('#| slow\nprint(add(2, 3))'),
        code("#| slow\nprint('seven')\nadd(3, 4);"),
        code('nine = add(4, 5)', outputs=[nbformat.v4.new_output('stream', name='stdout', text='9\n')])])

def test_docs_are_made_from_stored_outputs_and_the_same_every_time(tmp_path):
    small_project(tmp_path)
    files = []
    for _ in range(2):
        out = run(sys.executable, 'tools/docs.py', cwd=tmp_path)
        assert out.returncode == 0, out.stderr
        files.append({p.relative_to(tmp_path): p.read_bytes() for p in [tmp_path/'README.md', *(tmp_path/'docs').rglob('*')] if p.is_file()})
    assert files[0] == files[1]
    page,readme,home = [(tmp_path/f).read_text() for f in ('docs/00_add.md', 'README.md', 'docs/index.md')]
    assert 'secret' not in page and '#|' not in page and '<a id="add"></a>' in page and '```text\n2\n```' in page
    assert '[add](docs/00_add.md)' in readme and '[`add()`](docs/00_add.md#add)' in readme and '| [00 Adding](docs/00_add.md) | One plus one |' in readme
    assert '<img src="docs/index_files/fig_' in readme and '| [00 Adding](00_add.md) | One plus one |' in home
    assert '[`add(a, b)`](00_add.md#add) | Sum of two' in (tmp_path/'docs/api.md').read_text()

def test_remake_runs_slow_cells_and_keeps_their_outputs(tmp_path):
    "Also what a cell prints whose last `;` hides its value; what a cell printed once and prints no more goes"
    small_project(tmp_path)
    nb = tmp_path/'nbs/00_add.ipynb'
    out = run(sys.executable, 'tools/remake.py', nb, cwd=tmp_path)
    assert out.returncode == 0, out.stdout+out.stderr
    texts = [o['text'] for c in json.loads(nb.read_text())['cells'] for o in c.get('outputs', [])]
    assert [''.join(t) for t in texts] == ['2\n', '5\n', 'seven\n']

def test_remake_writes_nothing_when_a_cell_fails(tmp_path):
    small_project(tmp_path)
    nb = tmp_path/'nbs/index.ipynb' # show() is not defined
    before = nb.read_bytes()
    out = run(sys.executable, 'tools/remake.py', nb, cwd=tmp_path)
    assert out.returncode == 1 and "name 'show' is not defined" in out.stderr and nb.read_bytes() == before

def test_a_notebook_leaves_transformers_with_the_classes_of_the_library():
    "nbdev_test runs several notebooks in a process; those that define a tower register their own class"
    out = run(sys.executable, '-c', f"""
from pathlib import Path
from nbdev.test import test_nb
from transformers import AutoConfig, AutoModel
from graftlab.pruned_vlm import PrunedTower
from graftlab.tower import QuantizedTower
for n in ('08b_tower', '09a_pruned_vlm'): assert test_nb(Path({str(ROOT)!r})/f'nbs/{{n}}.ipynb', skip_flags=['slow', 'gpu'])[0]
for cls in (QuantizedTower, PrunedTower):
    assert type(AutoConfig.for_model(cls.config_class.model_type)) is cls.config_class
    assert AutoModel._model_mapping[cls.config_class] is cls
""")
    assert out.returncode==0, out.stderr
