"""Trains image classifiers: ``python -m vision.train digits``, ``python -m vision.train imagenet --data.root DIR``."""

from core.cli import main

if __name__ == "__main__":
    main(
        "vision",
        "vision.module.Classifier",
        "vision.data.ImageData",
        choose_data=True,
        links={"data.num_classes": "model.num_classes"},
    )
