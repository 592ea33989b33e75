"""The bench: what imrelay costs, beside what one would use instead; how to read it: `README.md`."""
