"The zoo among real processes: two at once, killed, without pip, without disk, without network, hostile archives"
import json, os, signal, subprocess, sys, tarfile, textwrap, time, venv, zipfile
from io import BytesIO
from pathlib import Path
import pytest
from safetensors.torch import save
from hypothesis import given, settings, strategies as st
from graftlab import zoo
from graftlab.zoo import ZooError, Source

REPO = Path(zoo.__file__).parents[1]


def make_wheel(folder, name, files):
    "A real wheel of version 1.0; returns its pinned source"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder/f'{name}-1.0-py3-none-any.whl'
    info = {'METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n', 'RECORD': '',
            'WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'}
    with zipfile.ZipFile(wheel, 'w') as z:
        for k,v in files.items(): z.writestr(k, v)
        for k,v in info.items(): z.writestr(f'{name}-1.0.dist-info/{k}', v)
    return Source('PyPI', name, '1.0', zoo.sha256(wheel))


@pytest.fixture
def shelf(tmp_path):
    "A package, an entry that converts it slowly and writes a line for each conversion, and the environment to use them"
    source = make_wheel(tmp_path/'shelf', 'tinyzoo', {'tinyzoo/words.txt': 'graft\n'})
    (tmp_path/'entry.py').write_text(textwrap.dedent(f'''
        import os, sys, time
        from pathlib import Path
        from graftlab.zoo import ENTRIES, Entry, Source, zoo_get
        def convert(files, out):
            with open({str(tmp_path/"log")!r}, 'a') as f: f.write('converted\\n')
            (out/'words.txt').write_text((files[0]/'tinyzoo/words.txt').read_text())
            time.sleep(float(os.environ.get('SLOW', 0)))
            (out/'more.bin').write_bytes(bytes(int(os.environ.get('BYTES', 3))))
        ENTRIES['tiny'] = Entry('tiny', 'data', (Source('PyPI', 'tinyzoo', '1.0', os.environ.get('SHA', {source.sha256!r})),), convert, '', '', 1)
        '''))
    env = os.environ | dict(PIP_NO_INDEX='1', PIP_FIND_LINKS=str(tmp_path/'shelf'), GRAFTLAB_HOME=str(tmp_path/'home'), IN_TEST='1',
                            PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPO)]))
    return tmp_path, env


def start(env, code, python=sys.executable, **more):
    return subprocess.Popen([python, '-c', code], env=env|more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(p):
    out,err = p.communicate(timeout=120)
    return p.returncode, out, err


GET = 'import entry; print(entry.zoo_get("tiny"))'


def names(folder): return sorted(p.name for p in folder.iterdir())


def test_two_processes_fetch_once_and_a_third_needs_nothing(shelf):
    tmp,env = shelf
    both = [start(env, GET, SLOW='2') for _ in range(2)]
    for code,out,err in map(finish, both): assert (code, out.strip()) == (0, str(tmp/'home/zoo/tiny')), err
    assert (tmp/'log').read_text() == 'converted\n'
    assert names(tmp/'home/zoo') == ['tiny', 'tiny.lock']
    refuse = '''
        import sys
        def hook(event, args):
            if event in ('subprocess.Popen', 'socket.connect', 'socket.getaddrinfo'): raise RuntimeError(f'refused: {event} {args}')
        import entry
        sys.addaudithook(hook)
        print(entry.zoo_get('tiny'))
        import subprocess
        try: subprocess.run(['true'])
        except RuntimeError: print('the hook works')
        '''
    code,out,err = finish(start(env, textwrap.dedent(refuse)))
    assert code == 0 and out.splitlines() == [str(tmp/'home/zoo/tiny'), 'the hook works'], err


def test_killed_while_converting(shelf):
    tmp,env = shelf
    p = start(env, GET, SLOW='60')
    limit = time.time()+60
    while not (tmp/'log').exists():
        assert time.time() < limit and p.poll() is None, 'the conversion did not begin'
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); finish(p)
    left = [n for n in names(tmp/'home/zoo') if n.startswith('.tiny.')]
    assert left and not (tmp/'home/zoo/tiny').exists()
    code,out,err = finish(start(env, GET))
    assert code == 0, err
    assert names(tmp/'home/zoo') == ['tiny', 'tiny.lock']
    assert names(tmp/'home/zoo/tiny') == ['more.bin', 'words.txt', 'zoo.json']


def test_disk_that_takes_no_more(shelf):
    tmp,env = shelf
    code = 'import entry, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); ' \
           'from graftlab.host import GraftError\ntry: entry.zoo_get("tiny")\nexcept GraftError as e: print(type(e).__name__, e)'
    code,out,err = finish(start(env, code, BYTES=str(2**22)))
    assert code == 0 and out.startswith('ZooError tiny could not be written below') and 'File too large' in out, (out, err)
    assert names(tmp/'home/zoo') == ['tiny.lock']


