"""What the process itself needs: loops that live as long as it, and its log."""
