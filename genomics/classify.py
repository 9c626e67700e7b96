"""Tells species apart by reads: ``python -m genomics.classify``, on the great apes or on your genomes.

``python -m genomics.classify --data.fasta.human a.fa --data.fasta.chimp b.fa`` does the same on FASTA files.
"""

from core.cli import main

if __name__ == "__main__":
    main(
        "genomics",
        "genomics.classifier.SpeciesClassifier",
        "genomics.species.SpeciesData",
        command="classify",
        default_recipe="great_apes",
        links={"data.num_classes": "model.num_classes"},
    )
