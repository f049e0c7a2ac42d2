"""Execute the notebooks beside this file and keep their outputs in them: `make notebooks`."""

import base64
import io
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

try:
    import nbformat
    from nbclient import NotebookClient
except ImportError as error:
    raise SystemExit('notebooks are executed by nbclient: pip install -c constraints.txt -e ".[notebooks]"') from error

HERE = Path(__file__).parent


def smaller(picture: str) -> str:
    """A PNG of 64 colours: a third of the bytes of one in full colour."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode() + "\n"


if __name__ == "__main__":
    wanted = [HERE / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in tqdm(wanted, unit="notebook"):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HERE)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of the run: they would change with every execution
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)
