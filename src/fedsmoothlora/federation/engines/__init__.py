"""Engines, which run clients in this process or in several processes of this machine.

`fedsmoothlora.federation.simulation.Engine` is the interface; the rounds are the same with every engine.
"""