def test_wrong_hash_and_no_pip(shelf):
    tmp,env = shelf
    # a virtual environment without pip that sees every installed package but pip
    venv.create(tmp/'venv', with_pip=False)
    (tmp/'packages').mkdir()
    for site in {Path(p) for p in sys.path if p.endswith('site-packages')}:
        for p in site.iterdir():
            if not p.name.startswith('pip') and not (tmp/'packages'/p.name).exists(): (tmp/'packages'/p.name).symlink_to(p)
    show = 'import entry\ntry: entry.zoo_get("tiny")\nexcept Exception as e: print(type(e).__name__, e)'
    no_pip = start(env, show, python=str(tmp/'venv/bin/python'), PYTHONPATH=os.pathsep.join([str(tmp), str(REPO), str(tmp/'packages')]), GRAFTLAB_HOME=str(tmp/'home2'))
    wrong = start(env, show, SHA='0'*64)
    code,out,err = finish(no_pip)
    assert out.startswith('ZooError tinyzoo==1.0: this Python has no pip: run') and 'ensurepip' in out, (out, err)
    code,out,err = finish(wrong)
    assert out.startswith('ZooError tinyzoo==1.0: SHA-256 of') and 'Nothing was kept' in out, (out, err)
    for home in ('home', 'home2'): assert names(tmp/home/'zoo') == ['tiny.lock']


def test_hub_snapshot_without_network(tmp_path):
    "The hub library's own cache layout: found offline with safetensors, refused with pickled weights only"
    for repo,file in {'good': 'model.safetensors', 'bad': 'pytorch_model.bin'}.items():
        base = tmp_path/'hub'/f'models--someone--{repo}'
        snapshot = base/'snapshots'/('1'*40)
        snapshot.mkdir(parents=True); (base/'refs').mkdir()
        (base/'refs/main').write_text('1'*40)
        (snapshot/'config.json').write_text('{}'); (snapshot/file).write_bytes(save({}))
    code = textwrap.dedent('''
        from graftlab.zoo import get_llm
        print(get_llm('someone/good'), get_llm('someone/good', revision='main'))
        for name in ('someone/bad', 'someone/absent'):
            try: get_llm(name)
            except Exception as e: print(type(e).__name__, e)
        ''')
    code,out,err = finish(start(os.environ|dict(HF_HUB_CACHE=str(tmp_path/'hub'), HF_HUB_OFFLINE='1', PYTHONPATH=str(REPO)), code))
    good,bad,absent = out.splitlines()
    assert good == ' '.join([str(tmp_path/'hub/models--someone--good/snapshots'/('1'*40))]*2), (out, err)
    assert bad.startswith('BadCheckpoint') and 'pickled' in bad
    assert absent.startswith('ZooError someone/absent (revision main) cannot be had from the hub'), absent


PIECES = st.lists(st.sampled_from(['..', '.', 'a', 'b.txt', '', '/', 'c d', '~', '\\..']), min_size=1, max_size=5).map('/'.join)


@settings(max_examples=60, deadline=None)
@given(name=PIECES, kind=st.sampled_from(['zip', 'tar']), link=st.booleans())
def test_no_archive_writes_outside(tmp_path_factory, name, kind, link):
    tmp = tmp_path_factory.mktemp('x')
    archive = tmp/f'archive.{kind}'
    if kind == 'zip':
        with zipfile.ZipFile(archive, 'w') as z: z.writestr(name or 'a', 'x')
    else:
        with tarfile.open(archive, 'w') as t:
            if link:
                escape = tarfile.TarInfo('a'); escape.type,escape.linkname = tarfile.SYMTYPE,'../..'; t.addfile(escape)
            info = tarfile.TarInfo(name or 'a'); info.size = 1; t.addfile(info, BytesIO(b'x'))
    before = {p for p in tmp.rglob('*')}
    try: zoo.unpack(archive, tmp/'deep'/'inside')
    except (ZooError, IsADirectoryError, NotADirectoryError): refused = True
    else: refused = False
    new = {p for p in tmp.rglob('*')} - before
    assert all(p == tmp/'deep' or p.is_relative_to(tmp/'deep'/'inside') for p in new)
    if kind == 'tar' and link: assert refused


def test_damaged_file_is_named_and_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv('GRAFTLAB_HOME', str(tmp_path/'home'))
    monkeypatch.setenv('PIP_NO_INDEX', '1'); monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path/'shelf'))
    source = make_wheel(tmp_path/'shelf', 'dmg', {'dmg/a.txt': 'hello'})
    def convert(files, out): (out/'deep').mkdir(); (out/'deep/a.txt').write_text((files[0]/'dmg/a.txt').read_text())
    monkeypatch.setitem(zoo.ENTRIES, 'dmg', zoo.Entry('dmg', 'data', (source,), convert, '', '', 1))
    folder = zoo.get_data('dmg')
    assert zoo.zoo_verify('dmg') == 1
    (folder/'deep/a.txt').write_text('hullo')
    with pytest.raises(ZooError, match='deep/a.txt'): zoo.zoo_verify('dmg')
    (folder/'deep/a.txt').write_text('hello, longer')
    assert not zoo.is_present('dmg') and (zoo.get_data('dmg')/'deep/a.txt').read_text() == 'hello'
    newer = zoo.Entry('dmg', 'data', (source,), convert, '', '', 1, recipe=2)
    monkeypatch.setitem(zoo.ENTRIES, 'dmg', newer)
    assert not zoo.is_present('dmg')
    assert json.loads((zoo.zoo_get('dmg')/'zoo.json').read_text())['recipe'] == 2
