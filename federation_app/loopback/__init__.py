"""A whole federation on one machine: rows dealt, certificates made, processes started and ended."""
