"""docs/ as a website in _site/: `make site`. KaTeX comes from npm, so that mathematics needs no network when it is read"""
import shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT/'build/site'
KATEX = 'katex@0.19.1'

def add_katex(dst):
    "Unpack KaTeX's style sheet, scripts and fonts to `dst`"
    if shutil.which('npm') is None: sys.exit('KaTeX comes from npm, which is not installed: run `make site`, which brings npm along; docs/ can be read without it')
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(['npm', 'pack', '--silent', KATEX], cwd=tmp, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(tmp).glob('*.tgz'))) as tar: tar.extractall(tmp, filter='data')
        dist = Path(tmp)/'package/dist'
        dst.mkdir(parents=True)
        for f in ('katex.min.css', 'katex.min.js', 'contrib/auto-render.min.js'): shutil.copy(dist/f, dst)
        shutil.copytree(dist/'fonts', dst/'fonts', ignore=lambda d,names: [n for n in names if not n.endswith('.woff2')])
    (dst/'start.js').write_text("document$.subscribe(() => renderMathInElement(document.body, {delimiters: ["
        "{left: '\\\\(', right: '\\\\)', display: false}, {left: '\\\\[', right: '\\\\]', display: true}]}))\n")
    (dst/'page.css').write_text('.md-grid { max-width: 78rem; } .md-typeset pre > code { font-size: .62rem; }\n')

def main():
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(ROOT/'docs', STAGE)
    add_katex(STAGE/'katex')
    subprocess.run([str(Path(sys.executable).parent/'zensical'), 'build', '--clean', '-f', str(ROOT/'mkdocs.yml')], cwd=ROOT, check=True)
    print(f'{ROOT/"_site/index.html"}')

if __name__ == '__main__': main()
