"""Execute the notebooks beside this file and keep their outputs in them: `make notebooks`."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

HERE = Path(__file__).parent

if __name__ == "__main__":
    wanted = [HERE / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in tqdm(wanted, unit="notebook"):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HERE)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of the run: they would change with every execution
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)
