"""What browsers and programs say to each other, as text: no socket, no greenlet, no clock."""
