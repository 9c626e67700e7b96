"""What every domain shares: mixers, language model, training."""

__version__ = "0.1.0"
