"""Secure aggregation: a coordinator learns the weighted mean of the sites' tensors, and no site's own."""
