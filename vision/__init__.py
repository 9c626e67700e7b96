"""Images: state-space backbones in timm's registry, their training and the routes they scan along.

Importing this package registers the models, so that ``timm.create_model("vim_tiny_patch16_224")`` finds them.
"""

from vision import models

__all__ = ["models"]
