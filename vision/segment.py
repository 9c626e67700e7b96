"""Trains semantic segmentation on images and masks: ``python -m vision.segment masks --data.root DIR``."""

from core.cli import main

if __name__ == "__main__":
    main(
        "vision",
        "vision.segmenter.Segmenter",
        "vision.masks.MaskFolder",
        command="segment",
        links={"data.num_classes": "model.num_classes"},
        folder="vision/segment",
    )
