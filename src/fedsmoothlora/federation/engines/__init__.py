"""Engines, which run clients one by one, together, or in several processes of this machine.

`fedsmoothlora.federation.simulation.Engine` is the interface; the rounds are the same with every engine.
"""
