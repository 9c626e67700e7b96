"""Trains a language model on text files: ``python -m core.pretrain --data.root FOLDER``."""

from core.cli import main

if __name__ == "__main__":
    main(
        "core",
        "core.language.TextModel",
        "core.text.TextData",
        command="pretrain",
        default_recipe="text",
        links={"data.vocab_size": "model.vocab_size"},
    )
