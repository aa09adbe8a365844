"""What the federated experiments share: their options, their data, and how methods are run."""
