"""Genomes: FASTA files in, language models and classifiers of DNA out."""
