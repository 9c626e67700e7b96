"""Trains a classifier of spoken words: ``python -m audio.classify fsdd --data.root FOLDER``."""

from core.cli import main

if __name__ == "__main__":
    main(
        "audio",
        "audio.classifier.SpokenClassifier",
        "audio.clips.LabelledClips",
        command="classify",
        default_recipe=None,
        folder="audio_classify",
        links={f"data.{name}": f"model.{name}" for name in ("sample_rate", "length", "class_names")},
    )
