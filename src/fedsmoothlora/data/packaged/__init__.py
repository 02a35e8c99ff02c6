"""Data sets out of packages, for machines that reach a package index but no data hub.

One file a data set; adding a file adds the data set. Each file has:

- ``NAME``: its name in configurations,
- ``PACKAGE``: a :class:`fedsmoothlora.data.packages.Package`, or anything with a ``requirement``,
- ``LICENCE``: the licence as the package states it,
- ``DESCRIPTION``: one sentence,
- ``load(path=None)``: the training and the test set; ``path`` is another folder with its files, or refused.
"""
