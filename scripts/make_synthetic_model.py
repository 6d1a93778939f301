"""Write a Llama-shaped checkpoint with random weights for timing: python scripts/make_synthetic_model.py FOLDER."""

import argparse
from dataclasses import fields
from pathlib import Path

from app.bench.synthetic import Shape, make_synthetic_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path("models/demo"), help="model folder to take it from")
    for field in fields(Shape):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default, help="default %(default)s")
    args = vars(parser.parse_args())
    folder, tokenizer = args.pop("folder"), args.pop("tokenizer")
    parameters = make_synthetic_model(folder, Shape(**args), tokenizer)
    print(f"{folder}: {parameters / 1e9:.2f} B parameters")


if __name__ == "__main__":
    main()
