"""Make docs/ and README.md from the notebooks: `make docs`.

Outputs are taken as they are stored, no cell is run: the same notebooks give the same bytes.
Code is shown as it stands, since docments explain each parameter on its own line; `docs/api.md` lists every exported name.
"""
import ast, re, shutil
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NBS, DOCS = ROOT/'nbs', ROOT/'docs'
GROUPS = {'.': 'One component each', 'experiments': "The papers' figures and tables", 'bench': 'Comparisons with other tools'}
TABLE = '<!-- notebooks -->'
FENCED = """{% extends 'markdown/index.md.j2' %}
{% block input %}{% if cell.source %}{% set fence = '````' if '```' in cell.source else '```' %}
{{ fence }}python
{{ cell.source }}
{{ fence }}
{% endif %}{% endblock input %}
{% block stream %}
```text
{{ output.text | strip_ansi | trim }}
```
{% endblock stream %}
{% block data_text scoped %}
```text
{{ output.data['text/plain'] | strip_ansi | trim }}
```
{% endblock data_text %}
{% block data_png %}{% set width = output.metadata.get('image/png', {}).get('width') %}
<img src="{{ output.metadata.filenames['image/png'] | path2url }}" alt="{{ cell.metadata.caption }}"{% if width %} width="{{ width }}"{% endif %}>
{% endblock data_png %}"""

FOLDED = '<details markdown="1"><summary>Imports</summary>\n\n```python\n{}\n```\n\n</details>'


class Page:
    "One notebook: where it goes, what it says of itself, what it exports"
    def __init__(self, path):
        self.path,self.nb = path,nbformat.read(path, as_version=4)
        self.rel = path.relative_to(NBS).with_suffix('.md')
        head = self.nb.cells[0].source
        self.title = re.search(r'^# (.+)', head, re.M)[1].strip()
        line = re.search(r'^> (.+)', head, re.M)
        self.line = line[1].strip() if line else ''
        sources = [c.source for c in self.nb.cells]
        module = next((m[1] for s in sources if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))), None)
        self.module = f'graftlab.{module}' if module else None
        self.exports = [e for s in sources for e in exported(s)]

def exported(source):
    "Public functions and classes that a cell exports, as (name, signature without types, one line)"
    if not re.search(r'^#\|\s*export\b', source, re.M): return
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        if any(ast.unparse(d).startswith('patch') for d in node.decorator_list): continue
        args = '' if isinstance(node, ast.ClassDef) else f"({', '.join(a.arg for a in node.args.posonlyargs+node.args.args+node.args.kwonlyargs)})"
        yield node.name, args, (ast.get_docstring(node) or '').split('\n')[0]

def find_pages():
    "The front page and all other notebooks, in the order in which they are read"
    found = [p for p in NBS.rglob('*.ipynb') if not any(o.startswith(('.', '_')) for o in p.relative_to(NBS).parts)]
    order = list(GROUPS)
    rest = sorted((p for p in found if p != NBS/'index.ipynb'), key=lambda p: (order.index(str(p.parent.relative_to(NBS))), p.name))
    return Page(NBS/'index.ipynb'), [Page(p) for p in rest]

def up(rel): return '../'*(len(rel.parts)-1)

def only_imports(source):
    "Whether a cell does nothing but import"
    try: body = ast.parse(source).body
    except SyntaxError: return False
    return bool(body) and all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body)

def link_names(text, here, names):
    "Link each `name` in prose to the cell that exports it; code blocks, mathematics and existing links stay as they are"
    def one(m):
        page = names.get(m[1])
        if page is None or page.rel == here or m[0] == f'`{m[1].lower()}`' and '_' not in m[1]: return m[0] # `graft` may be any word, `graft()` is not
        return f'[{m[0]}]({up(here)}{page.rel.as_posix()}#{m[1]})'
    parts = re.split(r'(```.*?```|\$\$.*?\$\$|\[[^\]]*\]\([^)]*\)|^#.*?$)', text, flags=re.S|re.M)
    return ''.join(p if i%2 else re.sub(r'`(?:graftlab\.\w+\.)?(\w+)(?:\(\))?`', one, p) for i,p in enumerate(parts))

