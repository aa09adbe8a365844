"""Data sets, their division among clients, and the arrays that clients train from."""
