"""QuPeD in JAX: many clients learn their own quantised models side by side on one device."""

__version__ = "0.1.0"
