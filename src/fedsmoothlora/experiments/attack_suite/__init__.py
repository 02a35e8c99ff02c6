"""Attacks by malicious clients against the robust aggregation rules, over several seeds."""
