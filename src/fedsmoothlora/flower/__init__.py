"""Federations on several machines, as a Flower app: coordinator and sites are processes of their own.

`handshake` and `site` import nothing of Flower. The other modules need the extra ``fedsmoothlora[flower]``.
"""
