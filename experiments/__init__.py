"""Experiments: one small file each, run by `make experiment NAME=...`."""
