"""Configurations that are ready to run; `fedsmoothlora list recipes` names them."""
