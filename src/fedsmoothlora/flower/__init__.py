"""Flower as the engine: the coordinator and every site are processes of their own, on machines of their own.

`wire`, `agreement`, `site` and `settings` know nothing of Flower; the other modules need the extra
``fedsmoothlora[flower]``.
"""
