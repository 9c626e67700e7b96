"""Trains a language model of DNA: ``python -m genomics.pretrain``, on the excerpt or with ``--data.fasta FILE``."""

from core.cli import main

if __name__ == "__main__":
    main(
        "genomics",
        "genomics.language.LanguageModel",
        "genomics.datasets.GenomeData",
        command="pretrain",
        default_recipe="pretrain",
        links={"data.window": "model.context"},
        aliases={"--model.context": "--data.window"},
    )
