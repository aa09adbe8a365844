"""Models as files: for other runtimes, for a browser, and for predictions on the spot."""
