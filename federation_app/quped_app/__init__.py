"""QuPeD and three of its rivals as a Flower app: what runs on the server and on every node."""
