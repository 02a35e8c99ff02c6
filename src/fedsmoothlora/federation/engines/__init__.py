"""Where clients are: in this process, in several of this machine, or on machines of their own.

`fedsmoothlora.federation.simulation.Engine` is the interface; the rounds are the same whatever the engine.
"""
