"""Small folders of pictures, as an arena reads them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_model(folder: Path, shade: int, n=6, size=(8, 8), edits=0, **keys):
    """A model's folder of n prompts, the first `edits` of which edit a picture."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        file = f"images/{i}.png"
        Image.fromarray(np.full((*size, 3), shade + i, np.uint8)).save(folder / file)
        row = {"id": f"p{i}", "prompt": f"a picture of {i}", "category": ["even", "odd"][i % 2]}
        row |= {"image": file} | keys
        if i < edits:
            source = f"images/{i}-source.png"
            Image.fromarray(np.full((8, 8, 3), 200 + i, np.uint8)).save(folder / source)
            row["source"] = source
        rows.append(row)
    write_rows(folder, rows)
    return rows


def write_rows(folder: Path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
