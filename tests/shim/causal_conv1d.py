"""Stands in for the package ``causal_conv1d``, so that its own tests run on our convolution.

    PYTHONPATH=tests/shim python -m pytest TEST_FILES

The functions are those of ``kernels.compat``; the ``_ref`` ones, which the tests compare them with, come from our
reference op by layouts of their own. The folder beside this file holds the submodules: there is no ``__init__.py``
under ``tests``, and a module with a ``__path__`` is a package just as well.
"""

from pathlib import Path

from kernels.compat import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
__path__ = [str(Path(__file__).with_suffix(""))]