def prepare(page, names):
    "A copy of a notebook as it shall be read: directives and hidden cells gone, names linked, exports anchored"
    nb,figure,out = nbformat.from_dict(page.nb),0,[]
    nb.metadata = {}
    for cell in nb.cells:
        cell.metadata = {}
        if cell.cell_type == 'markdown':
            cell.source = re.sub(r'(\]\([^)\s]+)\.ipynb(#[^)]*)?\)', r'\1.md\2)', link_names(cell.source, page.rel, names))
            out.append(cell); continue
        flags = set(re.findall(r'^#\|\s*([\w_]+)', cell.source, re.M))
        if flags & {'hide', 'default_exp'}: continue
        anchors = ''.join(f'<a id="{n}"></a>' for n,_,_ in exported(cell.source))
        imports = only_imports(cell.source)
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
        if 'hide_input' in flags: cell.source = ''
        cell.outputs = [o for o in cell.outputs if 'hide_output' not in flags and o.get('name') != 'stderr'] # progress bars, warnings
        if imports and not cell.outputs:
            if out and out[-1].metadata.get('imports'): cell.source = f'{out.pop().metadata["imports"]}\n\n{cell.source}'
            out.append(nbformat.v4.new_markdown_cell(FOLDED.format(cell.source), metadata={'imports': cell.source})); continue
        if 'export' in flags: out.append(nbformat.v4.new_markdown_cell(f'{anchors}*Exported to* `{page.module}`:'))
        figure += any('image/png' in o.get('data', {}) for o in cell.outputs)
        cell.metadata = {'caption': f'Figure {figure}'}
        out.append(cell)
    nb.cells = out
    return nb

def render(page, names, folder, prefix=''):
    "Markdown of one notebook; its figures are written to `folder`"
    exporter = MarkdownExporter(raw_template=FENCED)
    figures = f'{page.rel.stem}_files'
    body,res = exporter.from_notebook_node(prepare(page, names), resources={'output_files_dir': prefix+figures, 'unique_key': 'fig'})
    for name,data in res['outputs'].items():
        dst = folder/page.rel.parent/figures/Path(name).name
        dst.parent.mkdir(parents=True, exist_ok=True)
        dst.write_bytes(data)
    body = re.sub(r'<style.*?</style>\s*', '', body, flags=re.S)
    body = re.sub(r'[ \t]+$', '', body, flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', body).strip()+'\n'

def notebook_tables(pages, prefix=''):
    "The list of notebooks, grouped by folder"
    out = []
    for folder,title in GROUPS.items():
        rows = [p for p in pages if str(p.rel.parent) == folder]
        if rows: out += [f'| {title} | |', '|---|---|'] + [f'| [{number(p)}{p.title}]({prefix}{p.rel.as_posix()}) | {p.line} |' for p in rows] + ['']
    return '\n'.join(out)

def number(page):
    m = re.match(r'(\d+[a-z]?)_', page.rel.name)
    return f'{m[1]} ' if m else ''

def api(pages):
    "One table a module: every exported name, with the line that says what it is"
    out = ['# Reference', '', 'Every exported name, by module. Parameters are explained in the code that each name links to.', '']
    for p in pages:
        if not p.module or not p.exports: continue
        out += [f'## `{p.module}`', '', f'From [{number(p)}{p.title}]({p.rel.as_posix()}).', '', '| name | what it does |', '|---|---|']
        out += [f'| [`{n}{a}`]({p.rel.as_posix()}#{n}) | {line.replace("|", chr(92)+"|")} |' for n,a,line in p.exports] + ['']
    return '\n'.join(out).strip()+'\n'

def main():
    index,pages = find_pages()
    names = {}
    for p in pages:
        for n,_,_ in p.exports: names.setdefault(n, p)
    shutil.rmtree(DOCS, ignore_errors=True)
    for p in pages:
        dst = DOCS/p.rel
        dst.parent.mkdir(parents=True, exist_ok=True)
        dst.write_text(render(p, names, DOCS), encoding='utf-8')
    DOCS.mkdir(exist_ok=True)
    front = render(index, names, DOCS)
    intro = front.split('\n## ')[0].strip()
    home = f'{intro}\n\n## Notebooks\n\n{notebook_tables(pages)}\nEvery exported name is in the [reference](api.md).\n'
    (DOCS/'index.md').write_text(home, encoding='utf-8')
    (DOCS/'api.md').write_text(api(pages), encoding='utf-8')
    front = re.sub(r'(\]\(|<img src=")(?!https?:|#|\.\./|/)', r'\1docs/', front).replace('](../', '](')
    note = '<!-- Made from nbs/index.ipynb by `make docs`: edit the notebook -->\n\n'
    (ROOT/'README.md').write_text(note + front.replace(TABLE, notebook_tables(pages, 'docs/')), encoding='utf-8')
    print(f'{len(pages)+1} notebooks -> docs/, README.md')

if __name__ == '__main__': main()
