"""The browser sockets of this process: one session each, and the registry of all."""
