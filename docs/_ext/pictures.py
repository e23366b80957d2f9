"""Put the README's pictures, as the examples have drawn them last, into `docs/pictures`, small: `make pictures`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ensemble_digits", "neural_ode", "pinn_heat")
WIDTH = 900


def main() -> None:
    """Shrink each, to at most 256 colors."""
    for name in NAMES:
        with Image.open(ROOT / "examples" / "output" / f"{name}.png") as picture:
            small = picture.convert("RGB").resize(
                (WIDTH, WIDTH * picture.height // picture.width), Image.Resampling.LANCZOS
            )
            path = ROOT / "docs" / "pictures" / f"{name}.png"
            small.quantize(256).save(path, optimize=True)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
