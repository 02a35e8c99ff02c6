"""Many runs: compare, tune, forecasts, statistics."""
