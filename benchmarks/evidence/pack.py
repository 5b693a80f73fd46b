"""Make a data set small enough to travel: `python -m benchmarks.evidence.pack acdc.npz packed/acdc.npz`.

`np.load` reads the result as it reads the original.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def resized(images: np.ndarray, labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images by area, labels by nearest neighbour, (N, H, W) to (N, size, size)."""
    image = F.interpolate(torch.from_numpy(images)[:, None].float(), (size, size), mode="area")
    label = F.interpolate(torch.from_numpy(labels)[:, None].float(), (size, size), mode="nearest-exact")
    return image[:, 0].round().byte().numpy(), label[:, 0].byte().numpy()


def pack(source: Path, target: Path, size: int | None = None, bits: int = 8) -> None:
    """Write `source` again with LZMA, at another size or with images of fewer bits if asked for."""
    with np.load(source) as file:
        arrays = {key: file[key] for key in file.files}
    if (size is not None or bits < 8) and arrays["images"].dtype != np.uint8:
        raise ValueError(f"{source.name}: images are {arrays['images'].dtype}, and only uint8 can be made smaller")
    if size is not None and arrays["images"].shape[1:] != (size, size):
        if "spacing" in arrays:  # between slices, rows and columns
            arrays["spacing"] = arrays["spacing"] * [1, *(n / size for n in arrays["images"].shape[1:])]
        arrays["images"], arrays["labels"] = resized(arrays["images"], arrays["labels"], size)
    if bits < 8:
        step = 1 << (8 - bits)
        arrays["images"] = np.minimum(np.round(arrays["images"] / step) * step, 255).astype(np.uint8)
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as file:
        for key, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            file.writestr(f"{key}.npy", buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--size", type=int, help="side of the square slices; default: as they are")
    parser.add_argument("--bits", type=int, default=8, help="of the image; 7 saves a fifth")
    args = parser.parse_args()
    pack(args.source, args.target, args.size, args.bits)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
