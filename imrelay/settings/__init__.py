"""The settings of one relay: their values, and how they are read."""
