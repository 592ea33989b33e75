"""What the process itself needs: loops that run as long as it does, and its log."""
