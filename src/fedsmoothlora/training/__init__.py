"""One client's local optimisation: the loop, corrections, the calibration gradient."""
