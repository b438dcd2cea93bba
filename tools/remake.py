"""Run notebooks from top to bottom, `#| slow` cells too, and keep their outputs: `python tools/remake.py nbs/05_data.ipynb ...`

Cells with `#| eval: false` keep what they have, and so do `#| gpu` cells where there is no GPU. Stops at the first error and then writes nothing.
"""
import os, shutil, sys, time
from pathlib import Path
from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.process import NBProcessor

def kept(cell):
    "Whether a cell keeps the outputs it has"
    if cell.cell_type != 'code': return True
    flags = cell.directives_ or {}
    return flags.get('eval:', [''])[0].lower() == 'false' or ('gpu' in flags and shutil.which('nvidia-smi') is None)

class Shell(CaptureShell):
    "A shell in which a last `;` hides a cell's value, as in Jupyter; execnb's own drops all that the cell printed too"
    def _run(self, raw_cell, *args, **kw):
        quiet = raw_cell.rstrip().endswith(';')
        done = super()._run(raw_cell+'\n#' if quiet else raw_cell, *args, **kw)
        done.quiet = quiet
        return done

def remake(path):
    "Run one notebook and write its new outputs"
    nb,shell = NBProcessor(path, process=True, rm_directives=False).nb,Shell(path)
    for c in nb.cells:
        if not kept(c): c.outputs = [] # a cell that shows nothing any more keeps nothing
    with working_directory(path.parent):
        try: shell.run_all(nb, exc_stop=True, preproc=kept)
        except Exception: sys.exit(shell.prettytb(fname=path))
    for c in nb.cells:
        for k in ('directives_', 'idx_'): c.pop(k, None)
    clean_nb(nb)
    write_nb(nb, path)

if __name__ == '__main__':
    if not sys.argv[1:]: sys.exit(__doc__)
    os.environ.update(IN_TEST='1', TQDM_DISABLE='1') # no progress bars in outputs
    root = Path(__file__).resolve().parent.parent
    for arg in sys.argv[1:]:
        start,path = time.time(),Path(arg).resolve()
        if path.suffix != '.ipynb' or not path.is_file(): sys.exit(f'{arg}: not a notebook')
        sys.path.insert(0, str(root))
        remake(path)
        print(f'{path.relative_to(root)}: {time.time()-start:.0f} s')
