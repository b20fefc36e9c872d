"""Measurements beside others, run by `make bench`. They print tables and can write JSON; they assert nothing."""
